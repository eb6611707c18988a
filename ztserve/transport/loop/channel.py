"""The way to one server at one address: its connections, one after the other."""

import asyncio
import random
import time
from collections import deque

from ztserve import types
from ztserve.errors import CallError, InferenceError, Unavailable, ZTServeError
from ztserve.identity import Quarantine, SpiffeId
from ztserve.transport.loop.call import ClientCall
from ztserve.transport.loop.causes import WrongServer, unreachable
from ztserve.transport.loop.link import Link
from ztserve.transport.tls import Ends
from ztserve.types import Peer

DIAL_S = 5.0
FIRST_PAUSE_S, MOST_PAUSE_S = 0.1, 2.0
"""Between two attempts at a connection, and the least that one should last."""
_jitter = random.SystemRandom().uniform
RENEW_S = 600.0
"""Each server is verified anew at least this often, and before its SVID expires."""
RENEW_AT = 0.6
"""Of what is left of that SVID's life, when it is seen."""
GONE = "the replica is gone, or may not be called any more"
PART_S = 0.5
"""What runs with those who may not be believed any more may last so long."""


class Expected:
    """Which server a client means: its exact SPIFFE ID, judged in the handshake."""

    def __init__(
        self, ends: Ends, server: SpiffeId, quarantine: Quarantine | None
    ) -> None:
        self.ends = ends
        self.server = server
        self._quarantine = quarantine

    def check(self, peer: Peer) -> None:
        """Raise CallError unless `peer` is the server, and may be called."""
        if peer.id != self.server:
            raise WrongServer(
                "another server", f"the server is {peer.id}, expected {self.server}"
            )
        if self._quarantine is not None:
            self._quarantine.check_server(peer.id, peer.serial)

    def judge(self, link: Link) -> None:
        """Raise CallError unless the server of a connection still holds."""
        peer = self.ends.judge(link.chain)
        self.check(peer)


class Channel:
    """Carries calls to one address, on the loop on which it was made.

    Calls wait while the first connection is being made, and fail at once where that
    failed a moment ago. A new connection takes the place of an older one when it is
    ready, so that rotation costs no call; the older one ends with its last call.
    """

    def __init__(self, address: str, expected: Expected) -> None:
        self.address = address
        self.in_flight = 0
        self.aside_until = 0.0
        self._expected = expected
        self._host, self._port = _parted(address)
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        """The connection that takes new calls."""
        self._links: set[Link] = set()
        """All that are open."""
        self._waiting: deque[ClientCall] = deque()
        self._dialling: asyncio.Task[None] | None = None
        self._again = False
        """Whether to dial once more when the present attempt has ended."""
        self._trouble: Exception | None = None
        self._pause_s = FIRST_PAUSE_S
        self._next_s = 0.0
        """Before this moment, no further attempt is made."""
        self._made_s = 0.0
        """When the last connection was made."""
        self._left = False

    # --- calls ------------------------------------------------------------------

    def begin(self, call: ClientCall) -> None:
        """Carry a call; where it cannot be sent, it ends in an error."""
        if call.over:
            return
        try:
            call.timer = self._loop.call_later(call.left_s(), call.expire)
            self._carry(call)
        except Exception as error:  # noqa: BLE001 - or who waits for it waits for ever
            call.finish(InferenceError(f"the call could not be sent: {error!r}"))

    def _carry(self, call: ClientCall) -> None:
        link = self._link
        if link is not None and link.takes:
            link.begin(call)
        elif self._left:
            call.finish(Unavailable(GONE))
        elif self._trouble is not None and time.monotonic() < self._next_s:
            call.finish(_told(self._trouble))
        else:
            self._waiting.append(call)
            self.dial()

    # --- connections ------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """Whether there is a connection that takes calls."""
        return self._link is not None

    @property
    def is_closed(self) -> bool:
        """Whether nothing is left open."""
        return not self._links and self._dialling is None

    def dial(self) -> None:
        """Make a new connection, unless one is being made."""
        if self._dialling is None and not self._left:
            self._dialling = self._loop.create_task(self._dial())

    def renew(self) -> None:
        """Show the server what we are now: by a new connection, for new calls."""
        self._again = self._dialling is not None
        self.dial()

    def rejudge(self) -> None:
        """Break off soon where the server does not hold any more by what holds now."""
        for link in list(self._links):
            try:
                if link.ready.done():
                    self._expected.judge(link)
            except CallError:
                self._part(link)
        self._next_s = 0.0

    def look(self, now: float) -> None:
        """See to what has a time."""
        for link in list(self._links):
            link.look(now)
            if link.peer is not None and types.now() > link.peer.not_after:
                self._part(link)
        current = self._link
        if (current is None or now > current.renews_at) and now >= self._next_s:
            self.dial()

    def distrust(self) -> None:
        """Take no more calls; break off soon what runs."""
        self.leave()
        for link in list(self._links):
            self._part(link)

    def leave(self) -> None:
        """Take no more calls, and close when the last has ended."""
        self._left = True
        if self._dialling is not None:
            self._dialling.cancel()
            self._dialling = None  # cancelled before it began, it does not do so itself
        self._fail(Unavailable(GONE))
        self._link = None
        for link in list(self._links):
            self._retire(link)

    def abort(self) -> None:
        """Close now."""
        self.leave()
        for link in list(self._links):
            link.abort()

    def _part(self, link: Link) -> None:
        if link is self._link:
            self._link = None
        self._retire(link)
        # Short calls may end: where a root was dropped, the server is often good.
        self._loop.call_later(PART_S, link.break_off)

    def _retire(self, link: Link) -> None:
        """Let the last call of `link` end; what it has not sent goes elsewhere."""
        for call in link.leave():
            self._carry(call)

    def _hold_off(self, now: float) -> None:
        self._next_s = now + self._pause_s * _jitter(0.8, 1.2)
        self._pause_s = min(self._pause_s * 2, MOST_PAUSE_S)

    async def _dial(self) -> None:
        try:
            await asyncio.sleep(self._next_s - time.monotonic())
            link = await self._connected()
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait are told
            self._trouble = unreachable(error, self._expected.server, self.address)
            self._hold_off(time.monotonic())
            if self._link is None or not self._link.takes:
                self._fail(self._trouble)
        else:
            older, self._link = self._link, link
            self._trouble, self._next_s = None, 0.0
            self._made_s = time.monotonic()
            if older is not None:
                self._retire(older)
            while self._waiting:
                call = self._waiting.popleft()
                if not call.over:
                    link.begin(call)
        finally:
            self._dialling = None
            if self._again:
                self._again = False
                self.dial()

    async def _connected(self) -> Link:
        expected = self._expected
        session = expected.ends.connect(expected.check)
        link = Link(session, expected.server, self.address, self._changed)
        self._links.add(link)
        try:
            async with asyncio.timeout(DIAL_S):
                await self._loop.create_connection(lambda: link, self._host, self._port)
                await link.ready
            expected.judge(link)  # what holds may have changed meanwhile
        except BaseException:
            if not link.discard():
                self._links.discard(link)
            raise
        link.renews_at = time.monotonic() + _renewal_s(link.peer)
        return link

    def _changed(self, link: Link) -> None:
        if link.lost:
            self._links.discard(link)
        if link is self._link and not link.takes:
            self._link = None
            now = time.monotonic()
            if now - self._made_s < self._pause_s:
                self._hold_off(now)  # a server that lets go of each at once
            else:
                self._pause_s = FIRST_PAUSE_S
            self.dial()
        if not link.lost:
            self._retire(link)

    def _fail(self, error: Exception) -> None:
        while self._waiting:
            self._waiting.popleft().finish(_told(error))


def _told(error: Exception) -> ZTServeError:
    """Return an error of its own for each call: their tracebacks differ."""
    if isinstance(error, CallError):
        return type(error)(error.public, error.reason)
    return error if isinstance(error, ZTServeError) else Unavailable(str(error))


def _renewal_s(peer: Peer | None) -> float:
    if peer is None:
        return RENEW_S
    left_s = (peer.not_after - types.now()).total_seconds()
    return max(min(RENEW_S, RENEW_AT * left_s), 0.0)


def _parted(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
