"""The manifest: which files a model has, and the digest of each.

The predicate of OpenSSF Model Signing v1.0, read strictly. The model's identity is
the SHA-256 of the whole signed statement: the format's own root digest covers the
contents but not the names of files.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ztserve.artifacts.statements.attestation import FOLDER as ATTESTATIONS
from ztserve.artifacts.statements.attestation import is_attestation
from ztserve.artifacts.statements.envelope import (
    Envelope,
    parse_statement,
    subject_digest,
)
from ztserve.artifacts.statements.serialization import (
    Serialization,
    parse_serialization,
    parse_shard_name,
)
from ztserve.artifacts.statements.strict import (
    Malformed,
    Object,
    as_object,
    get,
    get_objects,
    only,
)
from ztserve.errors import VerificationError

PREDICATE_TYPE = "https://model_signing/signature/v1.0"
SIGNATURE_FILE = "model.sig"
RELEASE_FILE = "release.sig"
SIGNATURE_FILES = frozenset({SIGNATURE_FILE, RELEASE_FILE})
IGNORABLE = SIGNATURE_FILES | {
    ATTESTATIONS,
    ".git",
    ".gitattributes",
    ".github",
    ".gitignore",
}
"""What `ignore_paths` may list. Beside signatures and attestations nothing is in fact
ignored: an unsigned ``.git`` is refused as any other unsigned file."""
MAX_FILES = 10_000
MAX_RESOURCES = 1 << 16
"""Of shards; as many as the size of a bundle has room for."""
MAX_DEPTH = 16
_COMPONENT = re.compile(r"[A-Za-z0-9_+=@-][A-Za-z0-9_.+=@ -]{0,254}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class SignedFile:
    """One file of a model, as signed."""

    digests: tuple[str, ...]
    """Hex digits: of the whole file, or of each of its shards in order."""
    size: int | None
    """Bytes, where the manifest says so: only shards do."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one model, as signed."""

    digest: str
    """``sha256:<hex>`` of the signed statement: the identity of the model."""
    serialization: Serialization
    files: Mapping[str, SignedFile]
    """By name (relative, ``/``-separated)."""


def parse_manifest(envelope: Envelope) -> Manifest:
    """Parse a (verified) envelope's statement; raises VerificationError."""
    try:
        subject, predicate = parse_statement(envelope, PREDICATE_TYPE)
        node = as_object(get(predicate, "serialization", dict), "serialization")
        serialization = parse_serialization(node)
        check_ignored(node)
        sharded = serialization.method == "shards"
        limit = MAX_RESOURCES if sharded else MAX_FILES
        digests = _parse_digests(
            get_objects(predicate, "resources", limit=limit), serialization
        )
        files = _join(digests, serialization) if sharded else _whole(digests)
        if len(files) > MAX_FILES:
            raise Malformed(f"{len(files)} files; the limit is {MAX_FILES}")
        check_names(files)
        if root_digest(digests.values()) != subject_digest(subject):
            raise Malformed("the subject's digest is not that of the resources")
    except Malformed as error:
        raise VerificationError(f"{envelope.what}: {error}") from error
    return Manifest(envelope.digest, serialization, MappingProxyType(files))


def check_ignored(node: Object) -> None:
    """Raise Malformed where the signer left files of the model unsigned."""
    for path in get(node, "ignore_paths", list) if "ignore_paths" in node else []:
        if path not in IGNORABLE:
            raise Malformed(f"ignore_paths leaves {path!r} unsigned: sign every file")


def is_statement(name: str) -> bool:
    """Tell whether a file beside a model's own is a signature or an attestation."""
    return name in SIGNATURE_FILES or is_attestation(name)


def root_digest(digests: Iterable[str]) -> str:
    """Return the hex SHA-256 over the raw digests, in the order of the statement."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _parse_digests(
    resources: Collection[Object], serialization: Serialization
) -> dict[str, str]:
    """Return the digests by the resources' names, in their order."""
    digests: dict[str, str] = {}
    for resource in resources:
        only(resource, ("name", "algorithm", "digest"), "a resource")
        name, digest = get(resource, "name", str), get(resource, "digest", str)
        if get(resource, "algorithm", str) not in serialization.algorithms:
            expected = " or ".join(serialization.algorithms)
            raise Malformed(f"the digest of {name!r} is not {expected}")
        if not _DIGEST.match(digest):
            raise Malformed(f"the digest of {name!r} is not 64 lower-case hex digits")
        if name in digests:
            raise Malformed(f"{name!r} is listed twice")
        digests[name] = digest
    return digests


def _whole(digests: Mapping[str, str]) -> dict[str, SignedFile]:
    return {name: SignedFile((digest,), None) for name, digest in digests.items()}


def _join(
    digests: Mapping[str, str], serialization: Serialization
) -> dict[str, SignedFile]:
    """Put the shards of each file together: they cover it once, in order, to its end.

    All have the size that the manifest declares, but the last, which may be shorter.
    """
    found: dict[str, list[str]] = {}
    ends: dict[str, int] = {}
    step = serialization.shard_size or 0
    before = None
    for name, digest in digests.items():
        file, (start, end) = parse_shard_name(name)
        if file != before and file in found:
            raise Malformed(f"the shards of {file!r} do not stand together")
        check_tile(name, (start, end), ends.get(file, 0), step)
        found.setdefault(file, []).append(digest)
        ends[file], before = end, file
    return {
        file: SignedFile(tuple(shards), ends[file]) for file, shards in found.items()
    }


def check_tile(name: str, span: tuple[int, int], covered: int, step: int) -> None:
    """Raise Malformed unless a shard goes on where the `covered` bytes of a file end.

    `step`: bytes of each shard; behind a shorter one there is no other.
    """
    start, end = span
    if start != covered or start % step:
        raise Malformed(
            f"the shard {name!r} leaves a gap, overlaps or follows a short one: the "
            f"shards before it end at byte {covered}, each has {step} bytes"
        )
    if not 0 < end - start <= step:
        raise Malformed(f"the shard {name!r} has not 1 to {step} bytes")


def check_names(names: Collection[str]) -> None:
    """Raise Malformed unless all are canonical names of a model's files.

    Canonical: relative, ASCII, ``/``-separated components that are neither empty nor
    hidden (so neither ``.`` nor ``..``) and no file is also a folder.
    """
    if not names:
        raise Malformed("no file is signed")
    folders: set[str] = set()
    for name in names:
        parts = name.split("/")
        if len(parts) > MAX_DEPTH or not all(_COMPONENT.match(part) for part in parts):
            raise Malformed(
                f"the file name {name!r} is not canonical: expected a plain relative "
                "name of ASCII letters, digits and _.+=@- without hidden parts"
            )
        if name in SIGNATURE_FILES or parts[0] == ATTESTATIONS:
            raise Malformed(f"{name!r} cannot be a file of the model")
        folders.update("/".join(parts[:n]) for n in range(1, len(parts)))
    both = folders & set(names)
    if both:
        raise Malformed(f"{min(both)!r} is listed both as a file and as a folder")
