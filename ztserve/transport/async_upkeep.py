"""Keeps an async client's lanes as they should be, on tasks of its own."""

import asyncio
import contextlib
import logging
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from ztserve.errors import Denied, Unauthenticated, Unavailable, ZTServeError
from ztserve.transport import channels, protocol
from ztserve.transport import directory as door
from ztserve.transport.replicas import Lane
from ztserve.transport.retry import Attempts
from ztserve.transport.route import Route

_LOG = logging.getLogger(__name__)

_Route: TypeAlias = Route[grpc.aio.Channel]


class AsyncUpkeep:
    """As `upkeep.Upkeep`, on the event loop of the first call."""

    def __init__(self, route: _Route) -> None:
        self._route = route
        self._loop = asyncio.get_running_loop()
        self._known = asyncio.Event()
        self._wake = asyncio.Event()
        self._closed = False
        self._watching: Any = None
        self._unsubscribe = [
            one.subscribe(self._woken)
            for one in (route.source, route.quarantine)
            if one is not None
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the first lanes."""
        await self._tend_once()
        self._tasks.append(self._loop.create_task(self._tend()))
        if self._route.deployment:
            self._tasks.append(self._loop.create_task(self._follow()))

    async def lane(self, attempts: Attempts) -> Lane[grpc.aio.Channel]:
        """Take a lane for one attempt; wait for a first replica to be known."""
        if self._closed:
            raise Unavailable("this client is closed")
        if self._route.deployment and not self._known.is_set():
            with contextlib.suppress(TimeoutError):
                patience_s = min(attempts.left_s(), protocol.KNOWN_S)
                async with asyncio.timeout(patience_s):
                    await self._known.wait()
        return self._route.lane(attempts.tried)

    async def close(self) -> None:
        """Let go of all lanes."""
        self._closed = True
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._route.replicas.keep_only(())

    def _woken(self) -> None:
        # The source calls from its own thread; the loop may be closed by then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake.set)

    async def _tend(self) -> None:
        pause_s = protocol.RENEW_S
        while True:
            try:
                # Not wait_for: that of Python 3.11 can lose a cancellation.
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                if pause_s == protocol.RENEW_S:
                    self._route.renew()
            self._wake.clear()
            all_open = await self._tend_once()
            pause_s = protocol.RENEW_S if all_open else protocol.AGAIN_S

    async def _tend_once(self) -> bool:
        """Open the lanes that are missing; return whether there is one for each."""
        opened = [await self._open(address) for address in self._route.look()]
        if self._route.addresses:
            self._known.set()
        else:
            self._known.clear()
        self._break_off()
        return all(opened)

    def _break_off(self) -> None:
        """As `upkeep.Upkeep` does."""
        distrusted, self._route.distrusted = self._route.distrusted, 0
        if distrusted:
            self._loop.call_later(protocol.PART_S, self._route.replicas.cut, distrusted)
        if self._watching is not None:
            try:
                self._route.check_directory()
            except ZTServeError:
                self._watching.cancel()

    async def _open(self, address: str) -> bool:
        route = self._route
        generation = route.generation
        channel = grpc.aio.secure_channel(
            door.checked_target(address), route.credentials, options=route.options
        )
        waits = route.patient and address in route.replicas
        if waits and not await self._is_ready(channel):
            await channel.close(None)
            return False
        route.replicas.install(Lane(address, channel, generation))
        return True

    async def _is_ready(self, channel: grpc.aio.Channel) -> bool:
        """As `upkeep.Upkeep` does."""
        news = asyncio.ensure_future(self._wake.wait())
        ready = asyncio.ensure_future(channel.channel_ready())
        try:
            await asyncio.wait(
                {ready, news},
                timeout=protocol.READY_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            return ready.done()
        finally:
            ready.cancel()
            news.cancel()

    async def _follow(self) -> None:
        while True:
            try:
                await self._watch()
            except ZTServeError as error:
                self._route.trouble = error
                if isinstance(error, Denied | Unauthenticated):
                    self._known.set()  # whoever waits need wait no longer
                _LOG.info("directory %s: %s", self._route.directory, error)
            await asyncio.sleep(protocol.AGAIN_S)

    async def _watch(self) -> None:
        route = self._route
        route.check_directory()
        identity = route.source.current()
        async with grpc.aio.secure_channel(
            door.checked_target(route.directory),
            channels.credentials(identity, route.directory_id),
            options=channels.options(route.directory_id, protocol.MAX_MESSAGE_BYTES),
        ) as channel:
            watch = cast("Any", channel).unary_stream(door.PATH)
            self._watching = call = watch(door.watch_request(route.target))
            try:
                async for message in call:
                    route.announce(door.read_deployment(message))
                    self._wake.set()
            except grpc.RpcError as error:
                raise protocol.failure(error, route.directory_id) from None
            except asyncio.CancelledError:
                protocol.check_not_cancelled()
                raise protocol.cut_off(route.directory_id) from None
