"""Our own identity: an X.509-SVID with its key, and the bundles to judge others by."""

import base64
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from types import MappingProxyType
from typing import NoReturn, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity.authorities import check_subjects, read_authority
from ztserve.identity.bundle import MAX_AUTHORITIES, MAX_TRUST_DOMAINS
from ztserve.identity.peer import (
    MAX_CERTIFICATES,
    MAX_CHAIN_BYTES,
    Moment,
    verify_peer,
)
from ztserve.identity.spiffe_id import SpiffeId, workload_id

_LOG = logging.getLogger(__name__)

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

MAX_KEY_BYTES = 16 * 1024
MAX_BUNDLE_BYTES = 256 * 1024
_PKCS8 = re.compile(rb"\x30(?:[\x00-\x7f]|\x81.|\x82..)\x02\x01[\x00\x01]\x30", re.S)
"""A private key's version and then its algorithm (RFC 5958, section 2)."""


@dataclass(frozen=True, slots=True)
class Svid:
    """A workload's X.509-SVID and its private key, held in memory only.

    It cannot be pickled: a process fetches its own and never takes one from another.
    """

    id: SpiffeId
    chain_der: tuple[bytes, ...] = field(repr=False)
    """Leaf first, then the intermediates; no root."""
    key: PrivateKey = field(repr=False)
    serial: int
    not_before: datetime
    not_after: datetime
    """When the first certificate of its path expires (UTC)."""

    def chain_pem(self) -> bytes:
        """Return the certificates in PEM, leaf first."""
        return pem(self.chain_der)

    def key_pem(self) -> bytes:
        """Return the private key in PEM: PKCS#8, not encrypted."""
        return self._key_as(serialization.Encoding.PEM)

    def key_der(self) -> bytes:
        """Return the private key in DER: PKCS#8, not encrypted."""
        return self._key_as(serialization.Encoding.DER)

    def _key_as(self, encoding: serialization.Encoding) -> bytes:
        return self.key.private_bytes(
            encoding,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def __reduce__(self) -> NoReturn:
        raise IdentityError(
            f"the SVID of {self.id} cannot be pickled: a key never leaves its process; "
            "open an identity source in the process that needs one"
        )


@dataclass(frozen=True, slots=True)
class Identity:
    """One coherent state: who we are, and whose authorities we trust for whom."""

    svid: Svid
    bundles: Mapping[str, tuple[bytes, ...]] = field(repr=False)
    """A trust domain's name to its roots (DER); our own domain is among them."""

    def __post_init__(self) -> None:
        frozen = MappingProxyType(dict(self.bundles))
        object.__setattr__(self, "bundles", frozen)


def dns_name(spiffe_id: str) -> str:
    """Return the DNS name that stands for `spiffe_id` in its certificate.

    For TLS stacks that can check DNS names only. It is a hash, so that it fits in one
    label (52 characters), is exact in case, and tells a listener nothing. Only where
    the authority derives this name itself does it prove anything.
    """
    digest = base64.b32encode(sha256(spiffe_id.encode()).digest())
    return digest.decode().lower().rstrip("=") + ".svid.invalid"


def pem(certificates_der: Iterable[bytes]) -> bytes:
    """Return DER certificates as one PEM text."""
    return b"".join(
        b"-----BEGIN CERTIFICATE-----\n"
        + b"".join(
            base64.b64encode(der[at : at + 48]) + b"\n" for at in range(0, len(der), 48)
        )
        + b"-----END CERTIFICATE-----\n"
        for der in certificates_der
    )


def verified_svid(
    chain_der: Sequence[bytes],
    key: object,
    bundles: Mapping[str, Sequence[bytes]],
    *,
    now: Moment,
) -> Svid:
    """Return the SVID that `chain_der` and `key` make, judged as a peer would.

    Raises IdentityError if the chain does not verify to the bundle of its own trust
    domain at `now`, or the key is not the leaf's.
    """
    try:
        peer = verify_peer(chain_der, bundles, now=now)
    except Unauthenticated as error:
        raise IdentityError(f"our own SVID would be refused: {error.reason}") from error
    leaf = x509.load_der_x509_certificate(chain_der[0])
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise IdentityError(f"our own SVID: a {type(key).__name__} is no EC or RSA key")
    if key.public_key() != leaf.public_key():
        raise IdentityError("our own SVID: the private key is not the certificate's")
    return Svid(
        id=SpiffeId.parse(peer.id),
        chain_der=tuple(chain_der),
        key=key,
        serial=peer.serial,
        not_before=peer.not_before,
        not_after=peer.not_after,
    )


@dataclass(frozen=True, slots=True)
class Material:
    """An identity as the SPIFFE Workload API sends it, believed in nothing yet."""

    spiffe_id: str
    chain: bytes
    """Concatenated DER certificates, leaf first."""
    key: bytes = field(repr=False)
    """PKCS#8 in DER, not encrypted."""
    bundle: bytes
    """Concatenated DER roots of the workload's own trust domain."""
    federated: Mapping[str, bytes] = field(default_factory=dict)
    """``spiffe://<trust domain>`` to concatenated DER roots."""


def read_identity(material: Material, *, now: Moment) -> Identity:
    """Return the identity in `material`. Raises IdentityError.

    1. The ID is a workload's. 2. Our own bundle parses, within bounds; a federated one
    that does not is left out, and none names our own trust domain. 3. Chain and key
    parse. 4. The chain verifies at `now` to our own bundle, and the key is the leaf's.
    5. The leaf's ID is the one announced.
    """
    spiffe_id = workload_id(material.spiffe_id)
    bundles = _bundles(spiffe_id.trust_domain, material)
    chain = _split(
        material.chain, "SVID", bytes_=MAX_CHAIN_BYTES, count=MAX_CERTIFICATES
    )
    svid = verified_svid(chain, _key(material.key), bundles, now=now)
    if svid.id != spiffe_id:
        raise IdentityError(f"the SVID announced for {spiffe_id} is that of {svid.id}")
    return Identity(svid, bundles)


def _bundles(own: str, material: Material) -> dict[str, tuple[bytes, ...]]:
    if len(material.federated) >= MAX_TRUST_DOMAINS:
        raise IdentityError(
            f"{len(material.federated)} federated bundles, "
            f"at most {MAX_TRUST_DOMAINS - 1} are allowed"
        )
    bundles = {own: read_roots(own, material.bundle)}
    for name, blob in material.federated.items():
        foreign = SpiffeId.parse(name)
        if foreign.path or foreign.trust_domain == own:
            raise IdentityError(f"a federated bundle for {name}: not another domain's")
        try:
            bundles[foreign.trust_domain] = read_roots(foreign.trust_domain, blob)
        except IdentityError as error:
            # A partner's mistake takes its own trust domain away, and nobody else's.
            _LOG.error("%s; no SVID of %s is believed", error, foreign.trust_domain)
    return bundles


def read_roots(trust_domain: str, blob: bytes) -> tuple[bytes, ...]:
    """Return the roots of `trust_domain` in concatenated DER. Raises IdentityError."""
    what = f"trust bundle of {trust_domain}"
    roots = _split(blob, what, bytes_=MAX_BUNDLE_BYTES, count=MAX_AUTHORITIES)
    check_subjects(
        (
            read_authority(root, f"{what}: root {position}")
            for position, root in enumerate(roots)
        ),
        what,
    )
    return roots


def _key(blob: bytes) -> object:
    if len(blob) > MAX_KEY_BYTES:
        raise IdentityError(f"private key of {len(blob)} bytes, at most 16 KiB allowed")
    try:
        if not _PKCS8.match(blob):  # the parser takes older forms as well
            raise ValueError
        return serialization.load_der_private_key(blob, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # Not chained: nothing of a key's parser belongs in a log.
        raise IdentityError("the private key is not unencrypted PKCS#8") from (
            None if error.args else error
        )


def _split(blob: bytes, what: str, *, bytes_: int, count: int) -> tuple[bytes, ...]:
    """Split concatenated DER SEQUENCEs (X.690, 8.1)."""
    if not 0 < len(blob) <= bytes_:
        raise IdentityError(f"{what}: {len(blob)} bytes, expected 1 to {bytes_}")
    parts: list[bytes] = []
    at = 0
    while at < len(blob):
        end = at + _sequence_length(blob[at : at + 6], what)
        if end > len(blob):
            raise IdentityError(f"{what}: certificate {len(parts)} is cut short")
        parts.append(blob[at:end])
        at = end
    if len(parts) > count:
        raise IdentityError(f"{what}: {len(parts)} certificates, at most {count}")
    return tuple(parts)


def _sequence_length(head: bytes, what: str) -> int:
    if len(head) < 2 or head[0] != 0x30:
        raise IdentityError(f"{what}: not a sequence of DER certificates")
    if head[1] < 0x80:
        return 2 + head[1]
    octets = head[1] & 0x7F
    if not 1 <= octets <= 4 or len(head) < 2 + octets:
        raise IdentityError(f"{what}: not a sequence of DER certificates")
    return 2 + octets + int.from_bytes(head[2 : 2 + octets])
