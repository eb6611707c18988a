"""The development authority: a SPIFFE trust domain that lives in one process.

Its key is made at start-up and never leaves memory; with the process the trust domain
ends. It names workloads, it does not attest them: `Agent` does.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import ClassVar, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.spiffe_id import SCHEME, trust_domain_name, workload_id
from ztserve.identity.svid import Svid, dns_name

DEFAULT_TTL_S = 3600.0
MIN_TTL_S, MAX_TTL_S = 1.0, 24 * 3600.0
ROOT_DAYS = 365
BACKDATED = timedelta(seconds=60)
"""How far validity reaches back, for clocks that differ a little."""

Extensions: TypeAlias = Sequence[tuple[x509.ExtensionType, bool]]
"""Certificate extensions, each with whether it is critical."""
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
Validity: TypeAlias = tuple[datetime, datetime]


class Authority:
    """Issues X.509-SVIDs of one trust domain from a root that it makes itself.

    Raises IdentityError where the name is none of a trust domain.
    """

    _path_length: ClassVar[int | None] = 0
    """How many authorities may stand between its root and a leaf."""

    def __init__(
        self, trust_domain: str, *, clock: Callable[[], datetime] = types.now
    ) -> None:
        self.trust_domain = trust_domain_name(trust_domain)
        self._clock = clock
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._root = self._make_root()

    @property
    def bundle(self) -> tuple[bytes, ...]:
        """The roots of the trust domain (DER)."""
        return (self._root.public_bytes(Encoding.DER),)

    @property
    def bundles(self) -> dict[str, tuple[bytes, ...]]:
        """The bundle under its trust domain's name."""
        return {self.trust_domain: self.bundle}

    def issue(self, spiffe_id: str, *, ttl_s: float = DEFAULT_TTL_S) -> Svid:
        """Return a new SVID of `spiffe_id`: own EC P-256 key, random serial number.

        It bears one URI name and the DNS name derived from it (`dns_name`), no common
        name, and lives `ttl_s` seconds (1 to 86400, rounded up). Raises IdentityError
        for an ID of another trust domain or of no workload.
        """
        subject = workload_id(spiffe_id)
        if subject.trust_domain != self.trust_domain:
            raise IdentityError(
                f"{subject} is not of {self.trust_domain}: an authority issues IDs of "
                "its own trust domain only"
            )
        if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
            raise IdentityError(
                f"ttl_s is {ttl_s:g}, expected {MIN_TTL_S:g} to {MAX_TTL_S:g}"
            )
        now = self._clock()
        # Certificates count whole seconds and would cut the last one off.
        expiry = (now + timedelta(seconds=ttl_s, microseconds=999_999)).replace(
            microsecond=0
        )
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = sign_certificate(
            key.public_key(),
            workload_name(),
            (now - BACKDATED, min(expiry, self._root.not_valid_after_utc)),
            leaf_extensions([subject], [dns_name(subject)]),
            issuer=self._root.subject,
            issuer_key=self._key,
        )
        return Svid(
            id=subject,
            chain_der=(certificate.public_bytes(Encoding.DER),),
            key=key,
            serial=certificate.serial_number,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )

    def _make_root(self) -> x509.Certificate:
        key_id = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        # The key's identifier in the name: two roots of one trust domain never mix.
        subject = authority_name(f"development root {key_id.digest.hex()[:16]}")
        now = self._clock()
        return sign_certificate(
            self._key.public_key(),
            subject,
            (now - BACKDATED, now + timedelta(days=ROOT_DAYS)),
            authority_extensions([SCHEME + self.trust_domain], self._path_length),
            issuer=subject,
            issuer_key=self._key,
        )


def sign_certificate(
    public_key: PublicKey,
    subject: x509.Name,
    validity: Validity,
    extensions: Extensions,
    *,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """Return a certificate with a random serial number and both key identifiers."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
    )
    identifiers: Extensions = (
        (x509.SubjectKeyIdentifier.from_public_key(public_key), False),
        (
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            False,
        ),
    )
    for extension, critical in (*extensions, *identifiers):
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(issuer_key, hashes.SHA256())


def workload_name() -> x509.Name:
    """Return a leaf's subject: no common name, which some TLS stacks would match."""
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ztserve")])


def authority_name(common_name: str) -> x509.Name:
    """Return the subject of a certificate that signs others."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ztserve"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def leaf_extensions(uris: Sequence[str], dns: Sequence[str] = ()) -> Extensions:
    """Return what the X509-SVID standard asks of a leaf (sections 2 and 4)."""
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        (alternative_names(uris, dns), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (key_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage(both), False),
    )


def authority_extensions(uris: Sequence[str], path_length: int | None) -> Extensions:
    """Return what the X509-SVID standard asks of a signing certificate."""
    return (
        (alternative_names(uris), False),
        (x509.BasicConstraints(ca=True, path_length=path_length), True),
        (key_usage("key_cert_sign", "crl_sign"), True),
    )


def alternative_names(
    uris: Sequence[str], dns: Sequence[str] = ()
) -> x509.SubjectAlternativeName:
    """Return a SubjectAltName of URI and DNS names."""
    return x509.SubjectAlternativeName(
        [
            *(x509.UniformResourceIdentifier(uri) for uri in uris),
            *(x509.DNSName(name) for name in dns),
        ]
    )


def key_usage(*uses: str) -> x509.KeyUsage:
    """Return the key usage with just `uses`, named as `x509.KeyUsage` names them."""
    return x509.KeyUsage(
        digital_signature="digital_signature" in uses,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign="key_cert_sign" in uses,
        crl_sign="crl_sign" in uses,
        encipher_only=False,
        decipher_only=False,
    )
