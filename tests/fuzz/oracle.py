"""What may be accepted, said a second time: slowly, plainly, and from the bytes.

Nothing here is shared with `ztserve`. The rules are read off the standards X509-SVID
and SPIFFE-ID; the DER is read by `tests.fuzz.der`, signatures are checked with the
issuer's public key directly. Each `why_not...` returns the first rule broken, or an
empty text.
"""

from __future__ import annotations

import string
from datetime import UTC, datetime
from itertools import pairwise, permutations
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import load_der_public_key

from tests.fuzz.der import Node, parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KEY_USAGE, ALTERNATIVE_NAME, BASIC, NAME_CONSTRAINTS, EXTENDED_USAGE = (
    b"\x55\x1d\x0f",
    b"\x55\x1d\x11",
    b"\x55\x1d\x13",
    b"\x55\x1d\x1e",
    b"\x55\x1d\x25",
)
UNDERSTOOD = {KEY_USAGE, ALTERNATIVE_NAME, BASIC, NAME_CONSTRAINTS, EXTENDED_USAGE}
SERVER, CLIENT = (bytes.fromhex("2b060105050703") + bytes((n,)) for n in (1, 2))
EC, RSA = bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a864886f70d010101")
CURVES = {
    bytes.fromhex("2a8648ce3d030107"),
    bytes.fromhex("2b81040022"),
    bytes.fromhex("2b81040023"),
}
SIGNATURES = {  # algorithm: hash; of RSA with PSS there is none in the corpus
    bytes.fromhex("2a8648ce3d040302"): hashes.SHA256(),
    bytes.fromhex("2a8648ce3d040303"): hashes.SHA384(),
    bytes.fromhex("2a8648ce3d040304"): hashes.SHA512(),
    bytes.fromhex("2a864886f70d01010b"): hashes.SHA256(),
}


class Broken(Exception):
    """A rule is broken."""


UNREADABLE = (Broken, ValueError, LookupError, TypeError, AttributeError)
UNREADABLE += (UnsupportedAlgorithm,)


def rule(fact: object, what: str) -> None:
    if not fact:
        raise Broken(what)


def why_not_an_id(text: str) -> str:
    """Return the rule of SPIFFE-ID 2 that `text` breaks (I1 to I12)."""
    if not text.startswith("spiffe://"):
        return "I1 scheme"
    if len(text.encode("utf-8", "surrogatepass")) > 2048:
        return "I10 length"
    name, *segments = text[9:].split("/")
    if not name or len(name) > 255:
        return "I2 I10 trust domain"
    if any(c not in string.ascii_lowercase + string.digits + ".-_" for c in name):
        return "I3 I4 I5 I6 trust domain"
    if "" in segments or "." in segments or ".." in segments:
        return "I7 I8 segment"
    allowed = string.ascii_letters + string.digits + ".-_"
    if any(c not in allowed for segment in segments for c in segment):
        return "I5 I6 I9 I12 segment"
    return ""


class Certificate:
    """A certificate's fields, from its DER. Raises one of UNREADABLE.

    Of a trust `anchor` only what it says of its key counts, not how it is signed.
    """

    def __init__(self, der: bytes, *, anchor: bool = False) -> None:
        (outer,) = parse(der)
        tbs, algorithm, signature = outer.body
        self.tbs = tbs.der
        rule(outer.der == der, "not DER")
        fields = list(tbs.body)
        version = fields.pop(0) if fields[0].tag == 0xA0 else Node(0xA0, ())
        rule(anchor or version.der == b"\xa0\x03\x02\x01\x02", "version")
        serial, inner, issuer, validity, subject, key, *others = fields
        rule(serial.tag == 0x02 and 0 < len(serial.body) <= 20, "serial")
        rule(anchor or inner.der == algorithm.der, "two signature algorithms")
        self.algorithm = algorithm.body[0].body
        rule(anchor or signature.body[:1] == b"\0", "signature bits")
        self.signature = signature.body[1:]
        self.issuer, self.subject = issuer.der, subject.der
        self.not_before, self.not_after = (_moment(node) for node in validity.body)
        self.key_der = key.der
        kind = [node.body for node in key.body[0].body if node.tag == 0x06]
        self.key_allowed = kind[0] == RSA or (kind[0] == EC and kind[1] in CURVES)
        self.extensions = _extensions(others, anchor=anchor)

    def key(self):
        return load_der_public_key(self.key_der)

    def of(self, oid: bytes) -> list[Node]:
        return self.extensions[oid][1] if oid in self.extensions else []

    def critical(self, oid: bytes) -> bool:
        return self.extensions[oid][0]

    def names(self, tag: int) -> list[str]:
        found = self.of(ALTERNATIVE_NAME)
        if not found:
            return []
        return [n.body.decode("ascii") for n in found[0].body if n.tag == tag]

    def usage(self, bit: int) -> bool:
        body = self.of(KEY_USAGE)[0].body
        return len(body) > 1 + bit // 8 and bool(
            body[1 + bit // 8] >> (7 - bit % 8) & 1
        )

    def is_ca(self) -> bool:
        found = self.of(BASIC)
        return bool(found and found[0].body and found[0].body[0].der == b"\x01\x01\xff")

    def path_length(self) -> int | None:
        lengths = [n.body for n in self.of(BASIC)[0].body if n.tag == 0x02]
        return int.from_bytes(lengths[0]) if lengths else None


def _moment(node: Node) -> datetime:
    text = node.body.decode("ascii")
    if node.tag == 0x17:  # UTCTime: of two centuries (RFC 5280, 4.1.2.5.1)
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _extensions(
    others: Sequence[Node], *, anchor: bool
) -> dict[bytes, tuple[bool, list[Node]]]:
    found = {}
    for holder in others:
        rule(holder.tag == 0xA3, "unique identifiers")
        for node in holder.body[0].body:
            oid, *critical, value = node.body
            rule(oid.body not in found, "an extension twice")
            flag = bool(critical) and critical[0].der == b"\x01\x01\xff"
            inside = value.body if isinstance(value.body, tuple) else []
            found[oid.body] = (flag, inside)
    for oid, (critical, inside) in found.items():
        rule(
            anchor or oid in UNDERSTOOD or not critical, "an unknown critical extension"
        )
        rule(inside or oid not in UNDERSTOOD, "an empty extension")
    return found


def why_not_a_signer(der: bytes) -> str:
    """Return the rule that the signing certificate `der` breaks (X9, X10)."""
    try:
        _signer(Certificate(der, anchor=True))
    except UNREADABLE as error:
        return str(error) or "malformed"
    return ""


def _signer(certificate: Certificate) -> None:
    rule(certificate.is_ca(), "X9 not a CA")
    rule(KEY_USAGE in certificate.extensions, "X9 no key usage")
    rule(certificate.usage(5), "X9 no keyCertSign")
    uris = certificate.names(0x86)
    rule(len(uris) <= 1, "X1 two URI names")
    for uri in uris:
        rule(not why_not_an_id(uri) and "/" not in uri[9:], "X9 ID with a path")
        rule(certificate.critical(KEY_USAGE), "X5 key usage not critical")
    _key(certificate)


def _key(certificate: Certificate) -> None:
    rule(certificate.key_allowed, "key of another kind")
    key = certificate.key()
    rule(isinstance(key, ec.EllipticCurvePublicKey) or key.key_size >= 2048, "weak key")


def why_not_a_peer(
    chain: Sequence[bytes], bundles: Mapping[str, Sequence[bytes]], now: datetime
) -> str:
    """Return the rule that forbids to accept `chain` (X1 to X12 and RFC 5280)."""
    try:
        _peer(chain, bundles, now)
    except UNREADABLE as error:
        return str(error) or "malformed"
    return ""


def _peer(
    chain: Sequence[bytes], bundles: Mapping[str, Sequence[bytes]], now: datetime
) -> None:
    rule(0 < len(chain) <= 8, "count")
    leaf = Certificate(chain[0])
    uris = leaf.names(0x86)
    rule(len(uris) == 1, "X1 one URI name")
    rule(not why_not_an_id(uris[0]) and "/" in uris[0][9:], "X6 ID of a workload")
    rule(not leaf.is_ca(), "X2 X10 a CA")
    rule(KEY_USAGE in leaf.extensions and leaf.critical(KEY_USAGE), "X5 key usage")
    rule(leaf.usage(0), "X4 digitalSignature")
    rule(not leaf.usage(5) and not leaf.usage(6), "X3 keyCertSign or cRLSign")
    if EXTENDED_USAGE in leaf.extensions:
        uses = [node.body for node in leaf.of(EXTENDED_USAGE)[0].body]
        rule(SERVER in uses and CLIENT in uses, "X8 one of two uses")
    if leaf.subject == b"\x30\0":
        rule(leaf.critical(ALTERNATIVE_NAME), "X11 no subject")
    _key(leaf)
    roots = bundles.get(uris[0][9:].partition("/")[0], ())
    signers = list(_readable(chain[1:], anchor=False))
    anchors = list(_readable(roots, anchor=True))
    rule(any(_paths(leaf, signers, anchors, now)), "X7 no path to the trust domain")


def _readable(certificates: Sequence[bytes], *, anchor: bool):
    for der in certificates:
        try:
            yield Certificate(der, anchor=anchor)
        except UNREADABLE:
            continue  # no path leads through it


def _paths(leaf, signers, anchors, now):
    for count in range(len(signers) + 1):
        for between in permutations(signers, count):
            for anchor in anchors:
                try:
                    _path([leaf, *between, anchor], now)
                except UNREADABLE:
                    continue
                yield True


def _path(path: Sequence[Certificate], now: datetime) -> None:
    for certificate in path:
        rule(certificate.not_before <= now <= certificate.not_after, "validity")
    for depth, (child, parent) in enumerate(pairwise(path)):
        _signer(parent)
        rule(child.issuer == parent.subject, "issuer")
        below = [c for c in path[1 : depth + 1] if c.issuer != c.subject]
        limit = parent.path_length()
        rule(limit is None or len(below) <= limit, "path length")
        _constrained(parent, path[: depth + 1])
        _signed(child, parent.key())


def _constrained(parent: Certificate, below: Sequence[Certificate]) -> None:
    """Name constraints: DNS names by their labels; of another kind nothing passes."""
    if NAME_CONSTRAINTS not in parent.extensions:
        return
    names = [name for certificate in below for name in certificate.names(0x82)]
    for subtrees in parent.of(NAME_CONSTRAINTS)[0].body:
        bases = [tree.body[0] for tree in subtrees.body]
        rule(all(base.tag == 0x82 for base in bases), "name constraint not understood")
        ends = ["." + base.body.decode("ascii").lower() for base in bases]
        for name in names:
            inside = any(("." + name.lower()).endswith(end) for end in ends)
            rule(inside == (subtrees.tag == 0xA0), "name constraint")


def _signed(child: Certificate, key) -> None:
    algorithm = SIGNATURES.get(child.algorithm)
    rule(algorithm, "signature algorithm")
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(child.signature, child.tbs, ec.ECDSA(algorithm))
        else:
            key.verify(child.signature, child.tbs, padding.PKCS1v15(), algorithm)
    except InvalidSignature as error:
        raise Broken("signature") from error
