"""What is to be sent: blocks and data, within the peer's windows (RFC 9113, 5.2)."""

from collections.abc import Iterable, Iterator

from ztserve.transport.http2 import frames
from ztserve.transport.http2.errors import FatalError, StreamError
from ztserve.transport.http2.fields import Block
from ztserve.transport.http2.frames import Code

_NO_TABLE = b"\x20"
"""A dynamic table of 0 bytes fits into any that a peer allows (RFC 7541, 4.2, 6.3)."""
_TURN_BYTES = 64 * 1024
"""Of one stream, before another has its turn."""
_SMALL_BYTES = 4096


class Outgoing:
    """Our half of a stream."""

    __slots__ = ("_pieces", "ended", "ends", "id", "pending", "trailers", "window")

    def __init__(self, stream_id: int, window: int) -> None:
        self.id = stream_id
        self.window = window
        """Bytes that the peer takes on this stream."""
        self.pending = 0
        """Bytes that no window has room for yet."""
        self._pieces: list[bytes | memoryview] = []  # a deque costs 600 bytes
        self.trailers: Block | None = None
        """What follows them."""
        self.ends = False
        """Whether our end follows what is pending."""
        self.ended = False

    def keep(self, data: bytes) -> None:
        """Have `data` wait; small pieces together, each object costs memory."""
        self.pending += len(data)
        if self._pieces and len(self._pieces[-1]) + len(data) < _SMALL_BYTES:
            self._pieces[-1] = bytes(self._pieces[-1]) + data
        elif data:
            self._pieces.append(data)

    def take(self, room: int) -> Iterator[bytes | memoryview]:
        """Yield pieces of what waits, `room` bytes together, of which there are."""
        self.pending -= room
        while room:
            piece = self._pieces.pop(0)
            if len(piece) > room:
                whole = memoryview(piece)  # whose slices are no copies
                self._pieces.insert(0, whole[room:])
                piece = whole[:room]
            room -= len(piece)
            yield piece


class Outbox:
    """The frames that are to be sent, in order, and those that wait for a window."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._frame = frames.LEAST_FRAME_BYTES
        self._window = frames.DEFAULT_WINDOW
        self._stream_window = frames.DEFAULT_WINDOW
        self._blocked: dict[int, Outgoing] = {}
        self._table_due = True
        """Whether to say in the next block that we use no dynamic table."""
        self._frames: list[bytes | memoryview] = []
        self.add = self._frames.append
        """Send one frame, whole, before all that waits."""

    def take(self) -> bytes:
        """Return what is to be sent now, and forget it."""
        return b"".join(self.blocks(frames.MOST_WINDOW))

    def blocks(self, size: int) -> Iterator[bytes]:
        """Yield what is to be sent, and forget it, in blocks of about `size` bytes."""
        block: list[bytes | memoryview] = []
        waiting, self._frames = self._frames, []
        self.add = self._frames.append
        count = 0
        for piece in waiting:
            block.append(piece)
            count += len(piece)
            if count >= size:
                yield b"".join(block)
                block.clear()
                count = 0
        if count:  # TLS has no way to send nothing
            yield b"".join(block)

    def stream(self, stream_id: int) -> Outgoing:
        """Return our half of a new stream."""
        return Outgoing(stream_id, self._stream_window)

    def forget(self, stream_id: int) -> None:
        """Send nothing of a stream that waits."""
        self._blocked.pop(stream_id, None)

    # --- what a stream sends ----------------------------------------------------

    def block(self, half: Outgoing, block: Block, *, end: bool) -> None:
        """Send a head or trailers, after what waits of the same stream."""
        if half.pending:
            half.trailers, half.ends = block, end
            return
        if self._table_due:
            block, self._table_due = _NO_TABLE + block, False
        most, flags = self._frame, frames.END_STREAM if end else 0
        half.ended = end
        if len(block) <= most:
            flags |= frames.END_HEADERS
            self.add(frames.frame(frames.HEADERS, flags, half.id, block))
            return
        self.add(frames.frame(frames.HEADERS, flags, half.id, block[:most]))
        for at in range(most, len(block), most):
            flags = frames.END_HEADERS if at + most >= len(block) else 0
            piece = block[at : at + most]
            self.add(frames.frame(frames.CONTINUATION, flags, half.id, piece))

    def data(self, half: Outgoing, data: bytes, *, end: bool) -> None:
        """Send `data` as far as the windows have room, the rest when they have."""
        half.ends = end
        size = len(data)
        if not half.pending and size <= self._window and size <= half.window:
            self._send(half, data, end=end)  # nearly always
            return
        half.keep(data)
        self._flush(half)

    def _send(self, half: Outgoing, data: bytes | memoryview, *, end: bool) -> None:
        """Send `data`, for which there is room."""
        size, most = len(data), self._frame
        self._window -= size
        half.window -= size
        half.ended = end
        at = 0
        rest: bytes | memoryview = data
        if size > most:
            rest = memoryview(data)  # whose slices are no copies
            while size - at > most:
                self.add(frames.head(frames.DATA, 0, half.id, most))
                self.add(rest[at : at + most])
                at += most
            rest = rest[at:]
        flags = frames.END_STREAM if end else 0
        self.add(frames.head(frames.DATA, flags, half.id, size - at))
        self.add(rest)

    def _flush(self, half: Outgoing, most: int = frames.MOST_WINDOW) -> bool:
        """Send at most `most` bytes of what waits; return whether any were sent."""
        room = max(0, min(self._window, half.window, half.pending, most))
        rest = half.pending - room
        ends = half.ends and half.trailers is None and not rest
        left = room
        for piece in half.take(room):
            left -= len(piece)
            self._send(half, piece, end=ends and not left)
        if ends and not room:
            self._send(half, b"", end=True)
        if rest:
            self._blocked[half.id] = half
            return room > 0
        self._blocked.pop(half.id, None)
        if half.trailers is not None:
            self.block(half, half.trailers, end=half.ends)
        return True

    # --- what the peer allows ---------------------------------------------------

    # Each of these looks at just the streams that may now go on: an update is a few
    # bytes, and may come often.

    def flush(self, halves: Iterable[Outgoing]) -> list[Outgoing]:
        """Send what there is room for, each stream in turn; return those now done."""
        waiting = [half for half in halves if half.id in self._blocked]
        turn = waiting
        while turn and self._window > 0:
            sent = [half for half in turn if self._flush(half, _TURN_BYTES)]
            turn = [half for half in sent if half.id in self._blocked]
        return [half for half in waiting if half.id not in self._blocked]

    def waiting(self) -> list[Outgoing]:
        """Return the streams that wait for room in a window."""
        return list(self._blocked.values())

    def widen(self, increment: int) -> list[Outgoing]:
        """Let all streams together send more; return those that waited for it.

        Raises FatalError.
        """
        waited = self.waiting() if self._window <= 0 else []
        self._window += increment
        if self._window > frames.MOST_WINDOW:
            raise FatalError(Code.FLOW_CONTROL_ERROR, "a window overflows")
        return waited

    def widen_stream(self, half: Outgoing, increment: int) -> None:
        """Let one stream send more. Raises StreamError."""
        half.window += increment
        if half.window > frames.MOST_WINDOW:
            raise StreamError(Code.FLOW_CONTROL_ERROR, "a window overflows")

    def set_stream_window(self, size: int, halves: Iterable[Outgoing]) -> None:
        """Have new streams begin with `size`, and change all others as much (6.9.2)."""
        if size > frames.MOST_WINDOW:
            raise FatalError(Code.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE {size}")
        more, self._stream_window = size - self._stream_window, size
        for half in halves:
            half.window += more
            if half.window > frames.MOST_WINDOW:
                raise FatalError(Code.FLOW_CONTROL_ERROR, "a window overflows")

    def set_frame_bytes(self, size: int) -> None:
        """Send frames of at most `size` bytes; not larger than we ourselves take."""
        self._frame = min(size, self._max_frame_bytes)
