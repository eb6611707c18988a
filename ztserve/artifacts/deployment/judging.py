"""Judging a deployment bundle, and what is about to run against it: each step raises.

`verify_deployment` says that a deployer signed it; the checks of what it returns are
made by whoever is about to use the thing that they name, with the very value that is
used: the settings in force, a file's bytes as they were parsed, a class by its name, a
model's digest, the code measured in that process.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from ztserve.artifacts.statements.deployment import (
    Code,
    Deployment,
    Part,
    parse_deployment,
)
from ztserve.artifacts.statements.envelope import Envelope, parse_envelope
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.artifacts.trust.signers import SignedBy
from ztserve.errors import VerificationError
from ztserve.types import ModelRef

SIGN = "sign what is to run anew (`ztserve bundle sign`)"
_MOST_TOLD = 8
"""Differences that a refusal lists."""


@dataclass(frozen=True, slots=True)
class VerifiedDeployment:
    """A bundle that a deployer of the trust policy signed. Made by `verify_deployment`.

    Each check raises VerificationError, which says what was signed and what was found.
    """

    what: str
    """The bundle's file, for messages."""
    signed: Deployment
    signer: SignedBy
    envelope: Envelope

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the signed statement: names the bundle in the audit."""
        return self.signed.digest

    def check_settings(self, settings: Mapping[str, object]) -> None:
        """Refuse settings in force that are not those signed, by key."""
        differing = _differing(self.signed.settings, settings)
        if differing:
            table, _, key = differing[0].rpartition(".")
            raise self._refusal(
                "ztserve.toml differs from what was signed: key "
                f"{f'[{table}] ' if table else ''}{key} is "
                f"{settings.get(differing[0], 'absent')!r}, signed as "
                f"{self.signed.settings.get(differing[0], 'absent')!r}"
                + _others(differing[1:]),
                f"put the signed value back, or {SIGN}",
            )

    def check_file(self, name: str, raw: bytes) -> None:
        """Refuse a file that the settings name, unless these bytes are those signed."""
        found = "sha256:" + hashlib.sha256(raw).hexdigest()
        signed = self.signed.files.get(name)
        if signed != found:
            raise self._refusal(
                f"the file {name} is {found}, signed as {signed or 'no part of it'}",
                f"put the signed file back, or {SIGN}",
            )

    def check_trust(self, trust: TrustPolicy) -> None:
        """Refuse another trust root, and an older trust policy than at the signing."""
        if trust.root != self.signed.trust_root:
            raise self._refusal(
                f"the trust policy is signed under {trust.root or 'no root'}, and the "
                f"bundle under a policy of {self.signed.trust_root or 'no root'}",
                f"name that trust root in [artifacts] trust_root, or {SIGN}",
            )
        if trust.version < self.signed.trust_version:
            raise self._refusal(
                f"the trust policy is version {trust.version}, signed as at least "
                f"{self.signed.trust_version}",
                "fetch the newer policy",
            )

    def check_application(self, application: str) -> None:
        """Refuse the bundle of another application."""
        if application != self.signed.application:
            raise self._refusal(
                f"it is that of {self.signed.application}, and {application} is about "
                "to run",
                f"run {self.signed.application}, or {SIGN}",
            )

    def check_target(self, name: str, target: str, service: str) -> None:
        """Refuse a class that is not the signed one, before it is imported.

        And an identity that is not its service's.
        """
        signed = self._part(name)
        for title, ours, theirs in (
            ("class", target, signed.target),
            ("service", service, signed.service),
        ):
            if ours != theirs:
                raise self._refusal(
                    f"deployment {name}: {title} {ours!r}, signed as {theirs!r}",
                    f"run what was signed, or {SIGN}",
                )

    def part(self, found: Part) -> Part:
        """Return the deployment as signed; refuse one that is anything else.

        Models and code are checked where they are resolved and measured.
        """
        signed = self._part(found.name)
        for title, ours, theirs in (
            ("class", found.target, signed.target),
            ("service", found.service, signed.service),
            ("labels", dict(found.labels), dict(signed.labels)),
            ("arguments", found.arguments, signed.arguments),
            ("options", dict(found.options), dict(signed.options)),
        ):
            if ours != theirs:
                raise self._refusal(
                    f"deployment {found.name}: {title} {ours!r}, signed as {theirs!r}",
                    f"run what was signed, or {SIGN}",
                )
        if set(found.models) != set(signed.models):
            raise self._refusal(
                f"deployment {found.name} has the models {dict(found.models)}, signed "
                f"as {dict(signed.models)}",
                f"run what was signed, or {SIGN}",
            )
        return signed

    def check_ref(self, part: Part, name: str, ref: ModelRef) -> None:
        """Refuse to ask for another model than is signed for a part of it."""
        signed = ModelRef(part.models[name])
        wanted = (ref.name, ref.version or signed.version, ref.digest or signed.digest)
        if wanted != (signed.name, signed.version, signed.digest):
            raise self._refusal(
                f"deployment {part.name} asks for {ref}{_part(name)}, signed as "
                f"{signed}",
                f"ask for the signed model, or {SIGN}",
            )

    def check_model(self, part: Part, name: str, ref: ModelRef, digest: str) -> None:
        """Refuse a model that resolved to another digest than is signed."""
        self.check_ref(part, name, ref)
        signed = ModelRef(part.models[name])
        if digest != signed.digest:
            raise self._refusal(
                f"{ref}{_part(name)} of deployment {part.name} resolved to {digest}, "
                f"signed as {signed}",
                f"point the alias at {signed.name}:{signed.version} again, or {SIGN}",
            )

    def check_runtime(self, found: Code) -> None:
        """Refuse another Python or ztserve, and packages that are not those signed.

        What is not here cannot run: a gateway may lack what replicas need.
        """
        signed = self.signed.code
        for title, ours, theirs in (
            ("Python", found.python, signed.python),
            ("ztserve", found.ztserve, signed.ztserve),
        ):
            if ours != theirs:
                raise self._refusal(
                    f"{title} is {ours}, signed as {theirs}",
                    f"install {theirs}, or {SIGN}",
                )
        for name, digests in found.packages.items():
            known = signed.packages.get(name)
            if known is None or not set(digests) <= set(known):
                other = next(d for d in digests if known is None or d not in known)
                raise self._refusal(
                    f"{name!r} on sys.path is {other}, signed as "
                    f"{' and '.join(known) if known else 'no part of it'}",
                    f"install what was signed, take away what was not, or {SIGN}",
                )

    def check_tree(self, tree: str, files: Mapping[str, str]) -> None:
        """Refuse the user's own modules unless each file is as signed, no other there.

        `tree`: the digest that is signed; `files`: path to digest, as measured.
        """
        signed = self.signed.code.trees.get(tree, {})
        differing = _differing(signed, files)
        if differing:
            name = differing[0]
            raise self._refusal(
                f"the code differs from what was signed: {name} is "
                f"{files.get(name, 'absent')}, signed as {signed.get(name, 'absent')}"
                + _others(differing[1:]),
                f"put the signed code back, or {SIGN}",
            )

    def check_still(self, trust: TrustPolicy, *, now: datetime | None = None) -> None:
        """Refuse the bundle where a newer trust policy does: its signer or itself."""
        _judge(self.envelope, trust, now)
        self.check_trust(trust)

    def _part(self, name: str) -> Part:
        if name not in self.signed.parts:
            raise self._refusal(
                f"it has no deployment {name!r} (it has "
                f"{', '.join(self.signed.parts)}): it is of another application, "
                f"{self.signed.application}",
                f"name the bundle of this one, or {SIGN}",
            )
        return self.signed.parts[name]

    def _refusal(self, fault: str, mend: str) -> VerificationError:
        return VerificationError(f"the deployment bundle {self.what}: {fault}: {mend}")


def verify_deployment(
    raw: bytes, trust: TrustPolicy, *, what: str, now: datetime | None = None
) -> VerifiedDeployment:
    """Verify a bundle's signature and role, that it is not revoked, and its root.

    `what`: its file, for messages. Raises VerificationError.
    """
    envelope = parse_envelope(raw, what=what)
    signer = _judge(envelope, trust, now)
    verified = VerifiedDeployment(what, parse_deployment(envelope), signer, envelope)
    verified.check_trust(trust)
    return verified


def read_deployment(raw: bytes, what: str) -> Deployment:
    """Parse a bundle whose signature nobody has looked at; raises VerificationError."""
    return parse_deployment(parse_envelope(raw, what=what))


def _judge(envelope: Envelope, trust: TrustPolicy, now: datetime | None) -> SignedBy:
    try:
        signer = trust.verify(envelope, "deployer", now=now)
    except VerificationError as error:
        raise VerificationError(
            f"the deployment bundle {error}. Mend: sign it with a deployer's key that "
            "the trust policy names: `ztserve bundle sign`"
        ) from error
    if envelope.digest in trust.revoked_manifests:
        reason = trust.revoked_manifests[envelope.digest]
        raise VerificationError(
            f"the trust policy (version {trust.version}) revokes the deployment bundle "
            f"{envelope.digest}{': ' * bool(reason)}{reason}; {SIGN}"
        )
    return signer


def _differing(signed: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """Return the keys whose values differ, by exact type: true is not 1."""
    return [
        key
        for key in sorted({*signed, *found})
        if key not in signed
        or key not in found
        or (type(signed[key]), signed[key]) != (type(found[key]), found[key])
    ]


def _others(names: Collection[str]) -> str:
    if not names:
        return ""
    told = ", ".join([*names][:_MOST_TOLD])
    more = f" and {len(names) - _MOST_TOLD} more" if len(names) > _MOST_TOLD else ""
    return f" (also {told}{more})"


def _part(name: str) -> str:
    return f" as its part {name!r}" if name else ""
