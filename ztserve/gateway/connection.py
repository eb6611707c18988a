"""One HTTPS connection: TLS, one request after the other, and their time limits.

A request is read only as far as it is wanted: its head first, its body when whoever
answers asks for it. What a client sends beyond that waits, bounded, unread.
"""

import asyncio
import logging
import time
from typing import TYPE_CHECKING, cast

from ztserve.errors import CallError, Unavailable
from ztserve.gateway import response
from ztserve.gateway.head import Malformed, read_head
from ztserve.gateway.house import House, State
from ztserve.gateway.inbox import Inbox
from ztserve.gateway.outbox import MAX_WAITING, NEVER, Outbox
from ztserve.transport.contexts import HandshakeRefused

if TYPE_CHECKING:
    from ztserve.gateway.tls import Session

_LOG = logging.getLogger(__name__)

_PIECE = 64 * 1024
_LINGER_S = 1.0
_MAX_LINGERING = 1 << 20


class Connection(asyncio.Protocol):
    """The protocol of one client's connection."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._state = State.HANDSHAKE
        self._session: Session
        self._transport: asyncio.Transport
        self._inbox = Inbox(house.limits.max_header_bytes)
        self._waiting = 0
        self._left = 0
        """Bytes of the present request's body that nobody has read."""
        self._expects = False
        self._closes = False
        """One of both ends wants the connection closed after the present answer."""
        self._task: asyncio.Task[None] | None = None
        self._body: asyncio.Future[bytes] | None = None
        self._expires = NEVER
        self.out: Outbox
        """How whoever answers does so."""
        self.address, self.port = "", 0
        self.closed: asyncio.Future[None]
        """Done when the connection is lost."""

    # --- what asyncio tells -----------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake, if there is a place for one more connection."""
        self._transport = cast("asyncio.Transport", transport)
        self.address, self.port = transport.get_extra_info("peername")[:2]
        house = self._house
        try:
            session = house.edge.session()
        except Unavailable as error:
            self._turn_away(error.public)
            return
        if not house.places.connect(self.address):
            self._turn_away("too many connections")
            return
        self._session = session
        self.closed = asyncio.get_running_loop().create_future()
        self.out = Outbox(self._transport, session, house.limits.write_s)
        house.connections.add(self)
        self._expire(house.limits.handshake_s)

    def data_received(self, data: bytes) -> None:
        """Take bytes from the wire."""
        self._waiting += len(data)
        if self._state in (State.ENDING, State.CLOSED):
            if self._waiting > _MAX_LINGERING:
                self._transport.abort()
            return
        try:
            self._session.receive(data)
        except HandshakeRefused as refused:
            self.out.flush()
            self._refused(refused.cause)
            self._end(linger=False)
            return
        self.out.flush()
        if self._state is State.HANDSHAKE and self._session.established:
            self._state = State.HEAD
            self._expire(self._house.limits.header_s)
        self._pump()

    def eof_received(self) -> bool:
        """Close: a client that stops sending is taken to have gone."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End what is being answered."""
        if self._state is State.CLOSED:
            return
        if self._state is State.HANDSHAKE:
            self._refused("connection closed in the handshake")
        self._state = State.CLOSED
        self.closed.set_result(None)
        self._house.connections.discard(self)
        self._house.places.disconnect(self.address)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        """Have whoever answers wait: the client does not take what it is sent."""
        if self._state is not State.CLOSED:
            self.out.pause()

    def resume_writing(self) -> None:
        """Let whoever answers go on."""
        if self._state is not State.CLOSED:
            self.out.resume()

    # --- what the gateway tells -------------------------------------------------

    def look(self, now: float) -> None:
        """End what has taken too long."""
        if now < min(self._expires, self.out.expires):
            return
        if self._state is State.BODY and self._body is not None:
            self._expires = NEVER
            if not self._body.done():
                self._body.set_exception(Malformed(408, "the body took too long"))
        elif self._state is State.HEAD and self._inbox:
            self._refuse(Malformed(408, "the header took too long"))
        elif self._state is State.HEAD:
            self._end(linger=False)
        else:
            if self._state is State.HANDSHAKE:
                self._state = State.ENDING
                self._refused("handshake took too long")
            elif self._state is State.ANSWER:
                self._refused("client does not read")
            self._transport.abort()

    def judge(self) -> None:
        """End the present answer if the client's identity does not hold any more."""
        if self._task is not None and self.chain:
            try:
                self._house.check(self._house.edge.peer(self.chain))
            except CallError as error:
                _LOG.warning("an answer is cut off: %s", error)
                self._transport.abort()

    def finish(self) -> None:
        """Close after the present answer; at once if there is none."""
        self._closes = True
        if self._state is State.HANDSHAKE:
            self._transport.abort()
            return
        self.out.closes = True
        if self._state is State.HEAD:
            self._end(linger=False)

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()

    # --- what whoever answers asks for ------------------------------------------

    @property
    def chain(self) -> tuple[bytes, ...]:
        """The client's certificates (DER, leaf first); empty: it showed none."""
        return self._session.chain

    @property
    def gone(self) -> bool:
        """Whether the client went away."""
        return self._state is State.CLOSED

    async def body(self) -> bytes:
        """Return the body of the present request. Raises Malformed if it is late."""
        if self._expects and len(self._inbox) < self._left:
            self.out.write(response.CONTINUE)
        self._state = State.BODY
        self._body = asyncio.get_running_loop().create_future()
        self._expire(self._house.limits.body_s)
        self._pump()
        try:
            return await self._body
        finally:
            self._body, self._expires = None, NEVER
            if self._state is State.BODY:  # it did not come
                self._state, self.out.closes = State.ANSWER, True

    # --- reading ----------------------------------------------------------------

    def _pump(self) -> None:
        """Read as far as is wanted."""
        while self._state in (State.HEAD, State.BODY):
            if self._advance():
                continue
            piece = self._session.read(_PIECE)
            if piece is None:
                self._waiting = 0
                self._transport.resume_reading()
                return
            if not piece:
                self._end(linger=False)
                return
            if self._state is State.HEAD and not self._inbox:
                self._expire(self._house.limits.header_s)
            self._inbox.add(piece)
        if self._waiting > MAX_WAITING and self._state is State.ANSWER:
            self._transport.pause_reading()

    def _advance(self) -> bool:
        """Return whether what is wanted was all there, and go on with it."""
        if self._state is State.BODY:
            return self._take_body()
        try:
            raw = self._inbox.head()
        except Malformed as malformed:
            self._refuse(malformed)
            return True
        if raw is None:
            return False
        self._begin(raw)
        return True

    def _take_body(self) -> bool:
        body = self._inbox.body(self._left)
        if body is None:
            return False
        self._left, self._state, self.out.closes = 0, State.ANSWER, self._closes
        if self._body is not None and not self._body.done():
            self._body.set_result(body)
        return True

    def _begin(self, raw: bytes) -> None:
        limits = self._house.limits
        try:
            head = read_head(
                raw,
                max_headers=limits.max_headers,
                max_body_bytes=limits.max_body_bytes,
            )
        except Malformed as malformed:
            self._refuse(malformed)
            return
        self._state, self._expires = State.ANSWER, NEVER
        self._left, self._expects = head.length, head.expects
        # A body that nobody takes is never read, so nothing can follow it.
        self._closes = self._closes or head.closes
        self.out.closes = self._closes or head.length > 0
        answer = self._house.answer(self, head)
        self._task = asyncio.get_running_loop().create_task(answer)
        self._task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _LOG.error("a request was not answered", exc_info=error)
        whole = self._state is State.ANSWER and not self.out.streaming
        if task.cancelled() or error is not None or not whole:
            self._transport.abort()
        elif self.out.closes:
            self._end(linger=True)
        else:
            self._state = State.HEAD
            self._expire(self._house.limits.idle_s)
            self._pump()

    # --- ending -----------------------------------------------------------------

    def _refuse(self, malformed: Malformed) -> None:
        """Say what is wrong with the request, and close: nothing after it is safe."""
        self._refused(f"HTTP {malformed.status}")
        body = response.told(malformed.public)
        self.out.write(response.whole(malformed.status, body, closes=True))
        self._end(linger=True)

    def _end(self, *, linger: bool) -> None:
        """Close properly; with `linger`, let the client read what it was told first.

        A socket that is closed over unread bytes takes back what it has sent.
        """
        self._state = State.ENDING
        self._expire(_LINGER_S)
        self._transport.write(self._session.close())
        if not linger:
            self._transport.close()
            return
        self._waiting = 0
        try:
            self._transport.write_eof()
            self._transport.resume_reading()
        except OSError:  # the client has closed already
            self._transport.abort()

    def _refused(self, cause: str) -> None:
        self._house.refused(cause, self.address)

    def _turn_away(self, cause: str) -> None:
        self._state = State.CLOSED
        self._refused(cause)
        self._transport.abort()

    def _expire(self, seconds: float) -> None:
        self._expires = time.monotonic() + seconds
