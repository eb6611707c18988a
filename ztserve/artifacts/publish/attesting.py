"""Attesting: what an evaluator, or a deployer, says of a signed directory.

The writing half of `statements.attestation`; the same sources.
"""

import base64
import json
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from ztserve.artifacts.loading.model import VerifiedModel
from ztserve.artifacts.publish.atomic import replace
from ztserve.artifacts.publish.signing import read_signed, statement
from ztserve.artifacts.publish.stamping import StatementSigner
from ztserve.artifacts.statements.attestation import (
    FOLDER,
    MAX_ATTESTATION_BYTES,
    METRICS,
    SUBJECT,
    Metric,
    file_of,
    parse_attestation,
    resource_uri,
)
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.manifest import SIGNATURE_FILE
from ztserve.artifacts.statements.strict import Malformed, load_object
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.errors import ConfigError, VerificationError

Predicate: TypeAlias = Mapping[str, object]
VERIFIER = "https://ztserve.dev/verify"
VERIFIED_LEVEL = "ZTSERVE_DEPLOY"
"""No SLSA level: ztserve does not judge how a model was built (SLSA v1.1 allows
levels of one's own that do not begin with ``SLSA_``)."""


def attest_model(
    directory: str | os.PathLike[str],
    signer: StatementSigner,
    *,
    name: str,
    predicate_type: str,
    predicate: Predicate,
    digest: str | None = None,
) -> Path:
    """Attest a signed directory; return the path (attestations/NAME.sig).

    The predicate is carried as it is; one that `verify_model` would not understand is
    refused. An older attestation of this name is replaced. Checks that the files are
    those of the manifest, not whose signature it bears; `digest`: of the manifest that
    is meant, where it could be another by now. Raises VerificationError, and
    ConfigError on a name that cannot be one.
    """
    root = Path(directory)
    try:
        file = file_of(name)
    except Malformed as error:
        raise ConfigError(str(error)) from error
    found = read_signed(root, digest).manifest.digest
    bundle = attestation_bundle(file, signer, found, predicate_type, predicate)
    (root / FOLDER).mkdir(exist_ok=True)
    replace(root / file, bundle)
    return root / file


def attestation_bundle(
    file: str,
    signer: StatementSigner,
    digest: str,
    predicate_type: str,
    predicate: Predicate,
) -> bytes:
    """Return the bundle that attests the manifest `digest`, to be written to `file`.

    Raises VerificationError where `verify_model` would not understand it.
    """
    bundle = signer.envelope(attestation_statement(digest, predicate_type, predicate))
    if len(bundle) > MAX_ATTESTATION_BYTES:
        raise VerificationError(
            f"{file} would have {len(bundle)} bytes; the limit is "
            f"{MAX_ATTESTATION_BYTES}: attest a digest of the large part"
        )
    parse_attestation(parse_envelope(bundle, what=file))
    return bundle


def parse_predicate(raw: bytes, where: str) -> Predicate:
    """Parse a predicate, a JSON object of at most 1 MiB; ConfigError."""
    try:
        return load_object(raw, limit=MAX_ATTESTATION_BYTES)
    except Malformed as error:
        raise ConfigError(f"{where} is no predicate: {error}") from error


def attestation_statement(
    digest: str, predicate_type: str, predicate: Predicate
) -> bytes:
    """Return the in-toto statement of a predicate about the manifest `digest`."""
    return statement(SUBJECT, digest.removeprefix("sha256:"), predicate_type, predicate)


def result_predicate(
    metrics: Mapping[str, Metric],
    *,
    result: str | None = None,
    configuration: Iterable[Mapping[str, object]] = (),
) -> dict[str, object]:
    """Return an in-toto test-result predicate; each metric is one test.

    `result` is PASSED where every metric is within its thresholds, else FAILED, unless
    given. `configuration`: more resource descriptors, such as of the data.
    """
    failed = sorted(name for name, metric in metrics.items() if not metric.met)
    values = {name: _node(metric) for name, metric in sorted(metrics.items())}
    thresholds = {
        name: {bound: limit for bound, limit in node.items() if bound != "value"}
        for name, node in values.items()
    }
    content = json.dumps(thresholds, sort_keys=True).encode()
    return {
        "result": result or ("FAILED" if failed else "PASSED"),
        "configuration": [
            {
                "name": "thresholds.json",
                "mediaType": "application/json",
                "content": base64.b64encode(content).decode(),
                "annotations": {METRICS: values},
            },
            *configuration,
        ],
        "passedTests": sorted(set(metrics) - set(failed)),
        "failedTests": failed,
    }


def _node(metric: Metric) -> dict[str, float]:
    node = {"value": metric.value}
    if metric.minimum is not None:
        node["minimum"] = metric.minimum
    if metric.maximum is not None:
        node["maximum"] = metric.maximum
    return node


def verification_summary(
    model: VerifiedModel, trust: TrustPolicy, *, version: str, now: datetime
) -> dict[str, object]:
    """Return a SLSA verification summary of a model verified for deployment.

    `version` is the one that it is to be released as.
    """
    inputs = {SIGNATURE_FILE: model.evidence.signature} | {
        file_of(name): raw for name, raw in model.evidence.attestations.items()
    }
    return {
        "verifier": {"id": VERIFIER},
        "timeVerified": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "resourceUri": resource_uri(model.name, version),
        "policy": {
            "uri": f"urn:ztserve:trust-policy:{trust.version}",
            "digest": {"sha256": trust.digest.removeprefix("sha256:")},
        },
        "inputAttestations": [
            {
                "uri": f"urn:ztserve:statement:{file}",
                "digest": {"sha256": _payload_digest(raw, file)},
            }
            for file, raw in sorted(inputs.items())
        ],
        "verificationResult": "PASSED",
        "verifiedLevels": [VERIFIED_LEVEL],
        "slsaVersion": "1.1",
    }


def _payload_digest(raw: bytes, file: str) -> str:
    """Return the digest of what is signed: a signature can be rewritten by anyone."""
    return parse_envelope(raw, what=file).digest.removeprefix("sha256:")
