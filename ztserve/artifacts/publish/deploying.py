"""Signing a deployment bundle: the deployer's half of `statements.deployment`."""

import os
from pathlib import Path

from ztserve.artifacts.deployment.judging import VerifiedDeployment, verify_deployment
from ztserve.artifacts.publish.atomic import replace
from ztserve.artifacts.publish.signing import statement
from ztserve.artifacts.publish.stamping import StatementSigner
from ztserve.artifacts.statements.deployment import (
    PREDICATE_TYPE,
    Deployment,
    predicate_of,
)
from ztserve.artifacts.statements.envelope import MAX_BUNDLE_BYTES
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.errors import VerificationError


def deployment_statement(deployment: Deployment) -> bytes:
    """Return the in-toto statement of what is to run, to be signed."""
    return statement(
        deployment.application,
        deployment.code.digest.removeprefix("sha256:"),
        PREDICATE_TYPE,
        predicate_of(deployment),
    )


def sign_deployment(
    deployment: Deployment,
    signer: StatementSigner,
    path: str | os.PathLike[str],
    *,
    trust: TrustPolicy,
) -> VerifiedDeployment:
    """Sign a deployment into the file `path`; return it as `trust` verifies it.

    Raises VerificationError, and writes nothing, where whatever serves would refuse it.
    """
    bundle = signer.envelope(deployment_statement(deployment))
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise VerificationError(
            f"{path} would have {len(bundle)} bytes; the limit is {MAX_BUNDLE_BYTES}: "
            "serve from a folder that holds the application's code alone"
        )
    signed = verify_deployment(bundle, trust, what=str(path))
    target = Path(path)
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    replace(target, bundle)
    return signed
