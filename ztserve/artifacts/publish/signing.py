"""Signing: the trainer's manifest of a directory, and the deployer's release of it.

Whatever `verify_model` would refuse to load is refused here too, before anybody puts
a name to it. Files are read as the loader reads them, into memory.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ztserve.artifacts.loading.buffers import Buffer, read_all
from ztserve.artifacts.loading.content import check_contents, check_suffixes
from ztserve.artifacts.loading.loader import (
    check_closed,
    check_digests,
    check_sizes,
)
from ztserve.artifacts.publish.atomic import replace
from ztserve.artifacts.publish.stamping import StatementSigner
from ztserve.artifacts.registry.directory import DirectoryRegistry, model_files
from ztserve.artifacts.registry.files import list_files, open_file
from ztserve.artifacts.statements.attestation import is_attestation
from ztserve.artifacts.statements.envelope import STATEMENT_TYPE, parse_envelope
from ztserve.artifacts.statements.manifest import (
    IGNORABLE,
    MAX_RESOURCES,
    PREDICATE_TYPE,
    RELEASE_FILE,
    SIGNATURE_FILE,
    Manifest,
    check_names,
    parse_manifest,
    root_digest,
)
from ztserve.artifacts.statements.release import PREDICATE_TYPE as RELEASE_TYPE
from ztserve.artifacts.statements.release import check_name
from ztserve.artifacts.statements.serialization import (
    WHOLE_FILES,
    HashType,
    Serialization,
    parse_shard_name,
)
from ztserve.artifacts.statements.strict import Malformed
from ztserve.artifacts.trust.terms import POLICY_TYPE
from ztserve.errors import ConfigError, VerificationError

SHARD_BYTES = 64 << 20
SHARDS_FROM_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SignedDirectory:
    """A directory whose files are those of its (unjudged) signature."""

    manifest: Manifest
    signature: bytes
    buffers: Mapping[str, Buffer]


def sign_model(
    directory: str | os.PathLike[str],
    signer: StatementSigner,
    *,
    name: str | None = None,
    serialization: Serialization | None = None,
) -> Path:
    """Sign all files of a directory; return the path of the signature (model.sig).

    An OpenSSF Model Signing v1.0 bundle; `name` (default: the directory's) is for
    people and is part of the model's identity. `serialization` (default: SHA-256, see
    `choose_serialization`) says what is hashed. Replaces an older signature, and
    removes the release and attestations of another manifest. Raises VerificationError
    on a file that could not be served, RegistryError where the directory cannot be
    read.
    """
    root = Path(directory)
    sizes = model_files(root)
    how = choose_serialization(sizes) if serialization is None else serialization
    try:
        check_names(sizes)
        check_shards(sizes, how)
    except Malformed as error:
        raise VerificationError(f"{root} cannot be signed: {error}") from error
    check_suffixes(sizes)
    buffers = read_all(lambda file: open_file(root, file), sizes, serialization=how)
    check_contents({file: buffer.view for file, buffer in buffers.items()})
    bundle = signer.envelope(
        model_statement(
            root.resolve().name if name is None else name,
            _resources(buffers, how),
            serialization=how,
        )
    )
    parse_manifest(parse_envelope(bundle, what=SIGNATURE_FILE))  # else nobody reads it
    (root / RELEASE_FILE).unlink(missing_ok=True)
    for file in filter(is_attestation, list_files(root)):
        (root / file).unlink()
    replace(root / SIGNATURE_FILE, bundle)
    return root / SIGNATURE_FILE


def choose_serialization(
    sizes: Mapping[str, int], hash_type: HashType = "sha256"
) -> Serialization:
    """Return how files of these sizes in bytes load fastest.

    Shards of `SHARD_BYTES` where a file is larger than `SHARDS_FROM_BYTES`, so that
    all cores hash it; whole files else, and where one is empty (it has no shard).
    """
    large = any(size > SHARDS_FROM_BYTES for size in sizes.values())
    sharded = large and all(sizes.values())
    return Serialization(hash_type, SHARD_BYTES if sharded else None)


def check_shards(sizes: Mapping[str, int], serialization: Serialization) -> None:
    """Raise Malformed where a file would have no shard, or all of them too many.

    An empty file is in no manifest of shards: it could come and go unnoticed.
    """
    step = serialization.shard_size
    if step is None:
        return
    empty = sorted(name for name, size in sizes.items() if size == 0)
    if empty:
        raise Malformed(
            f"{empty[0]!r} is empty, and an empty file has no shard that could be "
            "signed: remove it, or sign with method 'files'"
        )
    shards = sum(-(-size // step) for size in sizes.values())
    if shards > MAX_RESOURCES:
        raise Malformed(
            f"{shards} shards of {step} bytes; the limit is {MAX_RESOURCES}: sign "
            "with a larger shard size"
        )


def _resources(buffers: Mapping[str, Buffer], how: Serialization) -> dict[str, str]:
    return {
        how.resource(file, span): digest
        for file, buffer in buffers.items()
        for span, digest in zip(
            how.spans(len(buffer.view)), buffer.digests, strict=True
        )
    }


def release_model(
    directory: str | os.PathLike[str],
    signer: StatementSigner,
    *,
    name: str,
    version: str,
    digest: str | None = None,
) -> Path:
    """Release a signed directory as ``name:version``; return the path (release.sig).

    Checks that the files are those of the manifest, not whose signature it bears: a
    deployer calls ``verify_model(..., purpose="deploy")`` first, and gives the `digest`
    that this looked at, lest another model lie there by now. Raises ConfigError
    on a name or version that cannot be asked for, else as `sign_model`.
    """
    check_name(name, version, ConfigError)
    root = Path(directory)
    found = read_signed(root, digest).manifest.digest
    replace(
        root / RELEASE_FILE, signer.envelope(release_statement(name, version, found))
    )
    return root / RELEASE_FILE


def sign_policy(
    path: str | os.PathLike[str],
    root_key: StatementSigner,
    *,
    text: bytes | None = None,
) -> Path:
    """Sign a trust policy under its root key; return the path (``<path>.sig``).

    `text`: what was checked of it (`TrustPolicy.check_signable`), so that this very
    text is signed; default: what the file holds now.
    """
    policy = Path(path)
    signature = policy.with_name(policy.name + ".sig")
    signed = policy.read_bytes() if text is None else text
    replace(signature, root_key.envelope(signed, payload_type=POLICY_TYPE))
    return signature


def read_signed(root: Path, digest: str | None = None) -> SignedDirectory:
    """Read a directory and hold it against its own model.sig.

    `digest` is that of the manifest which the caller means, if not whichever is there.
    Raises VerificationError where they differ, or hold what cannot be served.
    """
    source = DirectoryRegistry(root)
    signature = source.read_signature()
    manifest = parse_manifest(parse_envelope(signature, what=SIGNATURE_FILE))
    check_meant(root, manifest, digest)
    listed = model_files(root)
    check_closed(manifest, listed)
    check_suffixes(listed)
    check_sizes(manifest, listed)
    buffers = read_all(
        lambda file: open_file(root, file),
        listed,
        serialization=manifest.serialization,
    )
    check_digests(manifest, buffers)
    check_contents({file: buffer.view for file, buffer in buffers.items()})
    return SignedDirectory(manifest, signature, buffers)


def check_meant(root: Path, manifest: Manifest, digest: str | None) -> None:
    """Raise VerificationError where a directory holds another model than was meant."""
    if digest is not None and manifest.digest != digest:
        raise VerificationError(
            f"{root} holds the model {manifest.digest} now, not {digest}, which was "
            "looked at: somebody signed it anew meanwhile; look at it again"
        )


def model_statement(
    name: str,
    resources: Mapping[str, str],
    *,
    serialization: Serialization = WHOLE_FILES,
) -> bytes:
    """Return the in-toto statement over a model's digests, to be signed.

    `resources`: file, or ``file:start:end`` of a shard, to hex digest. Equal resources
    and name give equal bytes, thus the same model identity.
    """
    ordered = sorted(resources, key=lambda resource: _place(resource, serialization))
    listed = [
        {
            "name": resource,
            "algorithm": serialization.algorithms[0],
            "digest": resources[resource],
        }
        for resource in ordered
    ]
    shard_size = serialization.shard_size
    predicate = {
        "serialization": {
            "method": serialization.method,
            "hash_type": serialization.hash_type,
            "allow_symlinks": False,
            "ignore_paths": sorted(IGNORABLE),
            **({} if shard_size is None else {"shard_size": shard_size}),
        },
        "resources": listed,
    }
    root = root_digest(resources[resource] for resource in ordered)
    return statement(name, root, PREDICATE_TYPE, predicate)


def _place(resource: str, how: Serialization) -> tuple[tuple[str, ...], int]:
    """Return the order of model-signing: by path components, not by characters."""
    if how.shard_size is None:
        return PurePosixPath(resource).parts, 0
    file, (start, _) = parse_shard_name(resource)
    return PurePosixPath(file).parts, start


def release_statement(name: str, version: str, digest: str) -> bytes:
    """Return the in-toto statement that the manifest `digest` is ``name:version``."""
    predicate = {"name": name, "version": version}
    return statement(name, digest.removeprefix("sha256:"), RELEASE_TYPE, predicate)


def statement(
    name: str, sha256: str, predicate_type: str, predicate: Mapping[str, object]
) -> bytes:
    """Return an in-toto Statement v1 about one subject, to be signed."""
    node = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256}}],
        "predicateType": predicate_type,
        "predicate": predicate,
    }
    return json.dumps(node, sort_keys=True).encode()
