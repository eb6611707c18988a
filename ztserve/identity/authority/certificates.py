"""Certificates as the X509-SVID standard wants them: names, extensions, signature."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ztserve.identity.jwk import PublicKey

BACKDATED = timedelta(seconds=60)
"""How far validity reaches back, for clocks that differ a little."""

Extensions: TypeAlias = Sequence[tuple[x509.ExtensionType, bool]]
"""Certificate extensions, each with whether it is critical."""
Validity: TypeAlias = tuple[datetime, datetime]


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
