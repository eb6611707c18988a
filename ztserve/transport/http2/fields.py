"""Header fields: read from HPACK and judged, and written (RFC 9113, 8; RFC 7541).

Reading is hpack's. Blocks that leave the dynamic table as it was are remembered by
their bytes: until the table changes, the same bytes mean the same fields. Writing
never uses the dynamic table, so that a block can be made once and sent on every
connection.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from hpack import Decoder
from hpack.exceptions import (
    HPACKError,
    InvalidTableSizeError,
    OversizedHeaderListError,
)
from hpack.table import HeaderTable

from ztserve.transport.http2.bounds import HARD
from ztserve.transport.http2.errors import FatalError, StreamError, calm
from ztserve.transport.http2.frames import Code

Fields: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""Names and values, pseudo-header fields excluded, in the order of arrival."""
Block: TypeAlias = bytes
"""Fields as they are sent."""
_Head = TypeVar("_Head", bound="Request | Response")
_T = TypeVar("_T")

MAX_UPDATES = 2
"""Updates of the table's size in one block (RFC 7541, section 4.2)."""
MAX_REMEMBERED_BYTES = 64 * 1024
"""Of heads, and of trailers, whose meaning is kept on one connection; by the size that
a list of fields has (RFC 9113, section 6.5.2)."""

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(
    rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*"
    rb"[\x21-\x7e\x80-\xff])?)?"
)
_LENGTH = re.compile(rb"[0-9]{1,15}")
_PATH = re.compile(rb"/[\x21-\x7e]*|\*")
_AUTHORITY = re.compile(rb"[\x21-\x3f\x41-\x7e]*")
"""A host and a port: without userinfo (section 8.3.1)."""
_CONNECTION = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Fields of one hop in HTTP/1.1, which HTTP/2 does not have (section 8.2.2)."""
_REQUEST = frozenset((b":method", b":scheme", b":authority", b":path"))
_RESPONSE = frozenset((b":status",))


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request (section 8.3.1)."""

    method: bytes
    scheme: bytes
    authority: bytes
    path: bytes
    fields: Fields
    content_length: int | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """The head of a response (section 8.3.2); 100 to 199: another one follows."""

    status: int
    fields: Fields
    content_length: int | None = None


class FieldReader(Generic[_Head]):
    """Reads the heads of one kind, and trailers, from one connection's blocks."""

    def __init__(self, kind: type[_Head], max_list_bytes: int) -> None:
        self._kind: Any = _request if kind is Request else _response
        self._most = max_list_bytes
        self._decoder = Decoder(max_header_list_size=HARD * max_list_bytes)
        self._decoder.header_table = self._table = _Table()
        self._heads: _Known[_Head] = _Known()
        self._trailers: _Known[Fields] = _Known()

    def head(self, block: bytes) -> _Head:
        """Return the head that `block` says. Raises StreamError, FatalError."""
        known = self._heads.get(block)
        if known is not None:
            return known
        listed = self._listed(block)
        size = self._checked_size(block, listed)
        found: _Head = self._kind(listed)
        if not self._table.changed:
            self._heads.keep(block, found, size)
        return found

    def trailers(self, block: bytes) -> Fields:
        """Return the trailers that `block` says; raises as `head` does."""
        known = self._trailers.get(block)
        if known is not None:
            return known
        listed = self._listed(block)
        size = self._checked_size(block, listed)
        for name, value in listed:
            _check(name, value)
        found = tuple(listed)
        if not self._table.changed:
            self._trailers.keep(block, found, size)
        return found

    def _checked_size(self, block: bytes, listed: list[tuple[bytes, bytes]]) -> int:
        size = sum(len(name) + len(value) + 32 for name, value in listed)
        if max(size, len(block)) > self._most:
            reason = f"header fields of {size} bytes, at most {self._most}"
            raise StreamError(Code.ENHANCE_YOUR_CALM, reason)
        return max(size, len(block))

    def skip(self, block: bytes) -> None:
        """Read a block for the table's sake alone. Raises FatalError."""
        self._listed(block)

    def _listed(self, block: bytes) -> list[tuple[bytes, bytes]]:
        self._table.changed, self._table.updates = False, 0
        try:
            listed = self._decoder.decode(block, raw=True)
        except OversizedHeaderListError as error:
            # What is left of the block was not read, and the table with it.
            most = self._decoder.max_header_list_size
            raise calm(f"a header list over {most} bytes") from error
        except (HPACKError, IndexError, ValueError) as error:
            # Its words would be sent, and may have an address of our memory in them.
            reason = "a header block that cannot be read"
            raise FatalError(Code.COMPRESSION_ERROR, reason) from error
        if self._table.changed:
            self._heads.forget()
            self._trailers.forget()
        return [(bytes(name), bytes(value)) for name, value in listed]


class _Known(Generic[_T]):
    """What blocks mean, by their bytes."""

    def __init__(self) -> None:
        self._found: dict[bytes, _T] = {}
        self.size = 0
        """Of all of them, as their lists have it."""
        self.get = self._found.get

    def keep(self, block: bytes, found: _T, size: int) -> None:
        """Remember one; where they become too large, all others are forgotten."""
        if self.size + size > MAX_REMEMBERED_BYTES:
            self.forget()
        self._found[block] = found
        self.size += size

    def forget(self) -> None:
        """Forget all."""
        self._found.clear()
        self.size = 0


_set_maxsize = vars(HeaderTable)["maxsize"].fset


class _Table(HeaderTable):
    """A table that tells whether a block changed it."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = False
        self.updates = 0
        """Changes of the size in one block."""

    def add(self, name: bytes, value: bytes) -> None:
        self.changed = True
        super().add(name, value)

    @property
    def maxsize(self) -> int:
        return self._maxsize

    @maxsize.setter
    def maxsize(self, size: int) -> None:
        self.changed = True
        self.updates += 1
        if self.updates > MAX_UPDATES:
            raise InvalidTableSizeError("more updates of the size than there can be")
        _set_maxsize(self, size)


def _request(listed: list[tuple[bytes, bytes]]) -> Request:
    pseudo, fields, length = _sorted(listed, _REQUEST)
    try:
        method, scheme = pseudo[b":method"], pseudo[b":scheme"]
        path = pseudo[b":path"]
    except KeyError as error:
        raise _malformed(f"no {error.args[0]!r}") from error
    authority = pseudo.get(b":authority", b"")
    if not _NAME.fullmatch(method.lower()) or method == b"CONNECT":
        raise _malformed(f":method {method[:80]!r}")
    if scheme not in (b"https", b"http") or not _PATH.fullmatch(path):
        raise _malformed(f":scheme {scheme[:80]!r}, :path {path[:80]!r}")
    if path == b"*" and method != b"OPTIONS":
        raise _malformed(":path * of a method other than OPTIONS")
    if not _AUTHORITY.fullmatch(authority):
        raise _malformed(f":authority {authority[:80]!r}")
    hosts = [value for name, value in fields if name == b"host"]
    if hosts and (len(hosts) > 1 or hosts[0] != (authority or hosts[0])):
        raise _malformed("host differs from :authority, or comes twice")
    return Request(method, scheme, authority, path, fields, length)


def _response(listed: list[tuple[bytes, bytes]]) -> Response:
    pseudo, fields, length = _sorted(listed, _RESPONSE)
    if any(name == b"te" for name, _ in fields):
        raise _malformed("te in a response")
    status = pseudo.get(b":status", b"")
    if len(status) != 3 or not status.isdigit() or not b"100" <= status < b"600":
        raise _malformed(f":status {status[:80]!r}")
    if status == b"101":  # which HTTP/2 does not have (section 8.6)
        raise _malformed(":status 101")
    if length is not None and status in (b"204", b"304"):
        length = 0  # it may be declared, but there is none (section 8.1.1)
    return Response(int(status), fields, length)


def _sorted(
    listed: list[tuple[bytes, bytes]], known: frozenset[bytes]
) -> tuple[dict[bytes, bytes], Fields, int | None]:
    """Split pseudo-header fields from the others, which follow them (section 8.3)."""
    pseudo: dict[bytes, bytes] = {}
    count = 0
    for name, value in listed:
        if name[:1] != b":":
            break
        if name not in known or name in pseudo:
            raise _malformed(f"pseudo-header field {name[:80]!r}")
        if not _VALUE.fullmatch(value):
            raise _malformed(f"the value of {name[:80]!r}")
        pseudo[name] = value
        count += 1
    fields = tuple(listed[count:])
    length: int | None = None
    for name, value in fields:
        _check(name, value)
        if name == b"content-length":
            if (
                not value.isdigit()
                or len(value) > 15
                or length not in (None, int(value))
            ):
                raise _malformed(f"content-length {value[:80]!r}")
            length = int(value)
    return pseudo, fields, length


def _check(name: bytes, value: bytes) -> None:
    """Refuse a field that is malformed (sections 8.2.1 and 8.2.2)."""
    if not _NAME.fullmatch(name):
        raise _malformed(f"field name {name[:80]!r}")
    if not _VALUE.fullmatch(value):
        raise _malformed(f"the value of {name[:80]!r}")
    if name in _CONNECTION or (name == b"te" and value != b"trailers"):
        raise _malformed(f"field {name[:80]!r}: {value[:80]!r}")


def _check_own(name: bytes, value: bytes) -> None:
    """Refuse to write what we would not read. Raises ValueError."""
    try:
        if name in _REQUEST or name in _RESPONSE:
            name = b"x"  # its value is judged as any other
        _check(name, value)
    except StreamError as error:
        raise ValueError(error.reason) from error


def _malformed(reason: str) -> StreamError:
    return StreamError(Code.PROTOCOL_ERROR, reason)


# --- writing --------------------------------------------------------------------

_INDEX = {entry: at for at, entry in enumerate(HeaderTable.STATIC_TABLE, 1)}
_NAME_INDEX: dict[bytes, int] = {}
for _at, (_name, _) in enumerate(HeaderTable.STATIC_TABLE, 1):
    _NAME_INDEX.setdefault(_name, _at)
_SECRET = frozenset(
    (b"authorization", b"cookie", b"set-cookie", b"proxy-authorization")
)


def encode(fields: Iterable[tuple[bytes, bytes]]) -> Block:
    """Return `fields` as a block that means the same on every connection.

    Raises ValueError for a field that we would not read either: what comes from a call
    can add none.
    """
    given = tuple(fields)
    for name, value in given:
        _check_own(name, value)
    return written(given)


def written(fields: Iterable[tuple[bytes, bytes]]) -> Block:
    """Return `fields`, whatever they are, as a block.

    By the static table where it has them, and literal, not indexed, where not; what
    no intermediary may index either says so (RFC 7541, sections 6.1, 6.2.2, 6.2.3).
    """
    out = bytearray()
    for name, value in fields:
        index = _INDEX.get((name, value))
        if index is not None:
            out += _integer(index, 7, 0x80)
            continue
        first = 0x10 if name in _SECRET or name.endswith(b"-bin") else 0x00
        known = _NAME_INDEX.get(name)
        if known is not None:
            out += _integer(known, 4, first)
        else:
            out.append(first)
            out += _integer(len(name), 7, 0) + name
        out += _integer(len(value), 7, 0) + value
    return bytes(out)


def _integer(value: int, bits: int, first: int) -> bytes:
    """Return an integer with a prefix of `bits` (RFC 7541, section 5.1)."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((first | value,))
    out = bytearray((first | most,))
    value -= most
    while value >= 0x80:
        out.append(0x80 | value & 0x7F)
        value >>= 7
    out.append(value)
    return bytes(out)
