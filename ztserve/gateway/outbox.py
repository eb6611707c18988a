"""What goes to a client: whole answers, streamed ones, and no faster than it reads."""

import asyncio
import time

from ztserve.gateway import response
from ztserve.gateway.tls import Session

MAX_WAITING = 256 * 1024
"""Bytes that may wait for the client before whoever answers is made to wait."""
NEVER = float("inf")


class Outbox:
    """The way out of one connection."""

    def __init__(
        self, transport: asyncio.Transport, session: Session, write_s: float
    ) -> None:
        transport.set_write_buffer_limits(high=MAX_WAITING)
        self._transport = transport
        self._session = session
        self._write_s = write_s
        self._writable: asyncio.Future[None] | None = None
        self.expires = NEVER
        """When the client must have read what it was sent."""
        self.closes = False
        """Nothing follows the present answer."""
        self.streaming = False
        """A streamed answer has begun: its status can no longer be changed."""

    def pause(self) -> None:
        """Have writers wait: the client does not take what it is sent."""
        self._writable = asyncio.get_running_loop().create_future()

    def resume(self) -> None:
        """Let writers go on."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def flush(self) -> None:
        """Send what TLS itself has to say."""
        if sent := self._session.outgoing():
            self._transport.write(sent)

    def write(self, data: bytes) -> None:
        """Send `data`, without waiting."""
        self._transport.write(self._session.write(data))

    async def reply(self, status: int, body: bytes, call_id: str = "") -> None:
        """Send a whole answer."""
        await self._send(
            response.whole(status, body, closes=self.closes, call_id=call_id)
        )

    async def event(self, event: bytes, call_id: str) -> None:
        """Send one event of a streamed answer; the first one begins it."""
        await self._send(self._begun(call_id) + response.chunk(event))

    async def last_event(self, call_id: str) -> None:
        """End a streamed answer."""
        rest = self._begun(call_id) + response.LAST_CHUNK
        self.streaming = False
        await self._send(rest)

    def _begun(self, call_id: str) -> bytes:
        if self.streaming:
            return b""
        self.streaming = True
        kind, closes = response.EVENTS, self.closes
        return response.head(200, kind, length=None, closes=closes, call_id=call_id)

    async def _send(self, data: bytes) -> None:
        for at in range(0, len(data), MAX_WAITING):
            self.write(data[at : at + MAX_WAITING])
            if self._writable is not None:
                self.expires = time.monotonic() + self._write_s
                await self._writable
                self.expires = NEVER
