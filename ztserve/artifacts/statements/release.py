"""The release: the deployer's word that this manifest is that name and version.

Without it a lying registry could answer any name with any model that the trainer
ever signed. An in-toto statement of our own predicate type: in-toto's `release`
predicate names a package URL, not the name that a deployment asks for.
"""

from dataclasses import dataclass

from ztserve.artifacts.statements.envelope import (
    Envelope,
    parse_statement,
    subject_digest,
)
from ztserve.artifacts.statements.strict import Malformed, get, only
from ztserve.errors import ConfigError, VerificationError
from ztserve.types import ModelRef

PREDICATE_TYPE = "https://ztserve.dev/release/v1"


@dataclass(frozen=True, slots=True)
class Release:
    """Which name and version a manifest was released as."""

    name: str
    version: str
    digest: str
    """``sha256:<hex>`` of the manifest (`Manifest.digest`)."""


def parse_release(envelope: Envelope) -> Release:
    """Parse a (verified) envelope's release statement; raises VerificationError."""
    try:
        subject, predicate = parse_statement(envelope, PREDICATE_TYPE)
        only(predicate, ("name", "version"), "predicate")
        release = Release(
            name=get(predicate, "name", str),
            version=get(predicate, "version", str),
            digest="sha256:" + subject_digest(subject),
        )
        if get(subject, "name", str) != release.name:
            raise Malformed("the subject's name is not the released name")
    except Malformed as error:
        raise VerificationError(f"{envelope.what}: {error}") from error
    check_name(release.name, release.version, VerificationError)
    return release


def check_name(
    name: str, version: str, error: type[ConfigError] | type[VerificationError]
) -> None:
    """Raise `error` unless a model can be called ``name:version``."""
    try:
        ref = ModelRef(f"{name}:{version}")
    except ConfigError as cause:
        raise error(f"{name!r} {version!r} is no model name and version") from cause
    if (ref.name, ref.version) != (name, version):
        raise error(f"{name!r} {version!r} is no model name and version")


def check_release(release: Release, ref: ModelRef, digest: str) -> None:
    """Raise VerificationError unless the release answers exactly what was asked.

    `digest` is that of the manifest which was found and verified.
    """
    if release.name != ref.name:
        raise VerificationError(
            f"asked for model {ref.name!r}, but what was found is signed as "
            f"{release.name!r} version {release.version!r}: the registry (or alias) "
            "points at another model"
        )
    if ref.version is not None and release.version != ref.version:
        raise VerificationError(
            f"asked for {ref.name}:{ref.version}, but what was found is signed as "
            f"version {release.version!r}"
        )
    if release.digest != digest:
        raise VerificationError(
            f"release.sig releases {release.digest}, but the manifest is {digest}: "
            "release this model with `ztserve publish`"
        )
