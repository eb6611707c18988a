"""One connection on the loop: TLS, HTTP/2, and the calls that it carries."""

import asyncio
import time
from collections import deque
from typing import cast

from ztserve.errors import Unauthenticated, Unavailable
from ztserve.transport import heads, messages, status
from ztserve.transport.contexts import HandshakeRefused
from ztserve.transport.http2 import (
    Code,
    Connection,
    DataReceived,
    Ended,
    Event,
    HeadersReceived,
    Request,
    StreamReset,
    Writable,
)
from ztserve.transport.loop.carrier import CLOSE_S, NEVER, Carrier
from ztserve.transport.loop.credentials import Visitor
from ztserve.transport.loop.exchange import Exchange
from ztserve.transport.loop.house import House

LINGER_S = 0.001
"""A connection that has written pieces of streams waits as long before it writes more:
what is made meanwhile leaves together, and the loop is not woken for each."""
_NO_GRPC = "a call that is not gRPC's"
_NO_METHOD = "a call of a method that is not here"
"""How the audit is told of calls that nobody judges: no caller chooses the words."""


class Wire(Carrier):
    """The protocol of one client's connection."""

    def __init__(self, house: House) -> None:
        super().__init__(house.soon, house.bounds, client=False)
        self._house = house
        self._calls: dict[int, Exchange] = {}
        self._pieces: deque[tuple[Exchange, bytes]] = deque()
        """Of streams, in order; what the loop has not taken yet."""
        self._lingers = False
        """Whether the loop will look for pieces unasked."""
        self._timer = False
        self._lost = self._warned = False
        self._stuck = NEVER
        self._retires = time.monotonic() + house.limits.max_connection_age_s
        self.visitor = Visitor()
        """Who is at the other end, for the credentials to judge."""
        self.source = "", 0
        """Address and port of the other end."""
        self._address = ""
        self.hold = house.hold
        """Count bytes of requests that arrived, or went on."""
        self._answered: list[int] = []
        """Streams whose answer was written since we last looked whether it left."""
        self._untaken: dict[int, float] = {}
        """Streams whose answer the client has not taken whole; until when it may."""
        self.post = house.post
        """Have something done on the loop."""

    # --- what asyncio tells -----------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake, if there is a place for one more connection."""
        self._connected(transport)
        host, port = transport.get_extra_info("peername")[:2]
        self._address = str(host)
        self.source = self._address, int(port)
        house = self._house
        self._expires = time.monotonic() + house.limits.handshake_s
        if not house.enter(self, self._address):
            self._lost = True
            house.refused("too many connections", self._address)
            self._transport.abort()
            return
        try:
            self._session = house.ends.accept(house.credentials.check)
        except Unavailable as error:
            self._closing = True
            house.refused(error.public, self._address)
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes; those of a handshake when it is their turn."""
        if self._http2 is not None or self._closing:
            super().data_received(data)
            return
        self._transport.pause_reading()
        self._house.take_turn(self, data)

    def step(self, data: bytes) -> None:
        """Go on with the handshake."""
        try:
            super().data_received(data)
        except BaseException:
            self._transport.abort()
            raise
        if not self._closing:
            self._transport.resume_reading()

    def give_way(self) -> None:
        """Close, before the handshake is done, for others to have the place."""
        self._closing = True
        self._house.refused("too many handshakes at once", self._address)
        self._transport.abort()
        self.connection_lost(None)  # which asyncio tells only later, and once more

    def connection_lost(self, error: Exception | None) -> None:
        """End what is being answered."""
        if self._lost:
            return
        if self._http2 is None and not self._closing:
            self._house.refused("connection closed in the handshake", self._address)
        self._lost = self._closing = True
        self._house.leave(self, self._address)
        for stream_id in list(self._untaken):
            self._taken(stream_id)
        for call in list(self._calls.values()):
            call.cut()

    def pause_writing(self) -> None:
        """Read no more of a peer that does not take what it asked for."""
        self._stuck = time.monotonic()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Read again."""
        self._stuck = NEVER
        self._transport.resume_reading()
        self._settle()

    # --- what the house tells ---------------------------------------------------

    def look(self, now: float) -> None:
        """End what has taken too long; count anew what is counted by the second."""
        http2 = self._http2
        if now >= self._expires:
            if http2 is None:
                self._closing = True
                self._house.refused("handshake took too long", self._address)
            self._transport.abort()
            return
        if now - self._stuck > self._house.limits.stream_idle_s:
            self._transport.abort()
            return
        if http2 is not None:
            http2.refresh()
            self._ask(http2, now - self._heard)
            for stream_id in [one for one, due in self._untaken.items() if now > due]:
                http2.reset(stream_id, Code.CANCEL)
                self.flush()
            self.judge()
            if now > self._retires and not self._leaving:
                self.drain(final=self._warned)
                self._warned = True

    def judge(self) -> None:
        """Close soon where the peer's identity does not hold any more.

        Not at once: calls are refused by name meanwhile, and streams end by it.
        """
        if self._http2 is None or self._expires < NEVER:
            return
        try:
            self._house.credentials.peer(self.visitor)
        except Unauthenticated as error:
            self._house.refused(
                f"certificate not trusted: {error.reason}", self._address
            )
            self._expires = time.monotonic() + CLOSE_S
        except Unavailable:
            return  # it is we who have no identity; each call is told so

    def drain(self, *, final: bool) -> None:
        """Have the client go elsewhere; once `final`, close when its calls ended."""
        if self._http2 is None:
            self._transport.abort()
            return
        self._http2.drain(final=final)
        self._leaving = final
        self.flush()

    def consumed(self, stream_id: int, count: int) -> None:
        """Let the client send more."""
        if self._http2 is not None:
            self._http2.consumed(stream_id, count)
            self.flush()

    def cancel(self, call: Exchange) -> None:
        """End a call from our side, before its time."""
        if self._http2 is not None and call.stream_id in self._calls:
            self._http2.reset(call.stream_id, Code.CANCEL)
            self._forget(call.stream_id)
            call.cut()
            self.flush()

    # --- answers ----------------------------------------------------------------

    def answer(self, call: Exchange, message: bytes | None) -> None:
        """Send the one message of a unary call, and its end; None: it is refused."""
        if message is None:
            self.end(call)
            return
        http2 = self._http2
        if http2 is not None:
            http2.headers(call.stream_id, heads.HEAD)
            for piece in messages.body(message):
                http2.data(call.stream_id, piece)
            http2.headers(call.stream_id, heads.OK, end=True)
        self._forget(call.stream_id)
        self.flush()

    def piece(self, call: Exchange, message: bytes) -> None:
        """Send one message of a stream; from the thread that answers.

        At once where the connection has written none for a moment, else soon, together
        with what comes meanwhile.
        """
        self._pieces.append((call, message))
        if not self._lingers:  # after the piece is there: the loop looks the other way
            self._lingers = True
            self.post(self._send_pieces)

    def end(self, call: Exchange) -> None:
        """Send the end of a call, as its status is."""
        self._take_pieces()
        if self._http2 is not None:
            if call.status is heads.GOOD and not call.has_head:
                call.has_head = True
                self._http2.headers(call.stream_id, heads.HEAD)
            self._http2.headers(call.stream_id, call.trailers(), end=True)
        self._forget(call.stream_id)
        self.flush()

    def _send_pieces(self) -> None:
        """Write the pieces that are there, and look for more in a moment."""
        self._lingers = self._timer  # before we look: what comes from now on wakes us
        if self._take_pieces():
            self.flush()
            self._lingers = True
            if not self._timer:
                self._timer = True
                self._house.later(LINGER_S, self._lingered)

    def _lingered(self) -> None:
        self._timer = False
        self._send_pieces()

    def _take_pieces(self) -> bool:
        """Put all pieces into HTTP/2, a call's into one frame; return if there were."""
        together: dict[Exchange, list[bytes]] = {}
        while self._pieces:
            call, message = self._pieces.popleft()
            together.setdefault(call, []).append(message)
        http2 = self._http2
        for call, several in together.items():
            unsent = 0
            if http2 is not None:
                if not call.has_head:
                    call.has_head = True
                    http2.headers(call.stream_id, heads.HEAD)
                http2.data(call.stream_id, b"".join(map(messages.framed, several)))
                unsent = http2.unsent(call.stream_id)
            call.sent(sum(map(len, several)), unsent)
        return bool(together)

    # --- the loop's own ---------------------------------------------------------

    def _refused(self, refused: HandshakeRefused) -> None:
        told = refused.cause if self._http2 is None else f"TLS: {refused.cause}"
        self._house.refused(told, self._address)

    def _begun(self) -> None:
        session = self._session  # whose verdict need not be found a second time
        if not self._house.known(self, session.peer.id if session.peer else ""):
            raise HandshakeRefused("too many connections of one SPIFFE ID")
        self.visitor = Visitor(session.chain, session.peer, session.judged_by)

    def _take(self, events: list[Event]) -> None:
        for event in events:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        match event:
            case HeadersReceived(stream_id, Request() as head, ended):
                self._arrive(stream_id, head, ended=ended)
            case DataReceived(stream_id, data, ended):
                self._feed(stream_id, data, ended=ended)
            case HeadersReceived(stream_id, _, _):  # trailers: of no meaning in gRPC
                self._feed(stream_id, b"", ended=True)
            case StreamReset(stream_id, _, _):
                call = self._calls.pop(stream_id, None)
                if call is not None:
                    call.cut()
            case Writable(stream_id):
                call = self._calls.get(stream_id)
                if call is not None:
                    call.drained()
            case Ended(_, reason):
                self._house.ended(reason, self._address)
                self.flush()
                self._closing = True
                for one in list(self._calls.values()):
                    one.cut()
            case _:
                pass  # an answered ping; a client that begins no more calls

    def _arrive(self, stream_id: int, head: Request, *, ended: bool) -> None:
        http2 = cast("Connection", self._http2)
        if not heads.is_grpc(head):
            self._house.refused(_NO_GRPC, self._address)
            http2.headers(stream_id, heads.NOT_GRPC, end=True)
            return
        method = self._house.methods.get(head.path)
        try:
            if method is None:
                reason = "no such method here"
                raise messages.Unreadable(status.Code.UNIMPLEMENTED, reason)
            most = self._house.limits.max_message_bytes
            call = Exchange(self, stream_id, head, most)
        except messages.Unreadable as error:
            told_of = _NO_METHOD if method is None else _NO_GRPC
            self._house.refused(told_of, self._address)
            accepted = (("grpc-accept-encoding", heads.ENCODINGS),)
            told = heads.Status(error.code, error.reason, accepted)
            http2.headers(stream_id, heads.trailers_only(told), end=True)
            return
        self._calls[stream_id] = call
        if ended:
            call.end()
        self._house.arrived(method, call, self)

    def _feed(self, stream_id: int, data: bytes, *, ended: bool) -> None:
        call = self._calls.get(stream_id)
        if call is None:
            cast("Connection", self._http2).consumed(stream_id, len(data))
            return
        if data:
            call.feed(data)
        if ended:
            call.end()

    def _forget(self, stream_id: int) -> None:
        call = self._calls.pop(stream_id, None)
        if call is not None:
            call.finish()
            self._answered.append(stream_id)

    def _write(self) -> None:
        super()._write()
        self._settle()

    def _settle(self) -> None:
        """See which answers have left: those that have not are in flight still.

        Or a caller that takes nothing could have us hold one answer after the other.
        """
        http2, answered, self._answered = self._http2, self._answered, []
        peer, stuck = self.visitor.peer, self._stuck < NEVER
        if http2 is None or peer is None or self._lost:
            return
        for stream_id in answered:
            if stuck or http2.unsent(stream_id):
                due = time.monotonic() + self._house.limits.stream_idle_s
                self._untaken[stream_id] = due
                self._house.admission.hold(peer.id)
        if self._untaken and not stuck:
            for stream_id in [one for one in self._untaken if not http2.unsent(one)]:
                self._taken(stream_id)

    def _taken(self, stream_id: int) -> None:
        del self._untaken[stream_id]
        if self.visitor.peer is not None:
            self._house.admission.leave(self.visitor.peer.id)
