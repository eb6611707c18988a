"""Keeps a client's channels as they should be, on an event loop."""

import asyncio
import contextlib
import logging
import time
from functools import partial

from ztserve.errors import (
    DeadlineExceeded,
    Denied,
    IdentityError,
    Unauthenticated,
    Unavailable,
    ZTServeError,
)
from ztserve.transport import directory as door
from ztserve.transport import protocol
from ztserve.transport.loop.call import AwaitedCall
from ztserve.transport.loop.carrier import guarded
from ztserve.transport.loop.channel import Channel
from ztserve.transport.retry import Attempts, Budget
from ztserve.transport.route import Route

_LOG = logging.getLogger(__name__)


class Upkeep:
    """Follows the source, the quarantine and the directory, on the running loop."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._loop = asyncio.get_running_loop()
        self._known = asyncio.Event()
        self._wake = asyncio.Event()
        self._watching: AwaitedCall | None = None
        self._book: Channel | None = None
        self._unsubscribe = [
            one.subscribe(self._woken)
            for one in (route.source, route.quarantine)
            if one is not None
        ]
        self._tend_once(news=True)
        self._tasks = [self._loop.create_task(self._tend())]
        if route.deployment:
            self._tasks.append(self._loop.create_task(self._follow()))

    def channel(self, attempts: Attempts) -> Channel | None:
        """Take a channel for one attempt; None: wait for `known` first."""
        if not self._known.is_set():
            return None
        return self._route.channel(attempts.tried)

    async def known(self, attempts: Attempts) -> Channel:
        """Take a channel for one attempt; wait for a first replica to be known."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(attempts.left_s(), protocol.KNOWN_S)):
                await self._known.wait()
        return self._route.channel(attempts.tried)

    async def close(self) -> None:
        """Take no more calls, and let go of all channels."""
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._unsubscribe = []
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._route.replicas.keep_only(())
        self._known.set()  # none will be: those who wait are told
        if self._book is not None:
            self._book.abort()

    async def emptied(self) -> None:
        """Wait until the calls that ran at `close` have ended."""
        while list(self._route.replicas) or self._has_book():
            for channel in self._route.replicas:
                channel.look(time.monotonic())
            await asyncio.sleep(protocol.EMPTIED_S)

    def _has_book(self) -> bool:
        return self._book is not None and not self._book.is_closed

    def _woken(self) -> None:
        # The source calls from its own thread; the loop may be closed by then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake.set)

    async def _tend(self) -> None:
        while True:
            # Not wait_for: that of Python 3.11 can lose a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(protocol.LOOK_S):
                    await self._wake.wait()
            news = self._wake.is_set()
            self._wake.clear()
            guarded(partial(self._tend_once, news=news))

    def _tend_once(self, *, news: bool) -> None:
        """See to each channel; `news`: identity, quarantine or addresses changed."""
        route = self._route
        renewed = False
        try:
            if news:
                renewed = route.adopt()
        except (IdentityError, Unavailable):
            for channel in route.replicas:
                channel.distrust()
            route.replicas.keep_only(())
        if route.trusted:
            route.replicas.keep_only(route.addresses)
        now = time.monotonic()
        for channel in route.replicas:
            tend = partial(_tend_channel, channel, now, news=news, renewed=renewed)
            guarded(tend)  # what is wrong with one leaves the others cared for
        self._note_known()
        if self._book is not None:
            _tend_channel(self._book, now, news=news, renewed=renewed)
            self._check_directory()

    def _note_known(self) -> None:
        if self._route.addresses:
            self._known.set()
        elif not isinstance(self._route.trouble, Denied | Unauthenticated):
            self._known.clear()

    def _check_directory(self) -> None:
        try:
            self._route.check_directory()
        except ZTServeError as error:
            if self._watching is not None:
                self._watching.cancel(error)

    async def _follow(self) -> None:
        while True:
            try:
                await self._watch()
            except DeadlineExceeded:
                pass  # a watch has its time, as every stream
            except ZTServeError as error:
                self._route.trouble = error
                if isinstance(error, Denied | Unauthenticated):
                    self._known.set()  # whoever waits need wait no longer
                _LOG.info("directory %s: %s", self._route.directory, error)
            await asyncio.sleep(protocol.AGAIN_S)

    async def _watch(self) -> None:
        route = self._route
        route.check_directory()
        if self._book is None:
            self._book = Channel(route.directory, route.book)
        self._watching = call = AwaitedCall(
            door.PATH,
            door.watch_request(route.target),
            attempts=Attempts(Budget(), protocol.WATCH_S),
            server=route.directory_id,
            most=protocol.MAX_MESSAGE_BYTES,
        )
        self._book.begin(call)
        try:
            async for message in call:
                route.announce(door.read_deployment(message))
                self._wake.set()
        finally:
            self._watching = None
            call.let_go()


def _tend_channel(channel: Channel, now: float, *, news: bool, renewed: bool) -> None:
    if news:
        channel.rejudge()
    if renewed:
        channel.renew()
    channel.look(now)
