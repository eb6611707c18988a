"""Timestamps: an authority's word that these bytes were there at that time.

A response of RFC 3161 holds a CMS SignedData (RFC 5652) around a TSTInfo. Read
strictly: granted, one signer, named by issuer and serial and by the hash of its
certificate (`signingCertificateV2`, RFC 5816), SHA-256 or more. Whose word counts is
the trust policy's matter (`trust.timestamping`).
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from ztserve.artifacts.statements import der
from ztserve.artifacts.statements.der import Element, Items
from ztserve.artifacts.statements.strict import Malformed

MAX_TIMESTAMP_BYTES = 64 << 10
MAX_CERTIFICATES = 8
MAX_ACCURACY = timedelta(minutes=1)
"""How coarse a time may be: an authority's clock counts only as exact as this."""

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
class Timestamp:
    """A parsed timestamp. Nothing in it counts before `check_timestamp`."""

    time: datetime
    """When (UTC); at most `MAX_ACCURACY` off, by the authority's own word."""
    nonce: int | None
    hash: type[hashes.HashAlgorithm]
    imprint: bytes
    """Digest of what was stamped, under `hash`."""
    info: bytes
    """DER of the TSTInfo, which is signed."""
    certificates: tuple[x509.Certificate, ...]
    signature: Signature


def digest(algorithm: type[hashes.HashAlgorithm], content: bytes) -> bytes:
    """Return the digest of the content."""
    hashing = hashes.Hash(algorithm())
    hashing.update(content)
    return hashing.finalize()


# --- reading --------------------------------------------------------------------


def parse_timestamp(raw: bytes) -> Timestamp:
    """Parse a TimeStampResp (RFC 3161, 2.4.2); raises Malformed."""
    if len(raw) > MAX_TIMESTAMP_BYTES:
        raise Malformed(
            f"a timestamp of {len(raw)} bytes, the limit is {MAX_TIMESTAMP_BYTES}"
        )
    response = der.read(raw, "timestamp").items(der.SEQUENCE, "timestamp")
    status = response.next().items(der.SEQUENCE, "timestamp status").next()
    if status.integer("timestamp status") != 0:
        raise Malformed(
            f"the authority did not grant a timestamp "
            f"(status {status.integer('timestamp status')})"
        )
    token = response.next().items(der.SEQUENCE, "timestamp token")
    response.end()
    _expect_oid(token.next(), SIGNED_DATA, "timestamp token")
    signed = _explicit(token.next(), CONTEXT_0, "timestamp token")
    token.end()
    return _signed_data(signed.items(der.SEQUENCE, "timestamp: SignedData"))


def _signed_data(parts: Items) -> Timestamp:
    """RFC 5652, 5.1."""
    if parts.next().integer("SignedData version") != 3:
        raise Malformed("timestamp: SignedData is not of version 3")
    parts.next().expect(der.SET, "SignedData digestAlgorithms")
    content = parts.next().items(der.SEQUENCE, "encapContentInfo")
    _expect_oid(content.next(), TST_INFO, "encapContentInfo")
    info = _explicit(content.next(), CONTEXT_0, "encapContentInfo").expect(
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
    return _tst_info(info, _certificates(certificates.content), signature)


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


def _tst_info(
    raw: bytes, certificates: tuple[x509.Certificate, ...], signature: Signature
) -> Timestamp:
    """RFC 3161, 2.4.2."""
    parts = der.read(raw, "TSTInfo").items(der.SEQUENCE, "TSTInfo")
    if parts.next().integer("TSTInfo version") != 1:
        raise Malformed("timestamp: TSTInfo is not of version 1")
    parts.next().oid("TSTInfo policy")
    imprint = parts.next().items(der.SEQUENCE, "messageImprint")
    algorithm = _hash(imprint.next(), "messageImprint")
    digested = imprint.next().expect(der.OCTETS, "messageImprint")
    imprint.end()
    parts.next().integer("TSTInfo serialNumber")
    moment = parts.next().time("TSTInfo genTime")
    accuracy = parts.optional(der.SEQUENCE)
    if accuracy is not None:
        _check_accuracy(accuracy)
    parts.optional(der.BOOLEAN)
    nonce = parts.optional(der.INTEGER)
    parts.optional(CONTEXT_0)  # a name for people
    if parts.optional(CONTEXT_1) is not None:
        raise Malformed("timestamp: TSTInfo has extensions, which are not supported")
    parts.end()
    return Timestamp(
        time=moment,
        nonce=None if nonce is None else nonce.integer("TSTInfo nonce"),
        hash=algorithm,
        imprint=digested,
        info=raw,
        certificates=certificates,
        signature=signature,
    )


def _check_accuracy(node: Element) -> None:
    """Refuse a time that is too coarse: seconds, millis [0], micros [1]."""
    parts = node.items(der.SEQUENCE, "TSTInfo accuracy")
    seconds = parts.optional(der.INTEGER)
    parts.optional(IMPLICIT_0)
    parts.optional(IMPLICIT_0 | 1)
    parts.end()
    # Both fractions are below a second (1 to 999).
    off = 1 + (seconds.integer("TSTInfo accuracy") if seconds else 0)
    if not 0 < off <= MAX_ACCURACY.total_seconds():
        raise Malformed(
            f"the timestamp is exact to {off} s only, the limit is "
            f"{MAX_ACCURACY.total_seconds():.0f} s"
        )


def _signer_info(parts: Items) -> Signature:
    """RFC 5652, 5.3."""
    if parts.next().integer("SignerInfo version") != 1:
        raise Malformed("timestamp: its signer is not named by issuer and serial")
    signer = parts.next()
    signer.expect(der.SEQUENCE, "SignerInfo sid")
    hashing = _hash(parts.next(), "SignerInfo digestAlgorithm")
    attributes = parts.next().expect(CONTEXT_0, "SignerInfo signedAttrs")
    algorithm = _algorithm(parts.next(), "SignerInfo signatureAlgorithm")
    if algorithm != _RSA and _SIGNATURES.get(algorithm) is not hashing:
        raise Malformed(f"timestamp: signature algorithm {algorithm} is not supported")
    signature = parts.next().expect(der.OCTETS, "SignerInfo signature")
    parts.optional(CONTEXT_1)  # unsigned attributes: nobody's word
    parts.end()
    found = _attributes(attributes)
    _expect_oid(_one(found, CONTENT_TYPE), TST_INFO, "contentType")
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
        algorithm, part = _hash(part, "ESSCertIDv2"), first.next()
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


def _hash(node: Element, what: str) -> type[hashes.HashAlgorithm]:
    name = _algorithm(node, what)
    if name not in _HASHES:
        raise Malformed(
            f"timestamp: {what} uses hash {name}; expected SHA-256, SHA-384 or SHA-512"
        )
    return _HASHES[name]


def _explicit(node: Element, tag: int, what: str) -> Element:
    return der.read(node.expect(tag, what), what)


def _expect_oid(node: Element, name: str, what: str) -> None:
    found = node.oid(what)
    if found != name:
        raise Malformed(f"{what} is of type {found}, expected {name}")


# --- checking -------------------------------------------------------------------


def check_imprint(timestamp: Timestamp, message: bytes) -> None:
    """Raise Malformed unless these very bytes were stamped."""
    if timestamp.imprint != digest(timestamp.hash, message):
        raise Malformed("the timestamp is that of another signature")


def signing_certificate(timestamp: Timestamp) -> x509.Certificate:
    """Return the certificate under whose key the timestamp says it was signed.

    Raises Malformed where none of those with it has the signed hash, or it is not
    the one that is named by issuer and serial.
    """
    signed = timestamp.signature
    for certificate in timestamp.certificates:
        raw = der_of(certificate)
        if digest(signed.certificate_hash, raw) == signed.certificate_digest:
            break
    else:
        raise Malformed("the timestamp lacks the certificate that its authority signed")
    # The bytes of the certificate itself: to encode a name anew could change it.
    parts = der.read(certificate.tbs_certificate_bytes, "certificate").items(
        der.SEQUENCE, "certificate"
    )
    parts.optional(CONTEXT_0)
    serial, _, issuer = parts.next(), parts.next(), parts.next()
    named = der.sequence(issuer.raw, serial.raw)
    if named != signed.issuer_and_serial:
        raise Malformed("the timestamp names another certificate as its signer's")
    return certificate


def check_timestamp(
    timestamp: Timestamp, message: bytes, certificate: x509.Certificate
) -> None:
    """Raise Malformed unless the holder of the certificate stamped `message`.

    Whether that certificate counts is not judged here.
    """
    check_imprint(timestamp, message)
    signed = timestamp.signature
    if signed.content_digest != digest(signed.hash, timestamp.info):
        raise Malformed("the timestamp was changed after its authority signed it")
    key = certificate.public_key()
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signed.signature, signed.attributes, ec.ECDSA(signed.hash()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(
                signed.signature, signed.attributes, padding.PKCS1v15(), signed.hash()
            )
        else:
            raise Malformed(f"timestamp: a key of kind {type(key).__name__}")
    except InvalidSignature as error:
        raise Malformed("the timestamp's signature does not hold") from error


def der_of(certificate: x509.Certificate) -> bytes:
    """Return a certificate in DER."""
    return certificate.public_bytes(serialization.Encoding.DER)
