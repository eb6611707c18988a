"""Bytes to frames: the preface, the framing, and header blocks made whole."""

from collections.abc import Iterator
from typing import TypeAlias

from ztserve.transport.http2 import frames
from ztserve.transport.http2.bounds import HARD, Bounds
from ztserve.transport.http2.errors import FatalError, calm, missized, offence

Frame: TypeAlias = tuple[int, int, int, bytes]
"""Kind, flags, stream and payload. That of HEADERS is the whole block, and nothing
else: padding, priority and CONTINUATION frames are dealt with."""


class Intake:
    """Cuts what arrives into frames, none of them larger than the bounds allow."""

    __slots__ = ("_block", "_bounds", "_more", "_preface", "_rest", "_settings")

    def __init__(self, bounds: Bounds, *, preface: bool) -> None:
        self._bounds = bounds
        self._rest = bytearray()
        """What there is of a frame, or of the preface, that is not complete."""
        self._preface = preface
        """Whether the preface of a client is still to come."""
        self._settings = True
        """Whether the first frame is, which is SETTINGS (section 3.4)."""
        self._block: tuple[int, int, bytearray] | None = None
        """Flags, stream and what there is of a block that is not complete."""
        self._more = 0
        """CONTINUATION frames of it."""

    def frames(self, data: bytes) -> Iterator[Frame]:
        """Yield each frame that is complete with `data`. Raises FatalError."""
        at = 0
        if self._preface:
            at = self._take_preface(data)
            if self._preface:
                return
        if self._rest:
            at = self._complete(data, at)
            if at < 0:
                return
            begun, self._rest = bytes(self._rest), bytearray()
            yield from self._cut(begun, 0)
        yield from self._cut(data, at)

    def _cut(self, data: bytes, at: int) -> Iterator[Frame]:
        """Yield the frames of `data` from `at` on; keep what is left of it."""
        size = len(data)
        while size - at >= frames.HEADER_BYTES:
            begin = at + frames.HEADER_BYTES
            end = begin + self._length(data, at)
            if end > size:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream_id = int.from_bytes(data[at + 5 : begin], "big") & 0x7FFFFFFF
            payload = data[begin:end]
            at = end
            _check(kind, stream_id, len(payload))
            if kind == frames.HEADERS or self._block is not None:
                whole = self._assembled(kind, flags, stream_id, payload)
                if whole is not None:
                    yield whole
            else:
                yield kind, flags, stream_id, payload
        if at < size:
            self._rest += data[at:] if at else data

    def _complete(self, data: bytes, at: int) -> int:
        """Add what is missing of the frame that was begun; -1 where that is not all.

        Return where in `data` the next begins. All the rest of it stays where it is.
        """
        rest = self._rest
        if len(rest) < frames.HEADER_BYTES:
            more = frames.HEADER_BYTES - len(rest)
            rest += data[at : at + more]
            at += more
            if len(rest) < frames.HEADER_BYTES:
                return -1
        more = frames.HEADER_BYTES + self._length(rest, 0) - len(rest)
        rest += data[at : at + more]
        at += more
        return at if at <= len(data) else -1

    def _length(self, data: bytes | bytearray, at: int) -> int:
        length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
        if self._settings:
            if data[at + 3] != frames.SETTINGS or data[at + 4] & frames.ACK:
                raise offence("the first frame is not SETTINGS")
            self._settings = False
        if length > self._bounds.max_frame_bytes:
            raise missized(
                f"a frame of {length} bytes, at most {self._bounds.max_frame_bytes}"
            )
        return length

    def _take_preface(self, data: bytes) -> int:
        """Return where in `data` it ends."""
        more = len(frames.PREFACE) - len(self._rest)
        self._rest += data[:more]
        if not frames.PREFACE.startswith(self._rest):
            raise offence("not the preface of an HTTP/2 client")
        if len(data) >= more:
            self._preface = False
            self._rest.clear()
        return more

    def _assembled(
        self, kind: int, flags: int, stream_id: int, payload: bytes
    ) -> Frame | None:
        """Return a HEADERS frame with its whole block, None where more is to come."""
        if self._block is None:
            block = _stripped(flags, payload)
            self._check_size(len(block))
            if flags & frames.END_HEADERS:
                return frames.HEADERS, flags, stream_id, block
            self._block, self._more = (flags, stream_id, bytearray(block)), 0
            return None
        first_flags, first_id, gathered = self._block
        if kind != frames.CONTINUATION or stream_id != first_id:
            raise offence("a header block is not complete, and something else follows")
        self._more += 1
        if self._more > self._bounds.max_continuations:
            raise calm("too many CONTINUATION frames")
        self._check_size(len(gathered) + len(payload))
        gathered += payload
        if not flags & frames.END_HEADERS:
            return None
        self._block = None
        return frames.HEADERS, first_flags, first_id, bytes(gathered)

    def _check_size(self, size: int) -> None:
        most = HARD * self._bounds.max_header_bytes
        if size > most:
            raise calm(f"a header block over {most} bytes")


_OF_CONNECTION = frozenset((frames.SETTINGS, frames.PING, frames.GOAWAY))
_OF_EITHER = frames.WINDOW_UPDATE
_KNOWN = frames.CONTINUATION
_BYTES = {
    frames.RST_STREAM: (4, 4),
    frames.PING: (8, 8),
    frames.GOAWAY: (8, frames.MOST_FRAME_BYTES),
    frames.WINDOW_UPDATE: (4, 4),
}
_NAMES = (
    *("DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE"),
    *("PING", "GOAWAY", "WINDOW_UPDATE", "CONTINUATION"),
)


def _check(kind: int, stream_id: int, size: int) -> None:
    """Refuse a frame of the wrong size, or in the wrong place (section 6)."""
    bytes_ = _BYTES.get(kind)
    if bytes_ is not None and not bytes_[0] <= size <= bytes_[1]:
        raise missized(f"{_NAMES[kind]} of {size} bytes, expected {bytes_[0]}")
    if kind in _OF_CONNECTION:
        if stream_id != 0:
            raise offence(f"{_NAMES[kind]} on a stream")
    elif stream_id == 0 and kind != _OF_EITHER and kind <= _KNOWN:
        raise offence(f"{_NAMES[kind]} on stream 0")


def _stripped(flags: int, payload: bytes) -> bytes:
    """Return a HEADERS payload without padding and priority (section 6.2)."""
    least = (1 if flags & frames.PADDED else 0) + (
        5 if flags & frames.PRIORITIZED else 0
    )
    if len(payload) < least:
        raise missized("HEADERS is cut short")
    padding = payload[0] if flags & frames.PADDED else 0
    if padding > len(payload) - least:
        raise offence("padding that is longer than its frame")
    return payload[least : len(payload) - padding]


def unpadded(payload: bytes) -> bytes:
    """Return a payload without its padding (section 6.1). Raises FatalError."""
    if not payload:
        raise missized("a padded frame that is empty")
    if payload[0] >= len(payload):
        raise FatalError(
            frames.Code.PROTOCOL_ERROR, "padding that is longer than its frame"
        )
    return payload[1 : len(payload) - payload[0]]
