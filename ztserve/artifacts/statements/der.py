"""DER, as far as timestamps need it: strict reading, and writing.

Read strictly: definite lengths in their shortest form, single-byte tags, nothing
behind the end. Every `read` goes one level deep, so that nesting costs no stack.
Source: ITU-T X.690 (02/2021), sections 8 and 10.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography.x509 import ObjectIdentifier

from ztserve.artifacts.statements.strict import Malformed

BOOLEAN, INTEGER, OCTETS, NULL, OID = 0x01, 0x02, 0x04, 0x05, 0x06
UTF8, GENERALIZED_TIME, SEQUENCE, SET = 0x0C, 0x18, 0x30, 0x31
MAX_INTEGER_BYTES = 64
"""Of an INTEGER: serial numbers and nonces are shorter (RFC 5280, 4.1.2.2)."""
MAX_ITEMS = 256
"""Elements of one SEQUENCE or SET that are read."""


@dataclass(frozen=True, slots=True)
class Element:
    """One element: its tag byte, its content, and all of it."""

    tag: int
    content: bytes
    raw: bytes

    def items(self, tag: int, what: str) -> "Items":
        """Return the elements within, of which this one must have the `tag`."""
        return Items(read_all(self.expect(tag, what), what), what)

    def expect(self, tag: int, what: str) -> bytes:
        """Return the content where the tag is this one; raises Malformed."""
        if self.tag != tag:
            raise Malformed(f"{what}: DER tag {self.tag:#04x}, expected {tag:#04x}")
        return self.content

    def integer(self, what: str) -> int:
        """Return an INTEGER in its shortest form; raises Malformed."""
        content = self.expect(INTEGER, what)
        if len(content) > MAX_INTEGER_BYTES:
            raise Malformed(
                f"{what}: an integer of {len(content)} bytes, the limit is "
                f"{MAX_INTEGER_BYTES}"
            )
        value = int.from_bytes(content, signed=True)
        if not content or integer(value) != self.raw:
            raise Malformed(f"{what}: not an integer in DER")
        return value

    def oid(self, what: str) -> str:
        """Return an OBJECT IDENTIFIER in dots; raises Malformed."""
        content = self.expect(OID, what)
        arcs, value = [], 0
        for position, byte in enumerate(content):
            if value == 0 and byte == 0x80:
                break
            value = value << 7 | byte & 0x7F
            if value >> 128:
                break
            if byte < 0x80:
                arcs.append(value)
                value = 0
            elif position == len(content) - 1:
                break
        else:
            if arcs:
                first = min(arcs[0] // 40, 2)
                return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))
        raise Malformed(f"{what}: not an object identifier in DER")

    def time(self, what: str) -> datetime:
        """Return a GeneralizedTime in UTC (RFC 3161, 2.4.2); raises Malformed."""
        text = self.expect(GENERALIZED_TIME, what).decode("latin-1")
        whole, dot, fraction = text.removesuffix("Z").partition(".")
        digits = whole.isascii() and whole.isdigit() and len(whole) == 14
        tidy = not dot or (
            fraction.isascii() and fraction.isdigit() and fraction[-1] != "0"
        )
        if not (text.endswith("Z") and digits and tidy):
            raise Malformed(f"{what}: not a time in UTC, as YYYYMMDDhhmmss[.s]Z")
        try:
            moment = datetime.strptime(whole, "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        except ValueError as error:
            raise Malformed(f"{what}: {whole!r} is no time") from error
        return moment.replace(microsecond=int((fraction or "0")[:6].ljust(6, "0")))


class Items:
    """The elements of a SEQUENCE or SET, taken one by one in their order."""

    def __init__(self, elements: list[Element], what: str) -> None:
        self._left = elements
        self._what = what

    def next(self) -> Element:
        """Take the next element; raises Malformed where there is none."""
        if not self._left:
            raise Malformed(f"{self._what}: ends too early")
        return self._left.pop(0)

    def optional(self, tag: int) -> Element | None:
        """Take the next element if it has the `tag`."""
        return self._left.pop(0) if self._left and self._left[0].tag == tag else None

    def rest(self) -> list[Element]:
        """Take all that is left."""
        left, self._left = self._left, []
        return left

    def end(self) -> None:
        """Raise Malformed where something is left."""
        if self._left:
            raise Malformed(f"{self._what}: has more than it should")


def read(raw: bytes, what: str) -> Element:
    """Read one element that is all of `raw`; raises Malformed."""
    elements = read_all(raw, what)
    if len(elements) != 1:
        raise Malformed(f"{what}: {len(elements)} DER elements, expected one")
    return elements[0]


def read_all(raw: bytes, what: str) -> list[Element]:
    """Read the elements that follow each other in `raw`; raises Malformed."""
    elements: list[Element] = []
    at = 0
    while at < len(raw):
        if len(elements) == MAX_ITEMS:
            raise Malformed(f"{what}: more than {MAX_ITEMS} DER elements")
        start, end = _bounds(raw, at, what)
        elements.append(Element(raw[at], raw[start:end], raw[at:end]))
        at = end
    return elements


def _bounds(raw: bytes, at: int, what: str) -> tuple[int, int]:
    """Return where the content of the element at `at` begins and ends."""
    if raw[at] & 0x1F == 0x1F:
        raise Malformed(f"{what}: a DER tag of several bytes")
    head = raw[at + 1 : at + 6]
    count = head[0] & 0x7F if head and head[0] & 0x80 else 0
    if not head or len(head) < 1 + count or count > 4:
        raise Malformed(f"{what}: cut short")
    length = int.from_bytes(head[1 : 1 + count]) if count else head[0]
    # The shortest form; this refuses 0x80, the indefinite length, as well.
    if head[: 1 + count] != _length(length):
        raise Malformed(f"{what}: a length that is not DER")
    start = at + 2 + count
    if start + length > len(raw):
        raise Malformed(f"{what}: cut short")
    return start, start + length


# --- writing --------------------------------------------------------------------


def _length(length: int) -> bytes:
    if length < 0x80:
        return bytes([length])
    octets = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes([0x80 | len(octets)]) + octets


def element(tag: int, *parts: bytes) -> bytes:
    """Return an element of the `tag` whose content is the `parts`."""
    content = b"".join(parts)
    return bytes([tag]) + _length(len(content)) + content


def sequence(*parts: bytes) -> bytes:
    """Return a SEQUENCE of encoded elements."""
    return element(SEQUENCE, *parts)


def set_of(*parts: bytes) -> bytes:
    """Return a SET OF encoded elements, in DER's order."""
    return element(SET, *sorted(parts))


def integer(value: int) -> bytes:
    """Return an INTEGER."""
    size = (value + (value < 0)).bit_length() // 8 + 1
    return element(INTEGER, value.to_bytes(size, signed=True))


def oid(dotted: str) -> bytes:
    """Return an OBJECT IDENTIFIER; raises ValueError on what is none."""
    first, second, *others = map(int, ObjectIdentifier(dotted).dotted_string.split("."))
    content = b""
    for arc in (40 * first + second, *others):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | arc & 0x7F)
        content += bytes(reversed(groups))
    return element(OID, content)


def time(moment: datetime) -> bytes:
    """Return a GeneralizedTime in whole seconds, of an aware time."""
    text = moment.astimezone(UTC).strftime("%Y%m%d%H%M%SZ")
    return element(GENERALIZED_TIME, text.encode())
