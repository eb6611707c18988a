"""Certificates of signers: an SVID counts under the roots of the time it was used at.

SPIFFE authorities rotate, so a trust policy keeps each trust domain's bundles with the
time in which they were in force: an archive, in which a one-hour SVID is still found
good years later, at the time that its timestamp proves.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from ztserve.artifacts.statements.cms import der_of, parse_certificate
from ztserve.artifacts.statements.envelope import Envelope
from ztserve.artifacts.statements.strict import Malformed
from ztserve.artifacts.trust.signers import (
    load_text,
    only,
    take,
    take_time,
)
from ztserve.errors import (
    ConfigError,
    IdentityError,
    Unauthenticated,
    VerificationError,
)
from ztserve.identity.authorities import check_subjects, read_authority
from ztserve.identity.peer import verify_peer
from ztserve.identity.spiffe_id import trust_domain_name
from ztserve.types import Peer

MAX_BUNDLES = 256
MAX_ROOTS = 16
"""Roots in one bundle."""
_SERIAL = re.compile(r"[0-9a-f]{1,40}\Z")


@dataclass(frozen=True, slots=True)
class Bundle:
    """The roots of a trust domain, and when they were in force."""

    trust_domain: str
    roots: tuple[bytes, ...]
    """Certificates in DER."""
    keys: frozenset[str]
    """``sha256:<hex>`` of the roots' keys."""
    serials: frozenset[str]
    """The roots' serial numbers, in hex."""
    not_before: datetime | None = None
    not_after: datetime | None = None

    def in_force(self, at: datetime) -> bool:
        """Tell whether signatures of that time are judged by this bundle."""
        return (self.not_before is None or at >= self.not_before) and (
            self.not_after is None or at < self.not_after
        )


def parse_bundles(
    entries: Sequence[object], path: Path, *, inline: bool
) -> tuple[Bundle, ...]:
    """Return the ``[[bundles]]`` of a trust policy; raises ConfigError.

    `inline`: only roots within the policy's own text count, not files beside it.
    """
    if len(entries) > MAX_BUNDLES:
        raise ConfigError(f"{path}: {len(entries)} [[bundles]], at most {MAX_BUNDLES}")
    return tuple(
        _parse_bundle(entry, f"{path}: [[bundles]] number {number}", path, inline)
        for number, entry in enumerate(entries, 1)
    )


def _parse_bundle(
    entry: object,
    where: str,
    path: Path,
    inline: bool,  # noqa: FBT001
) -> Bundle:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is not a table")
    only(entry, ("trust_domain", "roots", "not_before", "not_after"), where)
    domain = take(entry, "trust_domain", str, where)
    text = take(entry, "roots", str, where)
    if not domain or not text:
        raise ConfigError(f"{where} needs a trust_domain and its roots")
    pem = load_text(text, path.parent, f"{where}: roots", inline=inline)
    try:
        name = trust_domain_name(domain)
        roots = [
            read_authority(der_of(certificate), f"{where}: a root")
            for certificate in load_certificates(pem, f"{where}: roots", MAX_ROOTS)
        ]
        check_subjects(roots, where)
    except IdentityError as error:
        raise ConfigError(f"{where}: {error}") from error
    return Bundle(
        trust_domain=name,
        roots=tuple(map(der_of, roots)),
        keys=key_ids(roots),
        serials=serials(roots),
        not_before=take_time(entry, "not_before", where),
        not_after=take_time(entry, "not_after", where),
    )


def load_certificates(pem: bytes, where: str, limit: int) -> list[x509.Certificate]:
    """Parse 1 to `limit` PEM certificates; raises ConfigError."""
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(
            f"{where}: expected PEM certificates (-----BEGIN CERTIFICATE-----)"
        ) from error
    if len(found) > limit:
        raise ConfigError(f"{where}: {len(found)} certificates, at most {limit}")
    return found


def verify_svid(
    envelope: Envelope, bundles: Sequence[Bundle], at: datetime, *, proven: bool
) -> Peer:
    """Return whose SVID the envelope's chain was at that time; VerificationError.

    All that `verify_peer` asks of a peer holds here: one URI name, a workload's SPIFFE
    ID; no CA; key usage digitalSignature; a path to a root that its trust domain
    had in force, every certificate of it valid at that time. `proven`: a timestamp
    says that it was then, not merely our clock that it is now.
    """
    roots: dict[str, list[bytes]] = {}
    for bundle in bundles:
        if bundle.in_force(at):
            known = roots.setdefault(bundle.trust_domain, [])
            known += [root for root in bundle.roots if root not in known]
    try:
        return verify_peer(envelope.chain, roots, now=at)
    except Unauthenticated as error:
        source = (
            "the time of its timestamp"
            if proven
            else "now, as no timestamp of a [[timestamp_authorities]] says when it was"
        )
        raise VerificationError(
            f"{envelope.what}: the signer's certificate, judged at "
            f"{at:%Y-%m-%d %H:%M:%S} UTC ({source}): {error.reason}"
        ) from error


def certificates(envelope: Envelope) -> tuple[x509.Certificate, ...]:
    """Return the envelope's chain, unjudged; raises VerificationError."""
    try:
        return tuple(parse_certificate(der, "the chain's") for der in envelope.chain)
    except Malformed as error:
        raise VerificationError(f"{envelope.what}: {error}") from error


def parse_serials(table: Mapping[str, object], where: str) -> frozenset[str]:
    """Return the `serials` of a policy's ``[revoked]``; raises ConfigError."""
    values = take(table, "serials", list, where) or []
    for value in values:
        if not isinstance(value, str) or not _SERIAL.match(value):
            raise ConfigError(
                f"{where}: [revoked] serials holds {value!r}; expected a certificate's "
                "serial number in lower-case hex"
            )
    return frozenset(value.lstrip("0") for value in values)


def key_ids(certificates: Iterable[x509.Certificate]) -> frozenset[str]:
    """Return ``sha256:<hex>`` of the PEM of each certificate's key."""
    return frozenset(
        "sha256:" + hashlib.sha256(_pem(certificate)).hexdigest()
        for certificate in certificates
    )


def serials(certificates: Iterable[x509.Certificate]) -> frozenset[str]:
    """Return the serial number of each certificate, in hex as `svid` prints it."""
    return frozenset(f"{certificate.serial_number:x}" for certificate in certificates)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
