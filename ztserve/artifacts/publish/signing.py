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
from ztserve.artifacts.loading.loader import check_closed, check_digests
from ztserve.artifacts.publish.atomic import replace
from ztserve.artifacts.publish.keys import SigningKey
from ztserve.artifacts.registry.directory import DirectoryRegistry, model_files
from ztserve.artifacts.registry.files import open_file
from ztserve.artifacts.statements.envelope import STATEMENT_TYPE, parse_envelope
from ztserve.artifacts.statements.manifest import (
    IGNORABLE,
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
from ztserve.artifacts.statements.strict import Malformed
from ztserve.artifacts.trust.policy import POLICY_TYPE
from ztserve.errors import ConfigError, VerificationError


@dataclass(frozen=True, slots=True)
class SignedDirectory:
    """A directory whose files are those of its (unjudged) signature."""

    manifest: Manifest
    signature: bytes
    buffers: Mapping[str, Buffer]


def sign_model(
    directory: str | os.PathLike[str], signer: SigningKey, *, name: str | None = None
) -> Path:
    """Sign all files of a directory; return the path of the signature (model.sig).

    An OpenSSF Model Signing v1.0 bundle; `name` (default: the directory's) is for
    people and is part of the model's identity. Replaces an older signature, and
    removes the release of another manifest. Raises VerificationError on a file that
    could not be served, RegistryError where the directory cannot be read.
    """
    root = Path(directory)
    sizes = model_files(root)
    try:
        check_names(sizes)
    except Malformed as error:
        raise VerificationError(f"{root} cannot be signed: {error}") from error
    check_suffixes(sizes)
    buffers = read_all(lambda file: open_file(root, file), sizes)
    check_contents({file: buffer.view for file, buffer in buffers.items()})
    statement = model_statement(
        root.resolve().name if name is None else name,
        {file: buffer.sha256 for file, buffer in buffers.items()},
    )
    (root / RELEASE_FILE).unlink(missing_ok=True)
    replace(root / SIGNATURE_FILE, signer.envelope(statement))
    return root / SIGNATURE_FILE


def release_model(
    directory: str | os.PathLike[str], signer: SigningKey, *, name: str, version: str
) -> Path:
    """Release a signed directory as ``name:version``; return the path (release.sig).

    Checks that the files are those of the manifest, not whose signature it bears: a
    deployer calls ``verify_model(..., purpose="deploy")`` first. Raises ConfigError
    on a name or version that cannot be asked for, else as `sign_model`.
    """
    check_name(name, version, ConfigError)
    root = Path(directory)
    digest = read_signed(root).manifest.digest
    replace(
        root / RELEASE_FILE, signer.envelope(release_statement(name, version, digest))
    )
    return root / RELEASE_FILE


def sign_policy(path: str | os.PathLike[str], root_key: SigningKey) -> Path:
    """Sign a trust policy under its root key; return the path (``<path>.sig``)."""
    policy = Path(path)
    signature = policy.with_name(policy.name + ".sig")
    replace(signature, root_key.envelope(policy.read_bytes(), payload_type=POLICY_TYPE))
    return signature


def read_signed(root: Path) -> SignedDirectory:
    """Read a directory and hold it against its own model.sig.

    Raises VerificationError where they differ, or hold what cannot be served.
    """
    source = DirectoryRegistry(root)
    signature = source.read_signature()
    manifest = parse_manifest(parse_envelope(signature, what=SIGNATURE_FILE))
    listed = model_files(root)
    check_closed(manifest, listed)
    check_suffixes(listed)
    buffers = read_all(lambda file: open_file(root, file), listed)
    check_digests(manifest, buffers)
    check_contents({file: buffer.view for file, buffer in buffers.items()})
    return SignedDirectory(manifest, signature, buffers)


def model_statement(name: str, files: Mapping[str, str]) -> bytes:
    """Return the in-toto statement over files (name to hex SHA-256) to be signed.

    Equal files and name give equal bytes, thus the same model identity.
    """
    # The order of model-signing: by path components, not by characters.
    ordered = sorted(files, key=lambda file: PurePosixPath(file).parts)
    resources = [
        {"name": file, "algorithm": "sha256", "digest": files[file]} for file in ordered
    ]
    predicate = {
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": sorted(IGNORABLE),
        },
        "resources": resources,
    }
    root = root_digest(files[file] for file in ordered)
    return _statement(name, root, PREDICATE_TYPE, predicate)


def release_statement(name: str, version: str, digest: str) -> bytes:
    """Return the in-toto statement that the manifest `digest` is ``name:version``."""
    predicate = {"name": name, "version": version}
    return _statement(name, digest.removeprefix("sha256:"), RELEASE_TYPE, predicate)


def _statement(
    name: str, sha256: str, predicate_type: str, predicate: Mapping[str, object]
) -> bytes:
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256}}],
        "predicateType": predicate_type,
        "predicate": predicate,
    }
    return json.dumps(statement, sort_keys=True).encode()
