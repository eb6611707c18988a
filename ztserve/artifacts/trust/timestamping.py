"""Whose timestamps count: the authorities of a trust policy, and what they prove.

Without an authority a signature is judged at the present. A timestamp lets a signature
outlive its key's window, so its authority must be another principal than the signer:
who holds both could sign today and say that it was last year.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
)
from cryptography.x509.verification import VerificationError as NoPath

from ztserve.artifacts.statements.cms import der_of
from ztserve.artifacts.statements.envelope import Envelope
from ztserve.artifacts.statements.strict import Malformed
from ztserve.artifacts.statements.timestamps import (
    Timestamp,
    check_timestamp,
    parse_timestamp,
    signing_certificate,
)
from ztserve.artifacts.trust.chains import Bundle, key_ids, load_certificates
from ztserve.artifacts.trust.signers import Signer, load_text, only, take
from ztserve.errors import ConfigError, IdentityError, VerificationError
from ztserve.identity.authorities import read_authority
from ztserve.identity.jwk import check_key

MAX_AHEAD = timedelta(minutes=1)
"""How far an authority's clock may be ahead of ours."""
MAX_AUTHORITIES = 16
_CA_POLICY = ExtensionPolicy.webpki_defaults_ca().may_be_present(
    x509.ExtendedKeyUsage, Criticality.AGNOSTIC, None
)
_LEAF_POLICY = ExtensionPolicy.permit_all()  # its extensions are `check_purpose`'s


@dataclass(frozen=True, slots=True)
class TimestampAuthority:
    """An authority whose word about time counts."""

    name: str
    root: x509.Certificate


@dataclass(frozen=True, slots=True)
class ProvenTime:
    """When a signature was there, by whose word."""

    at: datetime
    authority: str
    path: tuple[x509.Certificate, ...]
    """The authority's certificates, from the one that stamped to its root."""


def parse_authorities(
    entries: Sequence[object], path: Path, *, inline: bool
) -> tuple[TimestampAuthority, ...]:
    """Return the ``[[timestamp_authorities]]`` of a policy; raises ConfigError.

    `inline`: only roots within the policy's own text count, not files beside it.
    """
    if len(entries) > MAX_AUTHORITIES:
        raise ConfigError(
            f"{path}: {len(entries)} [[timestamp_authorities]], "
            f"at most {MAX_AUTHORITIES}"
        )
    found = tuple(
        _parse_authority(
            entry, f"{path}: [[timestamp_authorities]] number {number}", path, inline
        )
        for number, entry in enumerate(entries, 1)
    )
    if len({authority.name for authority in found}) != len(found):
        raise ConfigError(f"{path}: two [[timestamp_authorities]] have the same name")
    return found


def _parse_authority(
    entry: object,
    where: str,
    path: Path,
    inline: bool,  # noqa: FBT001
) -> TimestampAuthority:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is not a table")
    only(entry, ("name", "root"), where)
    name, text = take(entry, "name", str, where), take(entry, "root", str, where)
    if not name or not text:
        raise ConfigError(f"{where} needs a name and a root")
    pem = load_text(text, path.parent, f"{where}: root", inline=inline)
    root = load_certificates(pem, f"{where}: root", 1)[0]
    try:
        read_authority(der_of(root), f"{where}: root")
    except IdentityError as error:
        raise ConfigError(str(error)) from error
    return TimestampAuthority(name, root)


def proven_time(
    envelope: Envelope, authorities: Sequence[TimestampAuthority], *, now: datetime
) -> ProvenTime | None:
    """Return the earliest time that the envelope's timestamps prove.

    None without timestamps, or where no authority is named that could judge them. Each
    must hold: it is over the signature's very bytes, of no time to come, by a
    certificate for timestamping with a path to a named root, valid at that time.
    Raises VerificationError.
    """
    if not authorities:
        return None
    proven = []
    for raw in envelope.timestamps:
        try:
            proven.append(_prove(raw, envelope.signature, authorities, now))
        except Malformed as error:
            raise VerificationError(f"{envelope.what}: {error}") from error
    return min(proven, key=lambda one: one.at, default=None)


def _prove(
    raw: bytes,
    message: bytes,
    authorities: Sequence[TimestampAuthority],
    now: datetime,
) -> ProvenTime:
    timestamp = parse_timestamp(raw)
    certificate = signing_certificate(timestamp)
    check_costs(timestamp)
    check_purpose(certificate)
    check_not_ahead(timestamp, now)
    authority, path = find_authority(timestamp, certificate, authorities)
    check_timestamp(timestamp, message, certificate)
    return ProvenTime(timestamp.time, authority.name, path)


def check_costs(timestamp: Timestamp) -> None:
    """Raise Malformed where judging the certificates could take seconds."""
    subjects = {certificate.subject for certificate in timestamp.certificates}
    if len(subjects) < len(timestamp.certificates):
        raise Malformed("two certificates of a timestamp have one name")
    try:
        for certificate in timestamp.certificates:
            check_key(certificate.public_key(), "a certificate of a timestamp")
    except IdentityError as error:
        raise Malformed(str(error)) from error


def check_not_ahead(timestamp: Timestamp, now: datetime) -> None:
    """Raise Malformed for a time that has not come yet."""
    if timestamp.time > now + MAX_AHEAD:
        raise Malformed(
            f"the timestamp is of {timestamp.time:%Y-%m-%d %H:%M:%S} UTC, which is yet "
            "to come: the authority's clock, or ours, is wrong"
        )


def check_purpose(certificate: x509.Certificate) -> None:
    """Raise Malformed unless a certificate is for timestamping only (RFC 3161, 2.3)."""
    extensions = {type(each.value): each for each in certificate.extensions}
    uses = extensions.get(x509.ExtendedKeyUsage)
    if (
        uses is None
        or not uses.critical
        or list(uses.value) != [ExtendedKeyUsageOID.TIME_STAMPING]
    ):
        raise Malformed(
            "the timestamp's certificate is not for timestamping: expected the "
            "critical extended key usage timeStamping, and no other"
        )
    basic = extensions.get(x509.BasicConstraints)
    usage = extensions.get(x509.KeyUsage)
    if basic is not None and basic.value.ca:
        raise Malformed("the timestamp's certificate is that of a CA")
    if usage is not None and not usage.value.digital_signature:
        raise Malformed("the timestamp's certificate lacks digitalSignature")


def check_apart(proven: ProvenTime, signer_keys: Collection[str]) -> None:
    """Raise Malformed where the signer, or who certifies it, stamped its own time.

    `signer_keys`: ``sha256:<hex>`` of the signer's key and of those above it.
    """
    if key_ids(proven.path) & set(signer_keys):
        raise Malformed(
            f"the timestamp by {proven.authority!r} is under a key of the signer's "
            "own: a timestamp counts only from another principal"
        )


def check_authorities_apart(
    authorities: Sequence[TimestampAuthority],
    signers: Sequence[Signer],
    bundles: Sequence[Bundle],
) -> None:
    """Raise ConfigError where an authority is a signer, or certifies signers."""
    theirs = {signer.key_id for signer in signers if signer.key_id}.union(
        *(bundle.keys for bundle in bundles)
    )
    for authority in authorities:
        if key_ids([authority.root]) & theirs:
            raise ConfigError(
                f"the timestamp authority {authority.name!r} has the key of a signer, "
                "or of a root of signers: who signs must not say when"
            )


def find_authority(
    timestamp: Timestamp,
    certificate: x509.Certificate,
    authorities: Sequence[TimestampAuthority],
) -> tuple[TimestampAuthority, tuple[x509.Certificate, ...]]:
    """Return the authority that a certificate is of, and its path; raises Malformed."""
    others = [each for each in timestamp.certificates if each != certificate]
    reasons = []
    for authority in authorities:
        verifier = (
            PolicyBuilder()
            .store(Store([authority.root]))
            .time(timestamp.time)
            .max_chain_depth(4)
            .extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY)
            .build_client_verifier()
        )
        try:
            return authority, tuple(verifier.verify(certificate, others).chain)
        except NoPath as error:
            reasons.append(f"{authority.name}: {str(error)!r:.200}")
        except Exception as error:
            # Its parsers raise many kinds of error on hostile bytes.
            raise Malformed(f"a timestamp's certificate: {error!r:.200}") from error
    raise Malformed(
        f"the timestamp of {timestamp.time:%Y-%m-%d %H:%M:%S} UTC is by none of the "
        f"trust policy's [[timestamp_authorities]] ({'; '.join(reasons)})"
    )
