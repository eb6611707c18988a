"""Keeps an async client's lanes as they should be, on tasks of its own."""

import asyncio
import contextlib
import logging
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from ztserve.errors import Unavailable, ZTServeError
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
        self._unsubscribe = route.source.subscribe(self._woken)
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
                await asyncio.wait_for(self._known.wait(), patience_s)
        return self._route.lane(attempts.tried)

    async def close(self) -> None:
        """Let go of all lanes."""
        self._closed = True
        self._unsubscribe()
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
                await asyncio.wait_for(self._wake.wait(), pause_s)
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
        return all(opened)

    async def _open(self, address: str) -> bool:
        route = self._route
        generation = route.generation
        channel = grpc.aio.secure_channel(
            door.checked_target(address), route.credentials, options=route.options
        )
        if route.patient and address in route.replicas:
            try:
                await asyncio.wait_for(channel.channel_ready(), protocol.READY_S)
            except TimeoutError:
                await channel.close(None)
                return False
        route.replicas.install(Lane(address, channel, generation))
        return True

    async def _follow(self) -> None:
        while True:
            try:
                await self._watch()
            except ZTServeError as error:
                self._route.trouble = error
                _LOG.info("directory %s: %s", self._route.directory, error)
            await asyncio.sleep(protocol.AGAIN_S)

    async def _watch(self) -> None:
        route = self._route
        identity = route.source.current()
        async with grpc.aio.secure_channel(
            door.checked_target(route.directory),
            channels.credentials(identity, route.directory_id),
            options=channels.options(route.directory_id, protocol.MAX_MESSAGE_BYTES),
        ) as channel:
            watch = cast("Any", channel).unary_stream(door.PATH)
            try:
                async for message in watch(door.watch_request(route.target)):
                    route.announce(door.read_deployment(message))
                    self._wake.set()
            except grpc.RpcError as error:
                raise protocol.failure(error, route.directory_id) from None
