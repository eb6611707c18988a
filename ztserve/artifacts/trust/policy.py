"""The trust policy: it judges whose signature counts, for what, and when.

What it says, and its file, are in `terms`. A key's and a certificate's window is held
against the time that a timestamp proves. Without one it is held against the present:
after `not_after` nothing counts.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from ztserve import types
from ztserve.artifacts.statements.envelope import Envelope, check_signature, leaf_key
from ztserve.artifacts.statements.keys import PublicKey
from ztserve.artifacts.statements.strict import Malformed
from ztserve.artifacts.trust.chains import (
    certificates,
    key_ids,
    serials,
    verify_svid,
)
from ztserve.artifacts.trust.requirements import check_formats, check_version
from ztserve.artifacts.trust.signers import Role, SignedBy, Signer, read_guarded
from ztserve.artifacts.trust.terms import Terms, check_root_signature
from ztserve.artifacts.trust.timestamping import (
    ProvenTime,
    check_apart,
    check_authorities_apart,
    proven_time,
)
from ztserve.errors import ConfigError, VerificationError


@dataclass(frozen=True, slots=True)
class TrustPolicy(Terms):
    """Judges signatures by its terms. Made by `load`; never empty."""

    def __post_init__(self) -> None:
        if not self.signers:
            raise ConfigError("a trust policy without signers would trust nobody")
        self._check_roots()
        check_authorities_apart(self.timestamp_authorities, self.signers, self.bundles)

    def _check_roots(self) -> None:
        """Refuse signers whose domain has no roots, and roots that are revoked."""
        domains = {bundle.trust_domain for bundle in self.bundles}
        for signer in self.signers:
            if signer.spiffe and signer.spiffe.trust_domain not in domains:
                raise ConfigError(
                    f"signer {signer.name!r} is of the trust domain "
                    f"{signer.spiffe.trust_domain}, whose roots no [[bundles]] holds"
                )
        for bundle in self.bundles:
            if (
                bundle.keys & self.revoked_keys.keys()
                or bundle.serials & self.revoked_serials
            ):
                raise ConfigError(
                    f"a root of {bundle.trust_domain} is in [[bundles]] and in "
                    "[revoked]: take it out of the bundle"
                )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        trust_domain: str = "",
        now: datetime | None = None,
    ) -> Self:
        """Read a policy file.

        `root` is the public key (PEM text, or a file of it) under which the policy
        must be signed, by an envelope in the file ``<path>.sig`` beside it; its
        signers' keys must then be PEM text within, so that they are signed too.
        `trust_domain` is ours, '' for any: one root may sign the policies of several,
        and none of them may stand in for another. Raises ConfigError on whatever is
        not understood, on a file that group or others may write, without signers,
        after `expires`, and where the signature is missing or does not hold.
        """
        path = Path(path)
        raw = read_guarded(path)
        signed = "" if root is None else check_root_signature(path, raw, root)
        policy = cls.parse(raw, path, inline=root is not None, root=signed)
        if trust_domain:
            policy.check_trust_domain(trust_domain, path)
        try:
            policy.check_current(now)
        except VerificationError as error:
            raise ConfigError(str(error)) from error
        return policy

    @classmethod
    def check_signable(cls, path: str | os.PathLike[str]) -> bytes:
        """Return the text; ConfigError unless `load` would take it, once signed."""
        raw = read_guarded(Path(path))
        cls.parse(raw, Path(path), inline=True)
        return raw

    def check_trust_domain(self, ours: str, path: Path) -> None:
        """Raise ConfigError if it is another trust domain's, or signed for any."""
        if self.trust_domain != ours and (self.trust_domain or self.root):
            whose = self.trust_domain or "no trust domain"
            raise ConfigError(
                f"{path} is the trust policy of {whose}, and this is {ours}: fetch the "
                f'right one, or write trust_domain = "{ours}" into it and sign it again'
            )

    def check_current(self, now: datetime | None = None) -> None:
        """Raise VerificationError once the policy has expired."""
        moment = _moment(now)
        if self.expires is not None and moment >= self.expires:
            raise VerificationError(
                f"the trust policy (version {self.version}) expired at "
                f"{self.expires:%Y-%m-%d %H:%M} UTC: fetch or write a newer one"
            )

    def verify(
        self, envelope: Envelope, role: Role, *, now: datetime | None = None
    ) -> SignedBy:
        """Check that a signer who is trusted in `role` signed the envelope in time.

        In time is: at the time that its timestamp proves, else now. Raises
        VerificationError: unknown or revoked key, a certificate that is not that of a
        signer, wrong role, outside the signer's window, a timestamp or a signature
        that does not hold.
        """
        self.check_current(now)
        moment = _moment(now)
        chain = certificates(envelope)
        self._check_keys(
            envelope.what, key_ids(chain) | {envelope.key_id}, serials(chain)
        )
        proven = proven_time(envelope, self.timestamp_authorities, now=moment)
        if proven is not None:
            self._check_proof(envelope, proven)
        at = moment if proven is None else proven.at
        signer, key = self._signer(envelope, at, proven=proven is not None)
        check_signature(envelope, key)
        here = f"{envelope.what}: signer {signer.name!r}"
        if role not in signer.roles:
            raise VerificationError(
                f"{here} is trusted as {', '.join(sorted(signer.roles))}, not as {role}"
            )
        if signer.not_before is not None and at < signer.not_before:
            raise VerificationError(
                f"{here} is trusted only from {signer.not_before:%Y-%m-%d %H:%M} UTC"
            )
        if signer.not_after is not None and at >= signer.not_after:
            raise VerificationError(
                f"{here} was trusted until {signer.not_after:%Y-%m-%d %H:%M} UTC, and "
                "no timestamp of a [[timestamp_authorities]] proves that it signed "
                "before: sign again with a current key"
            )
        return SignedBy(
            signer.name,
            role,
            envelope.key_id,
            spiffe=str(signer.spiffe or ""),
            serial=f"{chain[0].serial_number:x}" if chain else "",
            signed_at=None if proven is None else proven.at,
            timestamped_by="" if proven is None else proven.authority,
        )

    def _check_keys(
        self, what: str, keys: frozenset[str], numbers: frozenset[str]
    ) -> None:
        """Refuse what is revoked, whenever it signed: a thief can backdate."""
        for key in keys & self.revoked_keys.keys():
            reason = self.revoked_keys[key]
            raise VerificationError(
                f"{what}: the signing key {key} is revoked"
                + (f": {reason}" if reason else "")
            )
        for number in numbers & self.revoked_serials:
            raise VerificationError(
                f"{what}: the certificate with serial {number} is revoked"
            )

    def _check_proof(self, envelope: Envelope, proven: ProvenTime) -> None:
        what = f"{envelope.what}: timestamp by {proven.authority!r}"
        self._check_keys(what, key_ids(proven.path), serials(proven.path))
        keys = key_ids(certificates(envelope)).union(
            [envelope.key_id], *(bundle.keys for bundle in self.bundles)
        )
        try:
            check_apart(proven, keys)
        except Malformed as error:
            raise VerificationError(f"{envelope.what}: {error}") from error

    def _signer(
        self, envelope: Envelope, at: datetime, *, proven: bool
    ) -> tuple[Signer, PublicKey]:
        if envelope.chain:
            spiffe = verify_svid(envelope, self.bundles, at, proven=proven).id
            for signer in self.signers:
                if signer.spiffe == spiffe:
                    return signer, leaf_key(envelope.chain)
            signed = f"by {spiffe}"
        else:
            for signer in self.signers:
                if signer.key is not None and signer.key_id == envelope.key_id:
                    return signer, signer.key
            signed = f"with key {envelope.key_id}"
        raise VerificationError(
            f"{envelope.what}: signed {signed}, which is none of "
            f"the trust policy's signers ({', '.join(s.name for s in self.signers)})"
        )

    def check_not_revoked(self, digest: str) -> None:
        """Raise VerificationError if the manifest with this digest is revoked."""
        if digest in self.revoked_manifests:
            reason = self.revoked_manifests[digest]
            raise VerificationError(
                f"the trust policy (version {self.version}) revokes the model {digest}"
                + (f": {reason}" if reason else "")
                + "; deploy another version"
            )

    def check_version(self, name: str, version: str) -> None:
        """Raise VerificationError if the policy demands a newer version of a model."""
        if name in self.min_versions:
            check_version(name, version, self.min_versions[name])

    def check_formats(self, names: Collection[str]) -> None:
        """Raise VerificationError if a file is of no format that the policy allows."""
        if self.formats is not None:
            check_formats(names, self.formats)


def _moment(now: datetime | None) -> datetime:
    moment = types.now() if now is None else now
    if moment.tzinfo is None:
        raise ConfigError(f"the time {moment} has no time zone; pass an aware datetime")
    return moment
