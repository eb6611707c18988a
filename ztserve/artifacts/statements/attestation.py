"""Attestations: what somebody else says of a manifest, beside its trainer's signature.

An in-toto Statement v1 whose one subject is the manifest: the SHA-256 of the signed
payload, under a name that no file of a model can bear, so that neither is taken for
the other. Three predicates are looked into, others are carried as they are.
Sources: in-toto attestation ``spec/predicates/test-result.md`` (v0.1) and
``spec/v1/resource_descriptor.md``; SLSA v1.1 ``verification_summary.md``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ztserve.artifacts.statements.envelope import (
    MAX_BUNDLE_BYTES,
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
    load_object,
)
from ztserve.errors import VerificationError

TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
VERIFICATION_SUMMARY = "https://slsa.dev/verification_summary/v1"
METRICS = "https://ztserve.dev/metrics/v1"
"""The annotation (in-toto: an extension field, so named by a URI) of a test's
configuration that holds ``{metric: {"value": x, "minimum": y, "maximum": z}}``."""
SUBJECT = "urn:ztserve:model-manifest"
"""The name of the subject; its colons keep it apart from every name of a file."""
FOLDER = "attestations"
MAX_ATTESTATIONS = 32
MAX_ATTESTATION_BYTES = 1 << 20
MAX_METRICS = 256
_FILE = re.compile(rf"{FOLDER}/([a-z0-9][a-z0-9._-]{{0,63}})\.sig\Z")
_METRIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}\Z")
_BOUNDS = ("minimum", "maximum")


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured value, and the thresholds that the evaluator held it against."""

    value: float
    minimum: float | None = None
    maximum: float | None = None

    @property
    def met(self) -> bool:
        """Whether the value lies within its thresholds, both inclusive."""
        return within(self.value, self.minimum, self.maximum)


@dataclass(frozen=True, slots=True)
class Attestation:
    """One statement about a manifest, as signed."""

    digest: str
    """``sha256:<hex>`` of the manifest that it speaks of."""
    predicate_type: str
    result: str = ""
    """PASSED, WARNED or FAILED where the predicate has a result, else empty."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    resource: str = ""
    """A verification summary's ``resourceUri``."""

    def __str__(self) -> str:
        """Say in a line what it attests: predicate, result, values."""
        values = [f"{name} {m.value:g}" for name, m in sorted(self.metrics.items())]
        return " ".join(
            filter(None, (self.predicate_type, self.result, ", ".join(values)))
        )


def within(value: float, minimum: float | None, maximum: float | None) -> bool:
    """Tell whether a value lies within its bounds, both inclusive."""
    return (minimum is None or value >= minimum) and (
        maximum is None or value <= maximum
    )


def file_of(name: str) -> str:
    """Return the file in which an attestation called `name` lies; raises Malformed."""
    file = f"{FOLDER}/{name}.sig"
    if not is_attestation(file):
        raise Malformed(
            f"{name!r} cannot be the name of an attestation: expected at most 64 lower "
            "case letters, digits and ._-, beginning with a letter or digit"
        )
    return file


def is_attestation(file: str) -> bool:
    """Tell whether a file beside a model is an attestation: attestations/NAME.sig."""
    return _FILE.match(file) is not None


def parse_attestation(envelope: Envelope) -> Attestation:
    """Parse a (verified) envelope's attestation; raises VerificationError."""
    try:
        statement = load_object(envelope.payload, limit=MAX_BUNDLE_BYTES)
        kind = get(statement, "predicateType", str)
        subject, predicate = parse_statement(envelope, kind)
        if subject.get("name") != SUBJECT:
            raise Malformed(
                f"the subject is called {subject.get('name')!r}, expected {SUBJECT!r}: "
                "an attestation speaks of a manifest, not of a file; make it with "
                "`ztserve attest`"
            )
        digest = "sha256:" + subject_digest(subject)
        return _parse_predicate(digest, kind, predicate)
    except Malformed as error:
        raise VerificationError(f"{envelope.what}: {error}") from error


def _parse_predicate(digest: str, kind: str, predicate: Object) -> Attestation:
    if kind == TEST_RESULT:
        return _parse_test_result(digest, predicate)
    if kind == VERIFICATION_SUMMARY:
        result = _result(predicate, "verificationResult", ("PASSED", "FAILED"))
        resource = get(predicate, "resourceUri", str)
        return Attestation(digest, kind, result=result, resource=resource)
    return Attestation(digest, kind)


def _parse_test_result(digest: str, predicate: Object) -> Attestation:
    """Read result and metrics; fields that in-toto does not define are ignored."""
    result = _result(predicate, "result", ("PASSED", "WARNED", "FAILED"))
    metrics: dict[str, Metric] = {}
    for descriptor in get_objects(predicate, "configuration", limit=MAX_METRICS):
        notes = as_object(descriptor.get("annotations", {}), "annotations")
        for name, node in as_object(notes.get(METRICS, {}), METRICS).items():
            if name in metrics:
                raise Malformed(f"the metric {name!r} is given twice")
            metrics[name] = parse_metric(name, as_object(node, f"metric {name!r}"))
        if len(metrics) > MAX_METRICS:
            raise Malformed(f"more than {MAX_METRICS} metrics")
    missed = sorted(name for name, metric in metrics.items() if not metric.met)
    failed = predicate.get("failedTests", [])
    if result == "PASSED" and (missed or failed):
        raise Malformed(
            f"its result is PASSED, yet it says itself that {missed or failed!r} failed"
        )
    return Attestation(digest, TEST_RESULT, result, MappingProxyType(metrics))


def parse_metric(name: str, node: Object) -> Metric:
    """Parse ``{"value": x, "minimum": y, "maximum": z}``; raises Malformed."""
    if not _METRIC.match(name):
        raise Malformed(f"{name!r} is no name of a metric")
    if "value" not in node:
        raise Malformed(f"the metric {name!r} has no value")
    return Metric(
        _number(node["value"], f"the value of {name!r}"),
        *(
            _number(node[bound], f"the {bound} of {name!r}") if bound in node else None
            for bound in _BOUNDS
        ),
    )


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed(f"{what} is not a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise Malformed(f"{what} is not finite") from error
    if not math.isfinite(number):
        raise Malformed(f"{what} is not finite")
    return number


def _result(predicate: Object, key: str, allowed: tuple[str, ...]) -> str:
    value = get(predicate, key, str)
    if value not in allowed:
        raise Malformed(f"{key} is {value!r}, expected one of {', '.join(allowed)}")
    return value


def resource_uri(name: str, version: str) -> str:
    """Return what a verification summary calls a model: ``urn:ztserve:...``."""
    return f"urn:ztserve:model:{name}:{version}"
