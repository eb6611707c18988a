"""Timestamps: an authority's word that these bytes were there at that time.

A response of RFC 3161 holds a CMS SignedData (`cms`) around a TSTInfo. Read strictly:
granted, and exact to a minute. Whose word counts is the trust policy's matter
(`trust.timestamping`).
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from ztserve.artifacts.statements import der
from ztserve.artifacts.statements.cms import (
    CONTEXT_0,
    CONTEXT_1,
    IMPLICIT_0,
    SIGNED_DATA,
    Signature,
    SignedData,
    der_of,
    digest,
    expect_oid,
    explicit,
    read_hash,
    read_signed_data,
)
from ztserve.artifacts.statements.der import Element
from ztserve.artifacts.statements.strict import Malformed

MAX_TIMESTAMP_BYTES = 64 << 10
MAX_ACCURACY = timedelta(minutes=1)
"""How coarse a time may be: an authority's clock counts only as exact as this."""


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
    expect_oid(token.next(), SIGNED_DATA, "timestamp token")
    signed = explicit(token.next(), CONTEXT_0, "timestamp token")
    token.end()
    return _tst_info(
        read_signed_data(signed.items(der.SEQUENCE, "timestamp: SignedData"))
    )


def _tst_info(signed: SignedData) -> Timestamp:
    """RFC 3161, 2.4.2."""
    parts = der.read(signed.info, "TSTInfo").items(der.SEQUENCE, "TSTInfo")
    if parts.next().integer("TSTInfo version") != 1:
        raise Malformed("timestamp: TSTInfo is not of version 1")
    parts.next().oid("TSTInfo policy")
    imprint = parts.next().items(der.SEQUENCE, "messageImprint")
    algorithm = read_hash(imprint.next(), "messageImprint")
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
        info=signed.info,
        certificates=signed.certificates,
        signature=signed.signature,
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
