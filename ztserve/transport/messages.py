"""Messages in the body of a gRPC call (LENGTH-PREFIXED-MESSAGE), without I/O.

"gRPC over HTTP2" of the gRPC project (PROTOCOL-HTTP2.md) is the standard; names of its
grammar are in capitals here.
"""

import zlib
from collections.abc import Iterator

from ztserve.errors import InvalidInput
from ztserve.transport.status import Code

PREFIX_BYTES = 5
_LARGE_BYTES = 4096
"""Of a piece that is worth an object of its own, and no copy."""
_WHOLE_BYTES = 64 * 1024
"""A smaller message is copied behind its prefix: one frame instead of two."""


class Unreadable(Exception):
    """Not what gRPC has in a body, or in fields; `code` is gRPC's for it."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Compressed(bytes):
    """A message as it came, compressed with gzip: `expanded` makes it whole."""

    __slots__ = ()


class Reassembly:
    """Makes messages of the pieces of a body (LENGTH-PREFIXED-MESSAGE), in order.

    A message of over `most` bytes is InvalidInput. What is `Compressed` stays so: a
    few bytes may become very many, which is for whoever asks for that message.
    """

    __slots__ = ("_gzip", "_head", "_left", "_most", "_pieces", "held")

    def __init__(self, most: int, *, gzip: bool = False) -> None:
        self._most = most
        self._gzip = gzip
        """Whether messages may be compressed with gzip (the head said so)."""
        self._head = b""
        """What there is of the prefix of the message that is coming."""
        self._left = 0
        """Bytes of it that are still to come, once its prefix is there."""
        self._pieces: list[bytes | bytearray] = []
        self.held = 0
        """Bytes of a message that has begun and is not whole."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each message that is whole with `data`.

        Raises Unreadable, and InvalidInput for a message that is too large.
        """
        if not self.held and len(data) >= PREFIX_BYTES and not data[0]:
            # What happens nearly always: one whole message in one piece.
            size = int.from_bytes(data[1:PREFIX_BYTES], "big") + PREFIX_BYTES
            if size == len(data) <= self._most + PREFIX_BYTES:
                yield data[PREFIX_BYTES:]
                return
        at = 0
        while at < len(data):
            if len(self._head) < PREFIX_BYTES:
                more = data[at : at + PREFIX_BYTES - len(self._head)]
                self._head += more
                at += len(more)
                self.held += len(more)
                if len(self._head) < PREFIX_BYTES:
                    return
                self._left = self._announced()
            piece = data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            self._keep(piece)
            if not self._left:
                yield self._whole()

    def _keep(self, piece: bytes) -> None:
        """Keep a piece as it is; small ones together, each object costs memory."""
        self.held += len(piece)
        if len(piece) >= _LARGE_BYTES or not self._pieces:
            self._pieces.append(piece)
        elif isinstance(self._pieces[-1], bytearray):
            self._pieces[-1] += piece
        else:
            self._pieces.append(bytearray(piece))

    def _whole(self) -> bytes:
        message = b"".join(self._pieces)
        compressed = self._head[0]
        self._pieces.clear()
        self._head, self.held = b"", 0
        return Compressed(message) if compressed else message

    def _announced(self) -> int:
        flag = self._head[0]
        if flag > 1:
            raise Unreadable(Code.INTERNAL, f"a message begins with {flag}, not 0 or 1")
        if flag and not self._gzip:
            raise Unreadable(Code.INTERNAL, "a compressed message, as nobody agreed on")
        size = int.from_bytes(self._head[1:], "big")
        if size > self._most:
            raise InvalidInput(
                f"the message has {size} bytes, the limit is {self._most}"
            )
        return size


def expanded(message: Compressed, most: int) -> bytes:
    """Return a message that came compressed as it was.

    Raises Unreadable, and InvalidInput for one of over `most` bytes.
    """
    expander = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        whole = expander.decompress(message, most + 1)
    except zlib.error as error:
        raise Unreadable(Code.INTERNAL, f"not gzip: {error}") from error
    if len(whole) > most:
        raise InvalidInput(
            f"the message expands to over {most} bytes, which is the limit"
        )
    if not expander.eof or expander.unused_data:
        raise Unreadable(Code.INTERNAL, "gzip that is cut short, or more than gzip")
    return whole


def framed(message: bytes) -> bytes:
    """Return a message as it stands in a body, not compressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def body(message: bytes) -> tuple[bytes, ...]:
    """Return the body of a unary call, in pieces: what is large is not copied."""
    if len(message) < _WHOLE_BYTES:
        return (framed(message),)
    return b"\0" + len(message).to_bytes(4, "big"), message
