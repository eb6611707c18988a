"""Publishing: from a signed and released directory into an OCI image layout.

Blobs first, each under its digest, then one index: whoever reads meanwhile sees the
registry before or after, never between. One publisher at a time holds the lock.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ztserve.artifacts.publish.atomic import create, prepared, replace
from ztserve.artifacts.publish.signing import read_signed
from ztserve.artifacts.registry.directory import DirectoryRegistry
from ztserve.artifacts.registry.files import read_file
from ztserve.artifacts.registry.layout import (
    ALIASES,
    DIGEST,
    IMAGE_MANIFEST_TYPE,
    INDEX_FILE,
    LAYOUT_FILE,
    MAX_INDEX_BYTES,
    NAME,
    TITLE,
    VERSION,
    parse_index,
    parse_layers,
)
from ztserve.artifacts.registry.protocol import Resolved
from ztserve.artifacts.registry.referrers import FOR, OF, refers_to
from ztserve.artifacts.registry.referrers import NAME as ATTESTATION
from ztserve.artifacts.statements.attestation import file_of, parse_attestation
from ztserve.artifacts.statements.envelope import (
    BUNDLE_TYPE,
    MAX_BUNDLE_BYTES,
    parse_envelope,
)
from ztserve.artifacts.statements.manifest import (
    RELEASE_FILE,
    SIGNATURE_FILE,
    SIGNATURE_FILES,
)
from ztserve.artifacts.statements.release import (
    check_name,
    check_release,
    parse_release,
)
from ztserve.errors import ConfigError, RegistryError, VerificationError
from ztserve.types import ModelRef

ARTIFACT_TYPE = "application/vnd.ztserve.model.v1"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ATTESTED = "dev.ztserve.model.attestations"
REF_NAME = "org.opencontainers.image.ref.name"
_EMPTY = b"{}"

Descriptor: TypeAlias = dict[str, Any]
"""An OCI content descriptor, as in JSON."""


@dataclass(frozen=True, slots=True)
class Published:
    """A model that is in the registry now, and what its aliases meant before."""

    model: Resolved
    before: Mapping[str, str | None]
    """Alias to the version that it pointed to, None where it is new."""


def publish(
    directory: str | os.PathLike[str],
    registry_path: str | os.PathLike[str],
    *,
    name: str,
    version: str,
    aliases: Sequence[str] = ("production",),
    digest: str | None = None,
) -> Resolved:
    """Copy a signed and released directory into the registry, made if not there.

    Its attestations go with it, as referrers, in place of all that were there.
    Points `aliases` at it; publishing the same content again only does that. `digest`:
    of the manifest that is meant, where it could be another by now. Raises
    VerificationError where the directory is not what its signatures say, or released
    as something else; RegistryError where the version exists with other content.
    """
    done = publish_staged(
        directory,
        registry_path,
        {},
        name=name,
        version=version,
        aliases=aliases,
        digest=digest,
    )
    return done.model


def publish_staged(
    directory: str | os.PathLike[str],
    registry_path: str | os.PathLike[str],
    staged: Mapping[str, bytes],
    *,
    name: str,
    version: str,
    aliases: Sequence[str] = ("production",),
    digest: str | None = None,
) -> Published:
    """Do as `publish`, with statements that are not in the directory yet.

    `staged`: by file (`stage_release`), in place of the directory's; they are written
    into it once all else is there, and not where anything is refused.
    """
    source, root = Path(directory), Path(registry_path)
    check_name(name, version, ConfigError)
    _check_aliases(name, aliases)
    signed = read_signed(source, digest)
    model = Resolved(name, version, signed.manifest.digest)
    files = {file: buffer.view for file, buffer in signed.buffers.items()}
    files[SIGNATURE_FILE] = memoryview(signed.signature)
    files[RELEASE_FILE] = memoryview(_read_release(source, model, staged))
    attestations = _read_attestations(source, model, staged)
    with _locked(root):
        index = _read_index(root)
        _check_not_taken(index, model, root)
        before = {alias: _pointed(index, name, alias) for alias in aliases}
        with _written(source, staged):
            image = _write_image(root, model, files, attestations)
            _put(index, image)
            _refer(root, index, model, image, attestations)
            _point(index, model, aliases)
            _write_index(root, index)
    return Published(model, before)


def _written(source: Path, staged: Mapping[str, bytes]) -> AbstractContextManager[None]:
    """Write the statements into the directory as the block ends well, else not."""
    for file in staged:
        (source / file).parent.mkdir(exist_ok=True)
    return prepared({source / file: raw for file, raw in staged.items()})


def set_alias(
    registry_path: str | os.PathLike[str], *, name: str, alias: str, version: str
) -> None:
    """Point an alias at a published version; RegistryError where there is none."""
    root = Path(registry_path)
    _check_aliases(name, (alias,))
    if not (root / LAYOUT_FILE).is_file():
        raise RegistryError(f"{root} is no registry")
    with _locked(root):
        index = _read_index(root)
        for node in _versions(index, name):
            if node["annotations"][VERSION] == version:
                _point(index, _model(node), (alias,))
                return _write_index(root, index)
    raise RegistryError(f"{root} has no {name}:{version}")


def _read_release(source: Path, model: Resolved, staged: Mapping[str, bytes]) -> bytes:
    try:
        raw = staged.get(RELEASE_FILE) or read_file(
            source, RELEASE_FILE, limit=MAX_BUNDLE_BYTES
        )
    except FileNotFoundError as error:
        raise VerificationError(
            f"{source} has no {RELEASE_FILE}: a deployer must release it first"
        ) from error
    release = parse_release(parse_envelope(raw, what=RELEASE_FILE))
    check_release(release, ModelRef(f"{model.name}:{model.version}"), model.digest)
    return raw


def _read_attestations(
    source: Path, model: Resolved, staged: Mapping[str, bytes]
) -> Mapping[str, bytes]:
    found = DirectoryRegistry(source, staged).attestations(model)
    for name, raw in found.items():
        spoken_of = parse_attestation(parse_envelope(raw, what=file_of(name))).digest
        if spoken_of != model.digest:
            raise VerificationError(
                f"{source / file_of(name)} attests {spoken_of}, but the manifest is "
                f"{model.digest}: attest this model with `ztserve attest`, or remove it"
            )
    return found


def _check_aliases(name: str, aliases: Collection[str]) -> None:
    for alias in aliases:
        if ModelRef(f"{name}@{alias}").alias != alias:
            raise ConfigError(f"{alias!r} is no alias")


# --- the index ------------------------------------------------------------------


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Make the registry if there is none, and hold it against other publishers."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, root)
        if not (root / LAYOUT_FILE).is_file():
            if any(root.iterdir()):
                raise RegistryError(f"{root} is neither a registry nor empty")
            # First, and at once: it tells a registry to come from an unsigned folder.
            layout = json.dumps({"imageLayoutVersion": "1.0.0"})
            create(root / LAYOUT_FILE, layout.encode(), mode=0o644)
        (root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        if not (root / INDEX_FILE).exists():
            _write_index(root, [])
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RegistryError(f"{root}: somebody else publishes; try again") from error


def _read_index(root: Path) -> list[Descriptor]:
    raw = read_file(root, INDEX_FILE, limit=MAX_INDEX_BYTES)
    parse_index(raw, str(root / INDEX_FILE))
    index: list[Descriptor] = json.loads(raw)["manifests"]
    return index


def _write_index(root: Path, index: list[Descriptor]) -> None:
    text = json.dumps(
        {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": index}, indent=1
    ).encode()
    parse_index(text, str(root / INDEX_FILE))  # or nobody could read it again
    replace(root / INDEX_FILE, text)


def _versions(index: list[Descriptor], name: str) -> list[Descriptor]:
    return [n for n in index if n.get("annotations", {}).get(NAME) == name]


def _model(node: Descriptor) -> Resolved:
    notes = node["annotations"]
    return Resolved(notes[NAME], notes[VERSION], notes[DIGEST])


def _check_not_taken(index: list[Descriptor], model: Resolved, root: Path) -> None:
    for node in _versions(index, model.name):
        there = _model(node)
        if there.version == model.version and there.digest != model.digest:
            raise RegistryError(
                f"{root} has {model.name}:{model.version} already, with other content "
                f"({there.digest}): a version never changes; publish a new one"
            )


def _put(index: list[Descriptor], new: Descriptor) -> None:
    """Put the version in its place, or at the end as the newest."""
    for position, node in enumerate(index):
        if new["annotations"][REF_NAME] == node.get("annotations", {}).get(REF_NAME):
            new["annotations"][ALIASES] = node["annotations"].get(ALIASES, "")
            index[position] = new
            return
    index.append(new)


def _pointed(index: list[Descriptor], name: str, alias: str) -> str | None:
    """Return the version that has an alias; None where none has."""
    for node in _versions(index, name):
        if alias in node["annotations"].get(ALIASES, "").split(","):
            return _model(node).version
    return None


def _point(index: list[Descriptor], model: Resolved, aliases: Collection[str]) -> None:
    """Give the aliases to this version, and take them from all others."""
    for node in _versions(index, model.name):
        notes = node["annotations"]
        held = set(filter(None, notes.get(ALIASES, "").split(",")))
        here = notes[VERSION] == model.version
        held = held | set(aliases) if here else held - set(aliases)
        notes[ALIASES] = ",".join(sorted(held))


# --- the blobs ------------------------------------------------------------------


def _write_image(
    root: Path,
    model: Resolved,
    files: Mapping[str, memoryview],
    attestations: Mapping[str, bytes],
) -> Descriptor:
    layers = []
    for name, content in sorted(files.items()):
        layer = _write_blob(root, content)
        signature = name in SIGNATURE_FILES
        layer["mediaType"] = BUNDLE_TYPE if signature else "application/octet-stream"
        layer["annotations"] = {TITLE: name}
        layers.append(layer)
    image = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": EMPTY_TYPE, **_write_blob(root, memoryview(_EMPTY))},
        "layers": layers,
        # In here as well: what is copied to a registry of images has no index. With
        # other attestations it is another image: what refers to it there, stays.
        "annotations": {
            NAME: model.name,
            VERSION: model.version,
            DIGEST: model.digest,
            ATTESTED: _digest_of(attestations),
        },
    }
    text = json.dumps(image).encode()
    parse_layers(text, str(model.ref))  # or nobody could read it again
    descriptor = _write_blob(root, memoryview(text))
    descriptor["mediaType"] = IMAGE_MANIFEST_TYPE
    descriptor["artifactType"] = ARTIFACT_TYPE
    descriptor["annotations"] = {
        REF_NAME: f"{model.name}:{model.version}",
        NAME: model.name,
        VERSION: model.version,
        DIGEST: model.digest,
    }
    return descriptor


def _digest_of(attestations: Mapping[str, bytes]) -> str:
    """Return a digest of the attestations with their names."""
    named = sorted(attestations.items())
    digests = [(name, hashlib.sha256(raw).hexdigest()) for name, raw in named]
    return "sha256:" + hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _refer(
    root: Path,
    index: list[Descriptor],
    model: Resolved,
    image: Descriptor,
    attestations: Mapping[str, bytes],
) -> None:
    """List the attestations as referrers of the image manifest, and no others."""
    index[:] = [node for node in index if not refers_to(node, model)]
    subject = {key: image[key] for key in ("mediaType", "digest", "size")}
    for name, content in sorted(attestations.items()):
        layer = _write_blob(root, memoryview(content))
        referrer = {
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST_TYPE,
            "artifactType": BUNDLE_TYPE,
            "config": {
                "mediaType": EMPTY_TYPE,
                **_write_blob(root, memoryview(_EMPTY)),
            },
            "layers": [
                {
                    "mediaType": BUNDLE_TYPE,
                    **layer,
                    "annotations": {TITLE: file_of(name)},
                }
            ],
            "subject": subject,
        }
        descriptor = _write_blob(root, memoryview(json.dumps(referrer).encode()))
        descriptor["mediaType"] = IMAGE_MANIFEST_TYPE
        descriptor["artifactType"] = BUNDLE_TYPE
        descriptor["annotations"] = {
            OF: model.digest,
            FOR: f"{model.name}:{model.version}",
            ATTESTATION: name,
        }
        index.append(descriptor)


def _write_blob(root: Path, content: memoryview) -> Descriptor:
    digest = hashlib.sha256(content).hexdigest()
    path = root / "blobs" / "sha256" / digest
    if not _holds(path, digest):
        replace(path, content, mode=0o444)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def _holds(path: Path, digest: str) -> bool:
    """Tell whether a blob is there already and sound; a broken one is written anew."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest
