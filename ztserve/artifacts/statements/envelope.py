"""Signed envelopes: a Sigstore bundle v0.3 around one DSSE signature.

Read strictly: exactly the fields of OpenSSF Model Signing v1.0's `key` and
`certificate` methods and RFC 3161 timestamps, exactly one signature, canonical base64.
A lone certificate and transparency logs are refused by name, never skipped.
Sources: sigstore ``bundle.proto`` v0.3, secure-systems-lab DSSE v1.0.2 (`pae`).
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from ztserve.artifacts.statements.cms import parse_certificate
from ztserve.artifacts.statements.keys import (
    PublicKey,
    key_id,
    signature_algorithm,
    strong_curve,
)
from ztserve.artifacts.statements.strict import (
    Malformed,
    Object,
    as_object,
    get,
    get_base64,
    get_objects,
    load_object,
    only,
)
from ztserve.artifacts.statements.timestamps import MAX_TIMESTAMP_BYTES
from ztserve.errors import ConfigError, VerificationError

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
MAX_BUNDLE_BYTES = 16 << 20
MAX_BUNDLE_PARTS = 1 << 12
"""Fields and entries: a bundle is a few long texts, and each part costs memory."""
MAX_CERTIFICATES = 8
MAX_CHAIN_BYTES = 32 << 10
MAX_TIMESTAMPS = 4
_MAX_SIGNATURE_BYTES = 256
_HINT = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Envelope:
    """A parsed envelope. Nothing in it counts before `check_signature`."""

    what: str
    """What it is, for messages, e.g. ``model.sig``."""
    payload: bytes
    payload_type: str
    signature: bytes
    """ECDSA signature over `pae(payload_type, payload)`, DER."""
    key_id: str
    """The key that is said to have signed: ``sha256:<64 hex digits>``."""
    chain: tuple[bytes, ...] = ()
    """Certificates (DER, leaf first) said to be that key's; none: a key of its own."""
    timestamps: tuple[bytes, ...] = ()
    """RFC 3161 responses (DER) that are said to be over `signature`."""

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the payload: the identity of what is signed.

        Not of the envelope: an ECDSA signature can be rewritten by anyone.
        """
        return "sha256:" + hashlib.sha256(self.payload).hexdigest()


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def parse_envelope(
    raw: bytes, *, what: str, payload_type: str = IN_TOTO_TYPE
) -> Envelope:
    """Parse a bundle; raises VerificationError naming `what` and the fault."""
    try:
        check_parts(raw)
        return _parse(load_object(raw, limit=MAX_BUNDLE_BYTES), what, payload_type)
    except Malformed as error:
        raise VerificationError(f"{what}: {error}") from error


def check_parts(raw: bytes) -> None:
    """Raise Malformed where parsing would take many times the memory of the text."""
    parts = sum(map(raw.count, (b"{", b"[", b",")))
    if parts > MAX_BUNDLE_PARTS:
        raise Malformed(f"over {MAX_BUNDLE_PARTS} fields and entries: no bundle")


def _parse(bundle: Object, what: str, payload_type: str) -> Envelope:
    only(bundle, ("mediaType", "verificationMaterial", "dsseEnvelope"), "the bundle")
    _expect(bundle, "mediaType", BUNDLE_TYPE)
    material = as_object(
        get(bundle, "verificationMaterial", dict), "verificationMaterial"
    )
    dsse = as_object(get(bundle, "dsseEnvelope", dict), "dsseEnvelope")
    only(dsse, ("payload", "payloadType", "signatures"), "dsseEnvelope")
    _expect(dsse, "payloadType", payload_type)
    signatures = get_objects(dsse, "signatures", limit=1 << 16)
    if len(signatures) != 1:
        raise Malformed(f"exactly one signature is expected, not {len(signatures)}")
    only(signatures[0], ("sig", "keyid"), "the signature")
    signature = get_base64(signatures[0], "sig")
    if len(signature) > _MAX_SIGNATURE_BYTES:
        raise Malformed(f"a signature of {len(signature)} bytes is too long")
    chain = _chain(material)
    return Envelope(
        what=what,
        payload=get_base64(dsse, "payload"),
        payload_type=payload_type,
        signature=signature,
        key_id=key_id(leaf_key(chain)) if chain else _key_hint(material),
        chain=chain,
        timestamps=_timestamps(material),
    )


_MATERIAL = (
    "publicKey",
    "x509CertificateChain",
    "tlogEntries",
    "timestampVerificationData",
)


def _chain(material: Object) -> tuple[bytes, ...]:
    """Return the certificates of the `certificate` method; none of the `key` method."""
    if "certificate" in material:
        raise Malformed(
            "certificate is not supported: sign with an elliptic-curve key, or with "
            "the whole chain in x509CertificateChain"
        )
    only(material, _MATERIAL, "verificationMaterial")
    if material.get("tlogEntries", []) != []:
        raise Malformed("tlogEntries is not supported: sign with a key or an SVID")
    if "x509CertificateChain" not in material:
        return ()
    if "publicKey" in material:
        raise Malformed("a key and a certificate chain: expected one of the two")
    node = as_object(get(material, "x509CertificateChain", dict), "the chain")
    only(node, ("certificates",), "x509CertificateChain")
    entries = get_objects(node, "certificates", limit=MAX_CERTIFICATES)
    for entry in entries:
        only(entry, ("rawBytes",), "a certificate")
    chain = tuple(get_base64(entry, "rawBytes") for entry in entries)
    size = sum(map(len, chain))
    if not chain or size > MAX_CHAIN_BYTES:
        raise Malformed(
            f"{len(chain)} certificates of {size} bytes; expected at least one, and "
            f"at most {MAX_CHAIN_BYTES} bytes"
        )
    return chain


def leaf_key(chain: Sequence[bytes]) -> PublicKey:
    """Return the key of the chain's first certificate; raises Malformed."""
    key = parse_certificate(chain[0], "the signer's").public_key()
    try:
        strong_curve(key, "the key of the signer's certificate")
    except ConfigError as error:
        raise Malformed(str(error)) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Malformed("the key of the signer's certificate is not elliptic-curve")
    return key


def _timestamps(material: Object) -> tuple[bytes, ...]:
    if "timestampVerificationData" not in material:
        return ()
    node = as_object(
        get(material, "timestampVerificationData", dict), "timestampVerificationData"
    )
    only(node, ("rfc3161Timestamps",), "timestampVerificationData")
    if "rfc3161Timestamps" not in node:
        return ()
    entries = get_objects(node, "rfc3161Timestamps", limit=MAX_TIMESTAMPS)
    for entry in entries:
        only(entry, ("signedTimestamp",), "a timestamp")
    found = tuple(get_base64(entry, "signedTimestamp") for entry in entries)
    if any(len(each) > MAX_TIMESTAMP_BYTES for each in found):
        raise Malformed(f"a timestamp is larger than {MAX_TIMESTAMP_BYTES} bytes")
    return found


def _key_hint(material: Object) -> str:
    public_key = as_object(get(material, "publicKey", dict), "publicKey")
    only(public_key, ("hint",), "publicKey")
    hint = get(public_key, "hint", str)
    if not _HINT.match(hint):
        raise Malformed("publicKey.hint is not 64 lower-case hex digits")
    return "sha256:" + hint


def _expect(node: Object, key: str, value: str) -> None:
    found = get(node, key, str)
    if found != value:
        raise Malformed(f"{key} is {found!r}, expected {value!r}")


def check_signature(envelope: Envelope, key: PublicKey) -> None:
    """Raise VerificationError unless `key` signed the envelope's payload."""
    message = pae(envelope.payload_type, envelope.payload)
    try:
        key.verify(envelope.signature, message, signature_algorithm(key.curve))
    except InvalidSignature as error:
        raise VerificationError(
            f"{envelope.what}: the signature does not hold: the statement was "
            "changed after signing, or another key signed it"
        ) from error


def parse_statement(envelope: Envelope, predicate_type: str) -> tuple[Object, Object]:
    """Return (subject, predicate) of an in-toto statement with one subject.

    Raises Malformed. Fields that in-toto does not define are ignored at the top
    level, as its parsing rules demand.
    """
    statement = load_object(envelope.payload, limit=MAX_BUNDLE_BYTES)
    _expect(statement, "_type", STATEMENT_TYPE)
    _expect(statement, "predicateType", predicate_type)
    subjects = get_objects(statement, "subject", limit=1 << 16)
    if len(subjects) != 1:
        raise Malformed(f"exactly one subject is expected, not {len(subjects)}")
    only(subjects[0], ("name", "digest"), "the subject")
    return subjects[0], as_object(get(statement, "predicate", dict), "predicate")


def subject_digest(subject: Object) -> str:
    """Return the hex SHA-256 of a subject that has that one digest.

    Raises Malformed.
    """
    digest = as_object(get(subject, "digest", dict), "the subject's digest")
    only(digest, ("sha256",), "the subject's digest")
    value = get(digest, "sha256", str)
    if not _HINT.match(value):
        raise Malformed("the subject's sha256 is not 64 lower-case hex digits")
    return value
