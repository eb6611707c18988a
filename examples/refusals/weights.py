"""Attacks on what is served: each is done to a copy of a registry, and refused.

The attacker here owns the registry's storage, and may change any byte of it. What it
does not have is the trainer's key, the deployer's key, or the trust policy.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.refusals.outcome import Refusal, refused
from ztserve.artifacts import TrustPolicy, publish, verify_model
from ztserve.errors import VerificationError

_MODEL = "dev.ztserve.model."
_TITLE = "org.opencontainers.image.title"
_PICKLE = b"cos\nsystem\n(S'echo this is what a pickle may do'\ntR."
"""A pickle that runs a command in whoever loads it."""


def tampered_weights(registry: Path, model: str, trust: TrustPolicy) -> Refusal:
    """Flip one bit of the weights: the smallest backdoor there is."""
    title = "tampered weights"
    with _copy(registry) as copy, refused(title, VerificationError) as told:
        blob = copy.layers(model)["model.safetensors"]
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        _overwrite(blob, bytes(content))
        verify_model(copy.root, f"{model}@production", trust)
    return Refusal(title, told.saw)


def unsigned_model(registry: Path, model: str, trust: TrustPolicy) -> Refusal:
    """Take the signature away, in the hope that nobody asks for it."""
    title = "unsigned model"
    with _copy(registry) as copy, refused(title, VerificationError) as told:
        copy.drop_layer(model, "model.sig")
        verify_model(copy.root, f"{model}@production", trust)
    return Refusal(title, told.saw)


def another_signed_model(
    registry: Path, model: str, other: str, trust: TrustPolicy
) -> Refusal:
    """Answer the name `model` with `other`, every signature of which is good."""
    title = "another signed model under this name"
    with _copy(registry) as copy, refused(title, VerificationError) as told:
        copy.rename(other, model)
        verify_model(copy.root, f"{model}@production", trust)
    return Refusal(title, told.saw)


def pickle(model: str) -> Refusal:
    """Have weights that are a program, and even have them signed and released.

    The signatures are right and the signers trusted: trainers make mistakes, too.
    """
    title = "pickle, though signed and released"
    with tempfile.TemporaryDirectory() as folder, refused(
        title, VerificationError
    ) as told:
        root, keys = Path(folder) / model, Path(folder) / "keys"
        root.mkdir()
        keys.mkdir(mode=0o700)
        (root / "model.pt").write_bytes(_PICKLE)
        trust = _signed_anyway(root, keys, model)
        verify_model(root, f"{model}:1", trust)
    return Refusal(title, told.saw)


def _signed_anyway(root: Path, keys: Path, model: str) -> TrustPolicy:
    """Sign and release `root` by hand: `ztserve sign` would refuse to."""
    new = publish.new_key(
        keys / "careless.pem", name="careless", roles=["trainer", "deployer"]
    )
    signer = publish.load_signer(new.private)
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.iterdir()
    }
    manifest = publish.model_statement(model, files)
    digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
    released = publish.release_statement(model, "1", digest)
    (root / "model.sig").write_bytes(signer.envelope(manifest))
    (root / "release.sig").write_bytes(signer.envelope(released))
    policy = keys / "trust.toml"
    policy.write_text("version = 1\n" + new.entry)
    policy.chmod(0o600)
    return TrustPolicy.load(policy)


# --- the attacker's registry ----------------------------------------------------


class _Layout:
    """A copy of a registry (an OCI image layout), to be changed at will."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def layers(self, model: str) -> dict[str, Path]:
        """Return where each file of `model` lies."""
        manifest = self._manifest(self._entry(self._index(), model))
        return {
            layer["annotations"][_TITLE]: self._blob(layer)
            for layer in manifest["layers"]
        }

    def drop_layer(self, model: str, title: str) -> None:
        """Publish `model` anew without the file `title`."""
        index = self._index()
        entry = self._entry(index, model)
        manifest = self._manifest(entry)
        manifest["layers"] = [
            layer
            for layer in manifest["layers"]
            if layer["annotations"][_TITLE] != title
        ]
        content = json.dumps(manifest).encode()
        entry["digest"] = "sha256:" + hashlib.sha256(content).hexdigest()
        entry["size"] = len(content)
        self._blob(entry).write_bytes(content)
        self._write(index)

    def rename(self, model: str, name: str) -> None:
        """Say that `model` is called `name`, and that the model `name` is not there."""
        index = self._index()
        entry = self._entry(index, model)
        index["manifests"] = [entry]
        entry["annotations"][_MODEL + "name"] = name
        self._write(index)

    def _index(self) -> Any:
        return json.loads((self.root / "index.json").read_bytes())

    def _write(self, index: Any) -> None:
        (self.root / "index.json").write_text(json.dumps(index))

    def _entry(self, index: Any, model: str) -> Any:
        return next(
            entry
            for entry in index["manifests"]
            if entry["annotations"].get(_MODEL + "name") == model
            and "production" in entry["annotations"][_MODEL + "aliases"].split(",")
        )

    def _manifest(self, entry: Any) -> Any:
        return json.loads(self._blob(entry).read_bytes())

    def _blob(self, descriptor: Any) -> Path:
        digest = descriptor["digest"].removeprefix("sha256:")
        return self.root / "blobs/sha256" / digest


@contextmanager
def _copy(registry: Path) -> Iterator[_Layout]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "registry"
        shutil.copytree(registry, root)
        yield _Layout(root)


def _overwrite(file: Path, content: bytes) -> None:
    file.chmod(0o600)
    file.write_bytes(content)
