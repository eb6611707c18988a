"""The streams of a connection: those that are open, and what is known of the others."""

from collections import deque
from collections.abc import Iterator

from ztserve.transport.http2 import frames
from ztserve.transport.http2.bounds import Bounds
from ztserve.transport.http2.errors import FatalError, StreamError, offence
from ztserve.transport.http2.frames import Code
from ztserve.transport.http2.outbox import Outbox, Outgoing

MAX_DROPPED = 1024
"""Streams that we reset, whose late frames are still known to be such."""
MAX_SKIPPED = 64
"""Ranges of numbers that the peer passed over, and that are still known to be such."""


class Stream:
    """A stream that is open or half closed (section 5.1)."""

    __slots__ = (
        "declared",
        "ended",
        "has_head",
        "id",
        "out",
        "owed",
        "received",
        "window",
    )

    def __init__(self, stream_id: int, window: int, out: Outgoing) -> None:
        self.id = stream_id
        self.out = out
        """Our half of it."""
        self.window = window
        """Bytes that we take."""
        self.owed = 0
        """Bytes dealt with that the peer has not been told of."""
        self.ended = False
        """Whether the peer sends no more."""
        self.has_head = False
        """Whether the head has arrived, so that data or trailers may follow."""
        self.declared: int | None = None
        """The body's bytes by its content-length."""
        self.received = 0

    def take(self, size: int, payload: int) -> None:
        """Count a frame of `size` bytes, `payload` of them the body's, in."""
        if self.ended:
            raise StreamError(Code.STREAM_CLOSED, "DATA after the end of the stream")
        if not self.has_head:
            raise StreamError(Code.PROTOCOL_ERROR, "DATA before a head")
        self.window -= size
        if self.window < 0:
            raise StreamError(Code.FLOW_CONTROL_ERROR, "DATA beyond the window")
        self.received += payload
        if self.declared is not None and self.received > self.declared:
            raise StreamError(Code.PROTOCOL_ERROR, "longer than content-length")


class Streams:
    """Streams by their number, begun by either end."""

    def __init__(self, out: Outbox, bounds: Bounds, *, client: bool) -> None:
        self._out, self._bounds, self._client = out, bounds, client
        self._window = bounds.connection_window
        """Bytes that we take, of all streams together."""
        self._owed = 0
        self._open: dict[int, Stream] = {}
        self._dropped: dict[int, None] = {}
        self._forgotten = 0
        """The highest of those that are not in `_dropped` any more."""
        self._skipped: deque[range] = deque(maxlen=MAX_SKIPPED)
        self.get = self._open.get
        self.last_id = 0
        """The highest that the peer began."""
        self.next_id = 1 if client else 2
        """The next that we begin."""

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._open.values()))

    def add(self, stream_id: int) -> Stream:
        """Return a new stream."""
        window = self._bounds.stream_window
        stream = Stream(stream_id, window, self._out.stream(stream_id))
        self._open[stream_id] = stream
        return stream

    def arrived(self, size: int) -> None:
        """Count a frame of DATA in, of whatever stream. Raises FatalError."""
        self._window -= size
        if self._window < 0:
            raise FatalError(Code.FLOW_CONTROL_ERROR, "DATA beyond the window")

    def consumed(self, stream_id: int, count: int) -> None:
        """Let the peer send `count` bytes more: that many were dealt with."""
        # Told in steps: each costs a frame, and the peer has the rest of its window.
        self._owed += count
        if self._owed >= self._bounds.connection_window // 4:
            self._window += self._owed
            self._out.add(frames.window_update(0, self._owed))
            self._owed = 0
        stream = self._open.get(stream_id)
        if stream is not None and not stream.ended:
            stream.owed += count
            if stream.owed >= self._bounds.stream_window // 4:
                stream.window += stream.owed
                self._out.add(frames.window_update(stream_id, stream.owed))
                stream.owed = 0

    def begun(self, stream_id: int) -> None:
        """Note that the peer began a stream, and none of those before it any more."""
        first = self.last_id + 2 if self.last_id else 1
        if first < stream_id:
            self._skipped.append(range(first, stream_id, 2))
        self.last_id = stream_id

    def remove(self, stream_id: int) -> bool:
        """Forget a stream, and what waits to be sent on it; return whether it was."""
        self._out.forget(stream_id)
        return self._open.pop(stream_id, None) is not None

    def drop(self, stream_id: int) -> bool:
        """Forget a stream as `remove` does, so that its late frames are no offence."""
        if len(self._dropped) >= MAX_DROPPED:
            oldest = next(iter(self._dropped))
            del self._dropped[oldest]
            self._forgotten = max(self._forgotten, oldest)
        self._dropped[stream_id] = None
        return self.remove(stream_id)

    def reset(self, stream_id: int, code: Code) -> None:
        """End an open stream at once, in both directions."""
        if stream_id in self._open:
            self.drop(stream_id)
            self._out.add(frames.rst_stream(stream_id, code))

    def end_theirs(self, stream: Stream) -> None:
        """Note that the peer sends no more. Raises StreamError if that is short."""
        if stream.declared is not None and stream.received < stream.declared:
            raise StreamError(Code.PROTOCOL_ERROR, "shorter than content-length")
        stream.ended = True
        if stream.out.ended:
            self.remove(stream.id)

    def end_ours(self, stream: Stream) -> None:
        """Note that we send no more."""
        if stream.ended:
            self.remove(stream.id)
        elif not self._client:
            # The answer is whole; what may still come of the request is not wanted
            # (section 8.1).
            self.reset(stream.id, Code.NO_ERROR)

    def is_begun(self, stream_id: int) -> bool:
        """Return whether a stream was begun, by whom its number says it is."""
        if stream_id % 2 == (1 if self._client else 0):
            return stream_id < self.next_id
        return 0 < stream_id <= self.last_id

    def check_begun(self, what: str, stream_id: int) -> None:
        """Refuse a frame on a stream that nobody has begun (section 5.1, idle)."""
        if not self.is_begun(stream_id):
            raise offence(f"{what} on stream {stream_id}, which nobody began")

    def check_late(self, what: str, stream_id: int) -> None:
        """Refuse a frame on a closed stream, unless we closed it a moment ago."""
        self.check_begun(what, stream_id)
        if any(stream_id in each for each in self._skipped):
            raise offence(f"{what} on stream {stream_id}, which was passed over")
        if stream_id > self._forgotten and stream_id not in self._dropped:
            raise FatalError(
                Code.STREAM_CLOSED, f"{what} on stream {stream_id}, which is closed"
            )
