"""What an authority signs with: roots, intermediates and the keys of JWT-SVIDs."""

from dataclasses import dataclass, field
from hashlib import sha256

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ztserve.identity.authority.certificates import (
    BACKDATED,
    Validity,
    authority_extensions,
    authority_name,
    sign_certificate,
)
from ztserve.identity.spiffe_id import SCHEME


@dataclass(frozen=True, slots=True)
class Issuer:
    """A key that signs leaves, its certificate, and those between leaf and root."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate
    chain: tuple[bytes, ...] = ()
    """DER; empty for a root."""


@dataclass(frozen=True, slots=True)
class JwtKey:
    """A key that signs JWT-SVIDs, and the name (`kid`) by which others find it."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    id: str


def make_root(trust_domain: str, validity: Validity, path_length: int | None) -> Issuer:
    """Return a new root, under which `path_length` authorities may stand in a row."""
    key = ec.generate_private_key(ec.SECP256R1())
    # The key's identifier in the name: two roots of one trust domain never mix.
    subject = authority_name(f"development root {_key_id(key)}")
    certificate = sign_certificate(
        key.public_key(),
        subject,
        (validity[0] - BACKDATED, validity[1]),
        authority_extensions([SCHEME + trust_domain], path_length),
        issuer=subject,
        issuer_key=key,
    )
    return Issuer(key, certificate)


def make_intermediate(
    trust_domain: str, root: Issuer, validity: Validity, path_length: int | None
) -> Issuer:
    """Return a new authority that `root` signs, and that does not outlive it."""
    key = ec.generate_private_key(ec.SECP256R1())
    above = root.certificate
    certificate = sign_certificate(
        key.public_key(),
        authority_name(f"development intermediate {_key_id(key)}"),
        (
            max(validity[0] - BACKDATED, above.not_valid_before_utc),
            min(validity[1], above.not_valid_after_utc),
        ),
        authority_extensions([SCHEME + trust_domain], path_length),
        issuer=above.subject,
        issuer_key=root.key,
    )
    return Issuer(key, certificate, (certificate.public_bytes(Encoding.DER),))


def make_jwt_key() -> JwtKey:
    """Return a new key for ES256."""
    key = ec.generate_private_key(ec.SECP256R1())
    return JwtKey(key, _key_id(key))


def _key_id(key: ec.EllipticCurvePrivateKey) -> str:
    public = key.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    return sha256(public).hexdigest()[:16]
