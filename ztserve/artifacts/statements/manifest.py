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

from ztserve.artifacts.statements.envelope import (
    Envelope,
    parse_statement,
    subject_digest,
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
IGNORABLE = SIGNATURE_FILES | {".git", ".gitattributes", ".github", ".gitignore"}
"""What `ignore_paths` may list. Beside the two signature files nothing is in fact
ignored: an unsigned ``.git`` is refused as any other unsigned file."""
MAX_FILES = 10_000
MAX_DEPTH = 16
_COMPONENT = re.compile(r"[A-Za-z0-9_+=@-][A-Za-z0-9_.+=@ -]{0,254}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one model, as signed."""

    digest: str
    """``sha256:<hex>`` of the signed statement: the identity of the model."""
    files: Mapping[str, str]
    """File name (relative, ``/``-separated) to hex SHA-256 of its content."""


def parse_manifest(envelope: Envelope) -> Manifest:
    """Parse a (verified) envelope's statement; raises VerificationError."""
    try:
        subject, predicate = parse_statement(envelope, PREDICATE_TYPE)
        _check_serialization(
            as_object(get(predicate, "serialization", dict), "serialization")
        )
        files = _parse_files(get_objects(predicate, "resources", limit=MAX_FILES))
        if root_digest(files.values()) != subject_digest(subject):
            raise Malformed("the subject's digest is not that of the resources")
    except Malformed as error:
        raise VerificationError(f"{envelope.what}: {error}") from error
    return Manifest(envelope.digest, MappingProxyType(files))


def root_digest(digests: Iterable[str]) -> str:
    """Return the hex SHA-256 over the raw digests, in the order of the statement."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _check_serialization(node: Object) -> None:
    method, hashing = get(node, "method", str), get(node, "hash_type", str)
    if method != "files":
        raise Malformed(
            f"serialization method {method!r} is not supported: sign with "
            "method 'files'"
        )
    only(
        node,
        ("method", "hash_type", "allow_symlinks", "ignore_paths"),
        "serialization",
    )
    if hashing != "sha256":
        raise Malformed(f"hash_type {hashing!r} is not supported: sign with 'sha256'")
    if get(node, "allow_symlinks", bool):
        raise Malformed("allow_symlinks must be false: a link's target is not signed")
    for path in get(node, "ignore_paths", list) if "ignore_paths" in node else []:
        if path not in IGNORABLE:
            raise Malformed(f"ignore_paths leaves {path!r} unsigned: sign every file")


def _parse_files(resources: Collection[Object]) -> dict[str, str]:
    files: dict[str, str] = {}
    for resource in resources:
        only(resource, ("name", "algorithm", "digest"), "a resource")
        name, digest = get(resource, "name", str), get(resource, "digest", str)
        if get(resource, "algorithm", str) != "sha256":
            raise Malformed(f"the digest of {name!r} is not sha256")
        if not _DIGEST.match(digest):
            raise Malformed(f"the digest of {name!r} is not 64 lower-case hex digits")
        if name in files:
            raise Malformed(f"the file {name!r} is listed twice")
        files[name] = digest
    check_names(files)
    return files


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
        if name in SIGNATURE_FILES:
            raise Malformed(f"{name!r} cannot be a file of the model")
        folders.update("/".join(parts[:n]) for n in range(1, len(parts)))
    both = folders & set(names)
    if both:
        raise Malformed(f"{min(both)!r} is listed both as a file and as a folder")
