"""One end of an HTTP/2 connection (RFC 9113), as a state machine.

Bytes that arrived go into `Connection.receive`, which returns events; what is to be
sent comes out of `Connection.outgoing`. Nothing here reads a clock: what may happen
only so often is counted between two calls of `refresh`, which its owner makes once a
second. Each error of the peer ends the stream or the connection by the code of the
section that it offends; after the latter, nothing is read any more.
"""

from collections.abc import Iterable

from ztserve.transport.http2 import frames
from ztserve.transport.http2.bounds import OF_DATA, OF_STREAM, Allowance, Bounds
from ztserve.transport.http2.errors import FatalError, StreamError, missized, offence
from ztserve.transport.http2.events import (
    DataReceived,
    Ended,
    Event,
    GoingAway,
    HeadersReceived,
    PingAnswered,
    StreamReset,
    Writable,
)
from ztserve.transport.http2.fields import (
    Block,
    FieldReader,
    Fields,
    Request,
    Response,
)
from ztserve.transport.http2.frames import Code
from ztserve.transport.http2.intake import Intake, unpadded
from ztserve.transport.http2.outbox import Outbox, Outgoing
from ztserve.transport.http2.streams import Streams


class Connection:
    """One end: a client's, or a server's. Not thread-safe.

    A client begins streams by `request`; a server learns of them by `HeadersReceived`.
    Either sends by `headers` and `data`, and ends its half of a stream by ``end``.
    """

    def __init__(self, *, client: bool, bounds: Bounds = Bounds()) -> None:  # noqa: B008
        self._client, self._bounds = client, bounds
        most = bounds.max_header_bytes
        self._reader: FieldReader[Request] | FieldReader[Response] = (
            FieldReader(Response, most) if client else FieldReader(Request, most)
        )
        self._intake = Intake(bounds, preface=not client)
        self._allowance = Allowance(bounds)
        self.refresh = self._allowance.refresh
        self._out = Outbox(bounds.max_frame_bytes)
        self.outgoing, self.blocks = self._out.take, self._out.blocks
        self._events: list[Event] = []
        self._streams = Streams(self._out, bounds, client=client)
        self.consumed = self._streams.consumed
        self._final = False
        """Whether we take no more streams, as we go away for good."""
        self._named_id = frames.MOST_STREAM_ID
        """The last stream that a GOAWAY of ours may name: none names a higher one."""
        self._peer_final_id = frames.MOST_STREAM_ID
        self.peer_leaves = False
        """Whether the peer said that it goes away: begin new streams elsewhere."""
        self._peer_max_streams = frames.MOST_STREAM_ID
        self.over = False
        """Whether the connection ended, by an error or by `end`."""
        self._handlers = (
            self._on_data,
            self._on_headers,
            self._on_priority,
            self._on_rst_stream,
            self._on_settings,
            self._on_forbidden,  # PUSH_PROMISE: nobody allowed it
            self._on_ping,
            self._on_goaway,
            self._on_window_update,
            self._on_forbidden,  # CONTINUATION: of no block
        )
        self._begin()

    def _begin(self) -> None:
        bounds = self._bounds
        ours = {
            frames.MAX_FRAME_SIZE: bounds.max_frame_bytes,
            frames.INITIAL_WINDOW_SIZE: bounds.stream_window,
            frames.MAX_HEADER_LIST_SIZE: bounds.max_header_bytes,
        }
        if self._client:
            self._out.add(frames.PREFACE)
            ours[frames.ENABLE_PUSH] = 0
        else:
            ours[frames.MAX_CONCURRENT_STREAMS] = bounds.max_streams
        self._out.add(frames.settings(ours))
        more = bounds.connection_window - frames.DEFAULT_WINDOW
        if more:
            self._out.add(frames.window_update(0, more))

    # --- what the owner may ask and do ------------------------------------------

    @property
    def open_streams(self) -> int:
        """Streams that have not ended in both directions."""
        return len(self._streams)

    @property
    def can_request(self) -> bool:
        """Whether a client may begin a stream now."""
        return (
            not self.over
            and not self.peer_leaves
            and self._streams.next_id <= frames.MOST_STREAM_ID
            and len(self._streams) < self._peer_max_streams
        )

    def unsent(self, stream_id: int) -> int:
        """Return how many bytes of a stream wait for room in a window."""
        stream = self._streams.get(stream_id)
        return 0 if stream is None else stream.out.pending

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the wire; return what they mean."""
        events: list[Event] = []
        if self.over:
            return events
        self._events = events
        try:
            for kind, flags, stream_id, payload in self._intake.frames(data):
                if kind >= len(self._handlers):
                    self._allowance.idle()  # section 4.1: ignored
                    continue
                try:
                    self._handlers[kind](flags, stream_id, payload)
                except StreamError as error:
                    self._fail(stream_id, error)
        except FatalError as error:
            self.end(error.code, error.reason)
            events.append(Ended(error.code, error.reason))
        return events

    def request(self, block: Block, *, end: bool = False) -> int:
        """Begin a stream with the head `block`; return its number (a client's).

        Raises RuntimeError where `can_request` is false.
        """
        if not self._client or not self.can_request:
            raise RuntimeError("no stream can be begun on this connection now")
        stream_id = self._streams.next_id
        self._streams.next_id += 2
        self._streams.add(stream_id)
        self.headers(stream_id, block, end=end)
        return stream_id

    def headers(self, stream_id: int, block: Block, *, end: bool = False) -> None:
        """Send a head or trailers; of a stream that has ended, nothing is sent."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.out.ends:
            stream.out.ends = end
            self._out.block(stream.out, block, end=end)
            if stream.out.ended:
                self._streams.end_ours(stream)

    def data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Send a piece of a body as far as the windows have room, the rest later.

        Of a stream that has ended, nothing is sent. What waits is held here: ask
        `unsent`, or wait for `Writable`, before there is more.
        """
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.out.ends:
            self._out.data(stream.out, data, end=end)
            if stream.out.ended:
                self._streams.end_ours(stream)

    def reset(self, stream_id: int, code: Code) -> None:
        """End a stream at once, in both directions."""
        self._streams.reset(stream_id, code)

    def ping(self, opaque: bytes) -> None:
        """Ask for a sign of life; ValueError unless `opaque` has 8 bytes."""
        if len(opaque) != 8:
            raise ValueError(f"opaque: expected 8 bytes, got {len(opaque)}")
        self._out.add(frames.frame(frames.PING, 0, 0, opaque))

    def drain(self, *, final: bool) -> None:
        """Say that we go away (section 6.8).

        First not `final`: the peer begins no more streams, those on their way are
        taken. Then `final`: what begins now is not.
        """
        if not self.over:
            self._go_away(self._streams.last_id if final else frames.MOST_STREAM_ID)
            self._final = self._final or final

    def end(self, code: Code = Code.NO_ERROR, reason: str = "") -> None:
        """End the connection: nothing is read any more."""
        if not self.over:
            self.over = True
            debug = reason.encode(errors="replace")[:128]
            self._go_away(self._streams.last_id, code, debug)
            for stream in self._streams:
                self._streams.remove(stream.id)

    def _go_away(
        self, last: int, code: Code = Code.NO_ERROR, debug: bytes = b""
    ) -> None:
        self._named_id = min(self._named_id, last)
        self._out.add(frames.goaway(self._named_id, code, debug))

    # --- DATA and HEADERS -------------------------------------------------------

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._streams.arrived(size)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._streams.check_late("DATA", stream_id)
            if not payload:
                self._allowance.idle()
            self.consumed(0, size)
            return
        if flags & frames.PADDED:
            payload = unpadded(payload)
        ended = bool(flags & frames.END_STREAM)
        try:
            stream.take(size, len(payload))
            if ended:
                self._streams.end_theirs(stream)
        except StreamError:
            self.consumed(0, size)
            raise
        if payload:
            self._allowance.earn(OF_DATA)
        elif not ended:
            self._allowance.idle()
        if size > len(payload):
            self.consumed(stream_id, size - len(payload))
        self._events.append(DataReceived(stream_id, payload, ended))

    def _on_headers(self, flags: int, stream_id: int, block: bytes) -> None:
        stream = self._streams.get(stream_id)
        ended = bool(flags & frames.END_STREAM)
        if stream is None:
            if not self._client and stream_id > self._streams.last_id:
                self._on_new(stream_id, block, ended=ended)
            else:
                self._late("HEADERS", stream_id)
                self._reader.skip(block)
            return
        if stream.ended:
            self._reader.skip(block)
            raise StreamError(Code.STREAM_CLOSED, "HEADERS after the end of the stream")
        head: Response | Request | Fields
        if stream.has_head:
            head = self._reader.trailers(block)
            if not ended:
                raise StreamError(Code.PROTOCOL_ERROR, "trailers that do not end")
        else:
            head = self._reader.head(block)
            if isinstance(head, Response) and head.status < 200:
                if ended:
                    raise StreamError(Code.PROTOCOL_ERROR, "an interim head that ends")
                self._allowance.idle()
                return
            stream.has_head, stream.declared = True, head.content_length
            self._allowance.earn(OF_STREAM)
        if ended:
            self._streams.end_theirs(stream)
        self._events.append(HeadersReceived(stream_id, head, ended))

    def _on_new(self, stream_id: int, block: bytes, *, ended: bool) -> None:
        if stream_id % 2 == 0:
            raise offence("a client's stream has an odd number")
        self._streams.begun(stream_id)
        if self._final:
            self._reader.skip(block)  # it was told that we take no more (6.8)
            self._streams.drop(stream_id)
            self._allowance.idle()
            return
        if len(self._streams) >= self._bounds.max_streams:
            self._reader.skip(block)
            raise StreamError(Code.REFUSED_STREAM, "too many streams at once")
        head = self._reader.head(block)
        self._allowance.earn(OF_STREAM)
        stream = self._streams.add(stream_id)
        stream.has_head, stream.declared = True, head.content_length
        if ended:
            self._streams.end_theirs(stream)
        self._events.append(HeadersReceived(stream_id, head, ended))

    # --- the other frames -------------------------------------------------------

    def _on_priority(self, _flags: int, stream_id: int, payload: bytes) -> None:
        self._allowance.idle()
        if len(payload) != 5:
            if not self._streams.is_begun(stream_id):  # and cannot be reset (6.4)
                raise missized("PRIORITY has 5 bytes")
            raise StreamError(Code.FRAME_SIZE_ERROR, "PRIORITY has 5 bytes")

    def _on_rst_stream(self, _flags: int, stream_id: int, payload: bytes) -> None:
        self._streams.check_begun("RST_STREAM", stream_id)
        code = int.from_bytes(payload, "big")
        if not self._client or code != Code.NO_ERROR:
            self._allowance.reset()  # a server ends so what it answered early (8.1)
        if self._streams.remove(stream_id):
            self._events.append(StreamReset(stream_id, code, ""))
        else:
            self._allowance.idle()

    def _on_settings(self, flags: int, _stream_id: int, payload: bytes) -> None:
        self._allowance.settings(len(payload) // 6)
        if flags & frames.ACK:
            if payload:
                raise missized("the acknowledgement of SETTINGS is empty")
            return
        if len(payload) % 6:
            raise missized("SETTINGS has 6 bytes for each")
        for at in range(0, len(payload), 6):
            name = payload[at] << 8 | payload[at + 1]
            self._on_setting(name, int.from_bytes(payload[at + 2 : at + 6], "big"))
        self._out.add(frames.SETTINGS_ACK)
        self._flush(self._out.waiting())

    def _on_setting(self, name: int, value: int) -> None:
        if name == frames.INITIAL_WINDOW_SIZE:
            halves = [stream.out for stream in self._streams]
            self._out.set_stream_window(value, halves)
        elif name == frames.MAX_FRAME_SIZE:
            if not frames.LEAST_FRAME_BYTES <= value <= frames.MOST_FRAME_BYTES:
                raise offence(f"MAX_FRAME_SIZE {value}")
            self._out.set_frame_bytes(value)
        elif name == frames.ENABLE_PUSH:
            if value > (0 if self._client else 1):
                raise offence(f"ENABLE_PUSH {value}")
        elif name == frames.MAX_CONCURRENT_STREAMS:
            self._peer_max_streams = value
        # HEADER_TABLE_SIZE: what we send uses no table. All others: section 6.5.2.

    def _on_forbidden(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        raise offence("PUSH_PROMISE, or CONTINUATION of nothing")

    def _on_ping(self, flags: int, _stream_id: int, payload: bytes) -> None:
        self._allowance.ping()
        if flags & frames.ACK:
            self._events.append(PingAnswered(payload))
        else:
            self._out.add(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _on_goaway(self, _flags: int, _stream_id: int, payload: bytes) -> None:
        last = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
        if last > self._peer_final_id:
            raise offence("GOAWAY with a higher stream than before")
        self._allowance.idle()
        self._peer_final_id, self.peer_leaves = last, True
        code = int.from_bytes(payload[4:8], "big")
        self._events.append(GoingAway(last, code, payload[8:136]))
        if self._client:
            reason = "the peer went away before it"
            for lost in (stream.id for stream in self._streams if stream.id > last):
                self._streams.drop(lost)
                self._events.append(StreamReset(lost, Code.REFUSED_STREAM, reason))

    def _on_window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        increment = int.from_bytes(payload, "big") & 0x7FFFFFFF
        if increment < 1024:
            self._allowance.idle()
        if stream_id == 0:
            if increment == 0:
                raise offence("WINDOW_UPDATE by 0")
            self._flush(self._out.widen(increment))
            return
        self._streams.check_begun("WINDOW_UPDATE", stream_id)
        stream = self._streams.get(stream_id)
        if stream is not None:
            if increment == 0:
                raise StreamError(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by 0")
            self._out.widen_stream(stream.out, increment)
            self._flush((stream.out,))

    # --- what both kinds of frames need -----------------------------------------

    def _flush(self, halves: Iterable[Outgoing]) -> None:
        for half in self._out.flush(halves):
            self._events.append(Writable(half.id))
            stream = self._streams.get(half.id)
            if stream is not None and half.ended:
                self._streams.end_ours(stream)

    def _fail(self, stream_id: int, error: StreamError) -> None:
        self._allowance.reset()
        self._streams.drop(stream_id)
        self._out.add(frames.rst_stream(stream_id, error.code))
        self._events.append(StreamReset(stream_id, error.code, error.reason))

    def _late(self, what: str, stream_id: int) -> None:
        self._streams.check_late(what, stream_id)
        self._allowance.idle()
