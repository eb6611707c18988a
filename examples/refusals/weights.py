"""Attacks on what is served: each is done to a copy of a registry, and refused.

The attacker here owns the registry's storage, and may change any byte of it. What it
does not have is the trainer's key, the deployer's key, or the trust policy.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from examples.refusals.outcome import Refusal, refused
from ztserve.artifacts import Role, TrustPolicy, publish, verify_model
from ztserve.errors import VerificationError

Load: TypeAlias = Callable[[Path, str, Path], object]
"""Loads a model by reference from a registry, as a trust policy's file allows."""

_MODEL = "dev.ztserve.model."
_TITLE = "org.opencontainers.image.title"
_PICKLE = b"cos\nsystem\n(S'echo this is what a pickle may do'\ntR."
"""A pickle that runs a command in whoever loads it."""


def verify(registry: Path, ref: str, trust: Path) -> object:
    """Load as a replica does when it starts."""
    return verify_model(registry, ref, TrustPolicy.load(trust))


def tampered_weights(
    registry: Path, model: str, trust: Path, load: Load = verify
) -> Refusal:
    """Flip one bit of the weights: the smallest backdoor there is."""
    title = "tampered weights"
    with _copy(registry) as copy, refused(title, VerificationError) as told:
        copy.change(model, "production", _flip_a_bit)
        load(copy.root, f"{model}@production", trust)
    return Refusal(title, told.saw, told.error)


def tamper(registry: Path, model: str, version: str) -> None:
    """Do the same in place, to one version of a registry that one can spare."""
    _Layout(registry).change(model, version, _flip_a_bit)


def _flip_a_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def unsigned_model(
    registry: Path, model: str, trust: Path, load: Load = verify
) -> Refusal:
    """Take the signature away, in the hope that nobody asks for it."""
    title = "unsigned model"
    with _copy(registry) as copy, refused(title, VerificationError) as told:
        copy.drop(model, "production", "model.sig")
        load(copy.root, f"{model}@production", trust)
    return Refusal(title, told.saw, told.error)


def another_signed_model(
    registry: Path, model: str, other: str, trust: Path, load: Load = verify
) -> Refusal:
    """Answer the name `model` with `other`, every signature of which is good."""
    title = "another signed model under this name"
    with _copy(registry) as copy, refused(title, VerificationError) as told:
        copy.rename(other, model)
        load(copy.root, f"{model}@production", trust)
    return Refusal(title, told.saw, told.error)


def pickle(model: str, load: Load = verify) -> Refusal:
    """Have weights that are a program, and even have them signed and released.

    The signatures are right and the signers trusted: trainers make mistakes, too.
    """
    title = "pickle, though signed and released"
    with (
        tempfile.TemporaryDirectory() as folder,
        refused(title, VerificationError) as told,
    ):
        root, keys = Path(folder) / model, Path(folder) / "keys"
        root.mkdir()
        keys.mkdir(mode=0o700)
        (root / "model.pt").write_bytes(_PICKLE)
        trust = _signed_anyway(root, keys, model)
        load(root, f"{model}:1", trust)
    return Refusal(title, told.saw, told.error)


def _signed_anyway(root: Path, keys: Path, model: str) -> Path:
    """Sign and release `root` by hand, as `ztserve sign` would refuse to.

    Returns a trust policy that trusts these signatures.
    """
    roles: tuple[Role, ...] = ("trainer", "deployer")
    new = [
        publish.new_key(keys / f"{role}.pem", name=f"careless {role}", roles=[role])
        for role in roles
    ]
    trainer, deployer = (publish.load_signer(key.private) for key in new)
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.iterdir()
    }
    manifest = publish.model_statement(model, files)
    digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
    released = publish.release_statement(model, "1", digest)
    (root / "model.sig").write_bytes(trainer.envelope(manifest))
    (root / "release.sig").write_bytes(deployer.envelope(released))
    policy = keys / "trust.toml"
    policy.write_text("version = 1\n" + "".join(key.entry for key in new))
    policy.chmod(0o600)
    return policy


# --- the attacker's registry ----------------------------------------------------


class _Layout:
    """A registry (an OCI image layout), to be changed at will.

    Each change keeps it consistent: every blob is what its digest says. Only the
    signatures tell.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def change(
        self, model: str, which: str, how: Callable[[bytes], bytes | None]
    ) -> None:
        """Replace the weights of a model (a version, or alias) by `how` of them."""
        self._edit(model, which, "model.safetensors", how)

    def drop(self, model: str, which: str, title: str) -> None:
        """Leave a file of a model out."""
        self._edit(model, which, title, lambda _content: None)

    def rename(self, model: str, name: str) -> None:
        """Say that `model` is called `name`, and that the model `name` is not there."""
        index = self._index()
        entry = _entry(index, model, "production")
        index["manifests"] = [entry]
        entry["annotations"][_MODEL + "name"] = name
        self._write(index)

    def _edit(
        self, model: str, which: str, title: str, how: Callable[[bytes], bytes | None]
    ) -> None:
        index = self._index()
        entry = _entry(index, model, which)
        manifest = json.loads(self._blob(entry).read_bytes())
        layer = next(
            one for one in manifest["layers"] if one["annotations"][_TITLE] == title
        )
        content = how(self._blob(layer).read_bytes())
        if content is None:
            manifest["layers"].remove(layer)
        else:
            self._put(layer, content)
        self._put(entry, json.dumps(manifest).encode())
        self._write(index)

    def _put(self, descriptor: Any, content: bytes) -> None:
        """Write a blob, and have `descriptor` point at it."""
        descriptor["digest"] = "sha256:" + hashlib.sha256(content).hexdigest()
        descriptor["size"] = len(content)
        if not self._blob(descriptor).exists():
            self._blob(descriptor).write_bytes(content)

    def _blob(self, descriptor: Any) -> Path:
        digest: str = descriptor["digest"].removeprefix("sha256:")
        return self.root / "blobs/sha256" / digest

    def _index(self) -> Any:
        return json.loads((self.root / "index.json").read_bytes())

    def _write(self, index: Any) -> None:
        (self.root / "index.json").write_text(json.dumps(index))


def _entry(index: Any, model: str, which: str) -> Any:
    """Return the index's entry of a model's version, or of one of its aliases."""
    for entry in index["manifests"]:
        notes = entry.get("annotations", {})
        called = {notes.get(_MODEL + "version")}
        called |= set(notes.get(_MODEL + "aliases", "").split(","))
        if notes.get(_MODEL + "name") == model and which in called:
            return entry
    raise LookupError(f"the registry has no {model} {which}")


@contextmanager
def _copy(registry: Path) -> Iterator[_Layout]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "registry"
        shutil.copytree(registry, root)
        yield _Layout(root)
