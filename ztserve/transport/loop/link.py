"""One connection of a client: TLS, HTTP/2, and the calls that it carries."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import cast

from ztserve.errors import Interrupted, Overloaded, Unavailable, ZTServeError
from ztserve.identity import SpiffeId
from ztserve.transport import heads
from ztserve.transport.contexts import HandshakeRefused
from ztserve.transport.http2 import (
    Bounds,
    Code,
    Connection,
    DataReceived,
    Ended,
    Event,
    GoingAway,
    HeadersReceived,
    Response,
    StreamReset,
)
from ztserve.transport.loop.call import ClientCall
from ztserve.transport.loop.carrier import NEVER, Carrier
from ztserve.transport.loop.causes import closed, turned_away
from ztserve.transport.tls import Session
from ztserve.types import Peer

HANDSHAKE_S = 10.0
BOUNDS = Bounds()


class Link(Carrier):
    """The protocol of one connection to `server`.

    It is `ready` once the server has spoken HTTP/2: in TLS 1.3 a client that was
    refused learns of it only then, and no request has left by that time.
    """

    def __init__(
        self,
        session: Session,
        server: SpiffeId,
        address: str,
        on_change: Callable[["Link"], object],
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(loop.call_soon, BOUNDS, client=True)
        self._session = session
        self._server = server
        self._address = address
        self._on_change = on_change
        """Told when it can take no more calls, and when its last one has ended."""
        self.ready: asyncio.Future[None] = loop.create_future()
        self._calls: dict[int, ClientCall] = {}
        self._queue: deque[ClientCall] = deque()
        """Calls that wait for the server to allow one more stream."""
        self._fresh: list[int] = []
        """Streams of which nothing has been written yet."""
        self._broken: Exception | None = None
        self.renews_at = NEVER
        """When to verify the server anew (monotonic)."""
        self.cut = False
        """Whether we ourselves broke off what ran here."""
        self.lost = False

    # --- for the channel --------------------------------------------------------

    @property
    def takes(self) -> bool:
        """Whether new calls may be begun here."""
        http2 = self._http2
        return (
            http2 is not None
            and self.ready.done()
            and not self._leaving
            and not self._closing
            and not http2.peer_leaves
            and not http2.over
        )

    @property
    def chain(self) -> tuple[bytes, ...]:
        """The server's certificates (DER, leaf first)."""
        return self._session.chain

    @property
    def peer(self) -> Peer | None:
        """The server, as it was verified in the handshake."""
        return self._session.peer

    def begin(self, call: ClientCall) -> None:
        """Send a call, or have it wait until the server allows one more stream."""
        http2 = cast("Connection", self._http2)
        call.link = self
        if not http2.can_request:
            self._queue.append(call)
            return
        head = heads.request_head(call.path, self._address)
        head += heads.timeout(call.left_s()) + call.metadata
        stream_id = call.stream_id = http2.request(head)
        *first, last = call.body
        for piece in first:
            http2.data(stream_id, piece)
        http2.data(stream_id, last, end=True)
        self._calls[stream_id] = call
        self._fresh.append(stream_id)
        self.flush()

    def cancel(self, call: ClientCall) -> None:
        """Let go of a call before its time."""
        http2 = cast("Connection", self._http2)
        if self._calls.pop(call.stream_id, None) is not None:
            http2.reset(call.stream_id, Code.CANCEL)
            self._send_queued()  # the server need not say anything now
            self.flush()
        else:
            with contextlib.suppress(ValueError):
                self._queue.remove(call)

    def consumed(self, stream_id: int, count: int) -> None:
        """Let the server send more."""
        http2 = cast("Connection", self._http2)
        http2.consumed(stream_id, count)
        self.flush()

    def leave(self) -> list[ClientCall]:
        """Take no more calls, and close when the last has ended.

        Return those that wait for their turn, to be begun elsewhere.
        """
        self._leaving = True
        if self._http2 is None:
            self.abort()
        else:
            self.flush()
        unsent = [call for call in self._queue if not call.over]
        self._queue.clear()
        for call in unsent:
            call.link = None
        return unsent

    def abort(self) -> None:
        """Close now; what has no socket yet is let go of by whoever dials."""
        if hasattr(self, "_transport"):
            super().abort()

    def break_off(self) -> None:
        """Close now: the server, or we, may not be believed any more."""
        self.cut = True
        self.abort()

    def discard(self) -> bool:
        """Let go of a connection that was not made in time, or must not be used.

        Return whether there is a socket, whose end will be told.
        """
        self._closing = True
        self.ready.cancel()
        if self.lost or not hasattr(self, "_transport"):
            return False
        self.abort()
        return True

    def look(self, now: float) -> None:
        """Begin to count anew what is counted by the second; see that it lives."""
        http2 = self._http2
        if now >= self._expires:
            self.abort()
        elif http2 is not None:
            http2.refresh()
            self._ask(http2, now - self._heard)

    # --- what asyncio tells -----------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        self._connected(transport)
        self._expires = time.monotonic() + HANDSHAKE_S
        try:
            self._transport.write(self._session.begin())
        except HandshakeRefused as refused:
            self._refused(refused)
            self._close()

    def connection_lost(self, error: Exception | None) -> None:
        """End the calls that this connection carried."""
        self.lost = self._closing = True
        if not self.ready.done():
            self.ready.set_exception(closed(self._server, error or self._broken))
            self.ready.exception()  # nobody need have waited
        for stream_id, call in list(self._calls.items()):
            call.finish(self._ended(stream_id, error or self._broken))
        for call in self._queue:
            call.finish(Unavailable("the connection ended before the call was sent"))
        self._calls.clear()
        self._queue.clear()
        self._on_change(self)

    # --- the protocol's own -----------------------------------------------------

    def _refused(self, refused: HandshakeRefused) -> None:
        if not self.ready.done():
            self.ready.set_exception(turned_away(refused, self._server))
            self.ready.exception()  # nobody need have waited
        else:
            self._broken = refused

    def _begun(self) -> None:
        self._expires = time.monotonic() + HANDSHAKE_S

    def _handle(self, event: Event) -> None:
        match event:
            case HeadersReceived(stream_id, Response() | tuple() as head, ended):
                call = self._calls.get(stream_id)
                if call is not None:
                    call.head(head, ended=ended)
                    self._forget(stream_id, call)
            case DataReceived(stream_id, data, ended):
                call = self._calls.get(stream_id)
                if call is None:
                    self.consumed(0, len(data))
                    return
                call.feed(data, ended=ended)
                self._forget(stream_id, call)
            case StreamReset(stream_id, code, reason):
                call = self._calls.pop(stream_id, None)
                if call is not None:
                    call.finish(_reset(code, reason, self._server))
            case GoingAway():
                self._leaving = True
                self._on_change(self)
            case Ended(_, reason):
                self._broken = Interrupted(
                    f"{self._server} offends HTTP/2", f"{self._server}: {reason}"
                )
            case _:
                pass

    def _take(self, events: list[Event]) -> None:
        for event in events:
            self._handle(event)
        if not self.ready.done() and self._broken is None:
            self._expires = NEVER  # it has spoken, and did not refuse us
            self.ready.set_result(None)
        if self._queue:
            self._send_queued()

    def _forget(self, stream_id: int, call: ClientCall) -> None:
        if call.over and self._calls.pop(stream_id, None) is not None:
            # Answered before it was sent whole, the stream would stay open: nobody
            # takes the rest. Of one that has ended, nothing is sent.
            cast("Connection", self._http2).reset(stream_id, Code.CANCEL)

    def _send_queued(self) -> None:
        http2 = cast("Connection", self._http2)
        while self._queue and http2.can_request:
            self.begin(self._queue.popleft())

    def _write(self) -> None:
        if not self._transport.is_closing():
            self._fresh.clear()
        super()._write()

    def _ended(self, stream_id: int, error: Exception | None) -> ZTServeError:
        if self.cut:
            return cut_off(self._server)
        if stream_id in self._fresh:
            return Unavailable("the connection ended before the call was sent")
        broken = "the connection broke during the call; it may have run"
        return Interrupted(broken, f"{broken} [{error}]" if error else broken)


def cut_off(server: str) -> ZTServeError:
    """Return the error of a call that this client itself broke off."""
    return Interrupted(
        f"the call was broken off: {server} or this client may not be believed any more"
    )


def _reset(code: int, reason: str, server: str) -> ZTServeError:
    if code == Code.REFUSED_STREAM:
        # Section 8.7 of RFC 9113: it was not processed.
        return Overloaded("the server takes no more calls now", reason)
    public = "the server ended the call; it may have run"
    return Interrupted(public, f"{public} [{server}: HTTP/2 error {code} {reason}]")
