"""CMS SignedData, as far as timestamps need it (RFC 5652): reading, no judgement.

One signer, named by issuer and serial and by the hash of its certificate
(`signingCertificateV2`, RFC 5816), SHA-256 or more; each signed attribute once.
"""

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from ztserve.artifacts.statements import der
from ztserve.artifacts.statements.der import Element, Items
from ztserve.artifacts.statements.strict import Malformed

MAX_CERTIFICATES = 8

# Names of RFC 5652, 3161, 5816 and 5758.
SIGNED_DATA = "1.2.840.113549.1.7.2"
TST_INFO = "1.2.840.113549.1.9.16.1.4"
CONTENT_TYPE = "1.2.840.113549.1.9.3"
MESSAGE_DIGEST = "1.2.840.113549.1.9.4"
SIGNING_CERTIFICATE_V2 = "1.2.840.113549.1.9.16.2.47"
SHA256 = "2.16.840.1.101.3.4.2.1"
ECDSA_SHA256 = "1.2.840.10045.4.3.2"
_RSA = "1.2.840.113549.1.1.1"
_HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    SHA256: hashes.SHA256,
    "2.16.840.1.101.3.4.2.2": hashes.SHA384,
    "2.16.840.1.101.3.4.2.3": hashes.SHA512,
}
_SIGNATURES = {
    ECDSA_SHA256: hashes.SHA256,
    "1.2.840.10045.4.3.3": hashes.SHA384,
    "1.2.840.10045.4.3.4": hashes.SHA512,
    "1.2.840.113549.1.1.11": hashes.SHA256,
    "1.2.840.113549.1.1.12": hashes.SHA384,
    "1.2.840.113549.1.1.13": hashes.SHA512,
}
CONTEXT_0, CONTEXT_1, IMPLICIT_0 = 0xA0, 0xA1, 0x80


@dataclass(frozen=True, slots=True)
class Signature:
    """What a SignerInfo says (RFC 5652, 5.3)."""

    issuer_and_serial: bytes
    """DER of IssuerAndSerialNumber: who is said to have signed."""
    hash: type[hashes.HashAlgorithm]
    attributes: bytes
    """DER of the signed attributes, as the SET that is signed."""
    content_digest: bytes
    certificate_hash: type[hashes.HashAlgorithm]
    certificate_digest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class SignedData:
    """A TSTInfo that somebody signed, and the certificates that came with it."""

    info: bytes
    """DER of the TSTInfo, which is signed."""
    certificates: tuple[x509.Certificate, ...]
    signature: Signature


def digest(algorithm: type[hashes.HashAlgorithm], content: bytes) -> bytes:
    """Return the digest of the content."""
    hashing = hashes.Hash(algorithm())
    hashing.update(content)
    return hashing.finalize()


def der_of(certificate: x509.Certificate) -> bytes:
    """Return a certificate in DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def read_signed_data(parts: Items) -> SignedData:
    """Read a SignedData around a TSTInfo (RFC 5652, 5.1); raises Malformed."""
    if parts.next().integer("SignedData version") != 3:
        raise Malformed("timestamp: SignedData is not of version 3")
    parts.next().expect(der.SET, "SignedData digestAlgorithms")
    content = parts.next().items(der.SEQUENCE, "encapContentInfo")
    expect_oid(content.next(), TST_INFO, "encapContentInfo")
    info = explicit(content.next(), CONTEXT_0, "encapContentInfo").expect(
        der.OCTETS, "TSTInfo"
    )
    certificates = parts.optional(CONTEXT_0)
    parts.optional(CONTEXT_1)  # revocation lists: SPIFFE has none, and we ask nobody
    signers = der.read_all(parts.next().expect(der.SET, "signerInfos"), "signerInfos")
    parts.end()
    if len(signers) != 1:
        raise Malformed(f"timestamp: {len(signers)} signers, exactly one is expected")
    if certificates is None:
        raise Malformed("the timestamp lacks its authority's certificate (certReq)")
    signature = _signer_info(signers[0].items(der.SEQUENCE, "SignerInfo"))
    return SignedData(info, _certificates(certificates.content), signature)


def _certificates(raw: bytes) -> tuple[x509.Certificate, ...]:
    found = der.read_all(raw, "timestamp certificates")
    if len(found) > MAX_CERTIFICATES:
        raise Malformed(
            f"a timestamp with {len(found)} certificates, the limit is "
            f"{MAX_CERTIFICATES}"
        )
    return tuple(parse_certificate(each.raw, "a timestamp's") for each in found)


def parse_certificate(raw: bytes, whose: str) -> x509.Certificate:
    """Parse a DER certificate, all that is parsed late too; raises Malformed."""
    try:
        certificate = x509.load_der_x509_certificate(raw)
        certificate.public_key()
        len(list(certificate.extensions))
        hash((certificate.subject, certificate.issuer, certificate.serial_number))
    except Exception as error:
        # Parsers raise many kinds of error on hostile bytes; each means the same.
        raise Malformed(f"{whose} certificate is malformed: {error!r:.200}") from error
    return certificate


def _signer_info(parts: Items) -> Signature:
    """RFC 5652, 5.3."""
    if parts.next().integer("SignerInfo version") != 1:
        raise Malformed("timestamp: its signer is not named by issuer and serial")
    signer = parts.next()
    signer.expect(der.SEQUENCE, "SignerInfo sid")
    hashing = read_hash(parts.next(), "SignerInfo digestAlgorithm")
    attributes = parts.next().expect(CONTEXT_0, "SignerInfo signedAttrs")
    algorithm = _algorithm(parts.next(), "SignerInfo signatureAlgorithm")
    if algorithm != _RSA and _SIGNATURES.get(algorithm) is not hashing:
        raise Malformed(f"timestamp: signature algorithm {algorithm} is not supported")
    signature = parts.next().expect(der.OCTETS, "SignerInfo signature")
    parts.optional(CONTEXT_1)  # unsigned attributes: nobody's word
    parts.end()
    found = _attributes(attributes)
    expect_oid(_one(found, CONTENT_TYPE), TST_INFO, "contentType")
    certificate_hash, certificate_digest = _ess_certificate(
        _one(found, SIGNING_CERTIFICATE_V2)
    )
    return Signature(
        issuer_and_serial=signer.raw,
        hash=hashing,
        attributes=der.element(der.SET, attributes),
        content_digest=_one(found, MESSAGE_DIGEST).expect(der.OCTETS, "messageDigest"),
        certificate_hash=certificate_hash,
        certificate_digest=certificate_digest,
        signature=signature,
    )


def _attributes(raw: bytes) -> dict[str, Element]:
    found: dict[str, Element] = {}
    for node in der.read_all(raw, "signedAttrs"):
        parts = node.items(der.SEQUENCE, "a signed attribute")
        name = parts.next().oid("a signed attribute")
        if name in found:
            raise Malformed(f"timestamp: the signed attribute {name} is there twice")
        found[name] = parts.next()
        parts.end()
    return found


def _one(attributes: dict[str, Element], name: str) -> Element:
    """Return an attribute's one value (a SET OF one)."""
    if name not in attributes:
        what = "signingCertificateV2" if name == SIGNING_CERTIFICATE_V2 else name
        raise Malformed(f"timestamp: the signed attribute {what} is missing")
    return der.read(attributes[name].expect(der.SET, name), f"the attribute {name}")


def _ess_certificate(node: Element) -> tuple[type[hashes.HashAlgorithm], bytes]:
    """Return hash and digest of the signer's certificate (RFC 5035, 4): the first."""
    values = node.items(der.SEQUENCE, "signingCertificateV2")
    listed = values.next().items(der.SEQUENCE, "signingCertificateV2")
    first = listed.next().items(der.SEQUENCE, "ESSCertIDv2")
    part = first.next()
    algorithm: type[hashes.HashAlgorithm] = hashes.SHA256  # the default
    if part.tag == der.SEQUENCE:
        algorithm, part = read_hash(part, "ESSCertIDv2"), first.next()
    return algorithm, part.expect(der.OCTETS, "ESSCertIDv2")


def _algorithm(node: Element, what: str) -> str:
    """Return the name in an AlgorithmIdentifier that has no parameters, or NULL."""
    parts = node.items(der.SEQUENCE, what)
    name = parts.next().oid(what)
    null = parts.optional(der.NULL)
    parts.end()
    if null is not None and null.content:
        raise Malformed(f"{what}: parameters are not expected")
    return name


def read_hash(node: Element, what: str) -> type[hashes.HashAlgorithm]:
    """Return the hash that an AlgorithmIdentifier names; raises Malformed."""
    name = _algorithm(node, what)
    if name not in _HASHES:
        raise Malformed(
            f"timestamp: {what} uses hash {name}; expected SHA-256, SHA-384 or SHA-512"
        )
    return _HASHES[name]


def explicit(node: Element, tag: int, what: str) -> Element:
    """Return the one element within an explicit tag; raises Malformed."""
    return der.read(node.expect(tag, what), what)


def expect_oid(node: Element, name: str, what: str) -> None:
    """Raise Malformed unless an element is this object identifier."""
    found = node.oid(what)
    if found != name:
        raise Malformed(f"{what} is of type {found}, expected {name}")
