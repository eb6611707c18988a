"""A deployer's release, made in memory: it is held against the policy, then written.

So a release that is refused leaves the directory as it was, with an older release that
still holds.
"""

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from ztserve.artifacts.loading.model import VerifiedModel
from ztserve.artifacts.publish.attesting import attestation_bundle, verification_summary
from ztserve.artifacts.publish.signing import read_signed, release_statement
from ztserve.artifacts.publish.stamping import StatementSigner
from ztserve.artifacts.statements.attestation import VERIFICATION_SUMMARY, file_of
from ztserve.artifacts.statements.manifest import RELEASE_FILE
from ztserve.artifacts.statements.release import check_name
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.errors import ConfigError

SUMMARY = "verification-summary"
"""The name of the deployer's attestation."""


def stage_release(
    directory: str | os.PathLike[str],
    signer: StatementSigner,
    looked_at: VerifiedModel,
    trust: TrustPolicy,
    *,
    version: str,
    now: datetime,
) -> Mapping[str, bytes]:
    """Return release and verification summary of a model by file; nothing is written.

    `looked_at`: the model as `verify_model` gave it for purpose ``deploy``, released
    under its name. Judge it as a replica would, by a `DirectoryRegistry` that has it
    `staged`, then give it to `publish_staged`. Raises VerificationError where another
    model lies in the directory by now, ConfigError on a version that cannot be had.
    """
    check_name(looked_at.name, version, ConfigError)
    digest = read_signed(Path(directory), looked_at.digest).manifest.digest
    statement = release_statement(looked_at.name, version, digest)
    summary = verification_summary(looked_at, trust, version=version, now=now)
    file = file_of(SUMMARY)
    return {
        RELEASE_FILE: signer.envelope(statement),
        file: attestation_bundle(file, signer, digest, VERIFICATION_SUMMARY, summary),
    }
