"""Judging what a registry gave of a model's statements: no I/O, each step raises.

The statements stay with the model (`Evidence`), so that a replica can judge them anew
when its trust policy changes, without asking the registry.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, TypeAlias

from ztserve.artifacts.registry.protocol import Registry, Resolved
from ztserve.artifacts.statements.attestation import (
    VERIFICATION_SUMMARY,
    Attestation,
    file_of,
    parse_attestation,
    resource_uri,
)
from ztserve.artifacts.statements.envelope import Envelope, parse_envelope
from ztserve.artifacts.statements.manifest import (
    RELEASE_FILE,
    SIGNATURE_FILE,
    Manifest,
    parse_manifest,
)
from ztserve.artifacts.statements.release import Release, check_release, parse_release
from ztserve.artifacts.statements.strict import Malformed
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.artifacts.trust.requirements import Requirement
from ztserve.artifacts.trust.signers import ROLES, Role, SignedBy
from ztserve.errors import VerificationError
from ztserve.types import ModelRef

Purpose: TypeAlias = Literal["load", "deploy"]
_MEND: Mapping[Role, str] = {
    "trainer": "sign the model with a trainer's key that the policy names: "
    "`ztserve sign`",
    "evaluator": "attest it with an evaluator's key that the policy names: "
    "`ztserve attest`",
    "deployer": "release it with a deployer's key that the policy names: "
    "`ztserve publish`",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """The statements that a registry gave of one model; nothing is verified."""

    found: Resolved
    signature: bytes
    release: bytes | None = None
    attestations: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked, for people and programs to read."""

    stage: str
    """sign, attest, deploy or load: whose work it holds to account."""
    checked: str
    by: SignedBy | None
    """Who signed it; None where nobody has to."""
    rule: str
    """Of the trust policy, or of ztserve where it needs none."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What the statements prove under one trust policy."""

    manifest: Manifest
    release: Release | None
    signers: tuple[SignedBy, ...]
    checks: tuple[Check, ...]


def gather(
    registry: Registry,
    found: Resolved,
    trust: TrustPolicy,
    *,
    now: datetime,
    purpose: Purpose,
) -> Evidence:
    """Read a model's statements, the others only once the trainer's holds.

    Raises VerificationError where it does not, or one is lacking, and as the registry.
    """
    evidence = Evidence(found, registry.signature(found))
    _manifest(evidence, trust, now)
    return replace(
        evidence,
        release=registry.release(found) if purpose == "load" else None,
        attestations=registry.attestations(found),
    )


def judge(
    evidence: Evidence,
    ref: ModelRef,
    trust: TrustPolicy,
    *,
    now: datetime,
    purpose: Purpose = "load",
) -> Judged:
    """Hold the statements against the policy; raises VerificationError.

    Manifest, release (not for purpose ``deploy``), oldest version allowed, what is
    required. One identity acts in one role for a model, whatever roles it has.
    """
    manifest, trainer = _manifest(evidence, trust, now)
    checks = [
        Check("sign", f"manifest {manifest.digest}", trainer, _rule(trust, "trainer"))
    ]
    acting: dict[str, Role] = {trainer.name: "trainer"}
    release, version = None, ref.version or evidence.found.version
    if purpose == "load":
        release, deployer = _release(evidence, ref, trust, now)
        version = release.version
        with _stage("deploy", "one identity, one role"):
            check_separate(acting, deployer, RELEASE_FILE)
        acting[deployer.name] = "deployer"
        released = f"released as {release.name}:{release.version}"
        checks.append(Check("deploy", released, deployer, _rule(trust, "deployer")))
    if ref.name in trust.min_versions and version:
        with _stage("load", f"trust policy {trust.version}, min_versions"):
            trust.check_version(ref.name, version)
        rule = f"min_versions.{ref.name} = {trust.min_versions[ref.name]}"
        checks.append(Check("load", f"version {version}", None, rule))
    checks += _required(evidence, ref, release, trust, acting, now, purpose)
    signers = dict.fromkeys(check.by for check in checks if check.by is not None)
    return Judged(manifest, release, tuple(signers), tuple(checks))


def _manifest(
    evidence: Evidence, trust: TrustPolicy, now: datetime
) -> tuple[Manifest, SignedBy]:
    with _stage("sign", _rule(trust, "trainer")):
        envelope = parse_envelope(evidence.signature, what=SIGNATURE_FILE)
        trainer = _signed(trust, envelope, "trainer", now)
        manifest = parse_manifest(envelope)
        if manifest.digest != evidence.found.digest:
            raise VerificationError(
                f"the registry promised {evidence.found.name}@{evidence.found.digest}, "
                f"but its manifest is {manifest.digest}: publish the model again"
            )
    with _stage("load", f"trust policy {trust.version}, [revoked]"):
        trust.check_not_revoked(manifest.digest)
    return manifest, trainer


def _release(
    evidence: Evidence, ref: ModelRef, trust: TrustPolicy, now: datetime
) -> tuple[Release, SignedBy]:
    if evidence.release is None:
        raise VerificationError(
            f"{ref} has no {RELEASE_FILE}: release it with `ztserve publish`"
        )
    with _stage("deploy", _rule(trust, "deployer")):
        envelope = parse_envelope(evidence.release, what=RELEASE_FILE)
        deployer = _signed(trust, envelope, "deployer", now)
        release = parse_release(envelope)
        check_release(release, ref, evidence.found.digest)
    return release, deployer


# --- attestations ---------------------------------------------------------------


def _required(
    evidence: Evidence,
    ref: ModelRef,
    release: Release | None,
    trust: TrustPolicy,
    acting: dict[str, Role],
    now: datetime,
    purpose: Purpose,
) -> list[Check]:
    """Check each requirement in turn; return what was checked.

    What does not count is no reason to refuse: whoever keeps the registry could leave
    it out. It is told where too little is left.
    """
    checks: list[Check] = []
    signed, strange = _signed_attestations(evidence, trust, now)
    for requirement in trust.requirements:
        deployers_own = purpose == "deploy" and requirement.roles == ("deployer",)
        if deployers_own or not requirement.concerns(ref.name):
            continue
        with _stage("attest", f"trust policy {trust.version}, {requirement}"):
            found: list[SignedBy] = []
            refused = list(strange)
            told: dict[str, str] = {}
            for envelope, attestation in signed:
                if attestation.predicate_type != requirement.predicate:
                    continue
                try:
                    check_subject(
                        attestation, envelope.what, evidence.found.digest, release
                    )
                    requirement.check_result(attestation, envelope.what)
                    signers = _attesters(envelope, requirement, trust, acting, now)
                except VerificationError as error:
                    refused.append(str(error))
                else:
                    found += signers
                    told |= {signer.name: str(attestation) for signer in signers}
            filled = requirement.check_filled(found, refused)
        acting.update({signer.name: signer.role for signer in filled})
        checks += [
            Check("attest", told[by.name], by, requirement.rule) for by in filled
        ]
    return checks


def _signed_attestations(
    evidence: Evidence, trust: TrustPolicy, now: datetime
) -> tuple[list[tuple[Envelope, Attestation]], list[str]]:
    """Return what signers of the policy, in any role, attest; and why others do not.

    Whoever reaches the registry can add attestations: of one that no signer signed, no
    more is read than it takes to tell.
    """
    found: list[tuple[Envelope, Attestation]] = []
    refused: list[str] = []
    if not trust.requirements:
        return found, refused
    for name, raw in sorted(evidence.attestations.items()):
        try:
            envelope = parse_envelope(raw, what=file_of(name))
            check_signer(envelope, trust, now)
            found.append((envelope, parse_attestation(envelope)))
        except (Malformed, VerificationError) as error:
            refused.append(str(error))
    return found, refused


def check_signer(envelope: Envelope, trust: TrustPolicy, now: datetime) -> None:
    """Raise VerificationError unless a signer of the policy signed, in any role."""
    fault: VerificationError | None = None
    for role in ROLES:
        try:
            trust.verify(envelope, role, now=now)
        except VerificationError as error:
            fault = error
        else:
            return
    if fault is not None:
        raise fault


def _attesters(
    envelope: Envelope,
    requirement: Requirement,
    trust: TrustPolicy,
    acting: Mapping[str, Role],
    now: datetime,
) -> list[SignedBy]:
    """Return its signer, once for each required role that it may play here.

    Raises VerificationError, that of its last role, where there is none.
    """
    found: list[SignedBy] = []
    fault: VerificationError | None = None
    for role in requirement.roles:
        try:
            signer = trust.verify(envelope, role, now=now)
            check_separate(acting, signer, envelope.what)
        except VerificationError as error:
            fault = error
        else:
            found.append(signer)
    if not found and fault is not None:
        raise fault
    return found


def check_subject(
    attestation: Attestation, what: str, digest: str, release: Release | None
) -> None:
    """Raise VerificationError unless it speaks of this manifest, so released."""
    if attestation.digest != digest:
        raise VerificationError(
            f"{what} attests {attestation.digest}, not this model ({digest})"
        )
    if release is None or attestation.predicate_type != VERIFICATION_SUMMARY:
        return
    expected = resource_uri(release.name, release.version)
    if attestation.resource != expected:
        raise VerificationError(
            f"{what} summarises {attestation.resource!r}, not {expected!r}"
        )


def check_separate(acting: Mapping[str, Role], signer: SignedBy, what: str) -> None:
    """Raise VerificationError if this identity has acted in another role already."""
    role = acting.get(signer.name, signer.role)
    if role != signer.role:
        raise VerificationError(
            f"{what}: {signer.name!r} signs as {signer.role}, and acted as {role} for "
            "this model already: one identity acts in one role; have another "
            f"{signer.role} sign"
        )


# --- words ----------------------------------------------------------------------


def _signed(
    trust: TrustPolicy, envelope: Envelope, role: Role, now: datetime
) -> SignedBy:
    try:
        return trust.verify(envelope, role, now=now)
    except VerificationError as error:
        raise VerificationError(f"{error}. Mend: {_MEND[role]}") from error


def _rule(trust: TrustPolicy, role: Role) -> str:
    return f"trust policy {trust.version}, [[signers]] with role {role}"


@contextmanager
def _stage(stage: str, rule: str) -> Iterator[None]:
    """Say at which stage, and under which rule, something was refused."""
    try:
        yield
    except VerificationError as error:
        raise VerificationError(f"stage {stage} ({rule}): {error}") from error
