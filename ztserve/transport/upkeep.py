"""Keeps a client's lanes as they should be, on threads of its own."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import grpc

from ztserve.errors import Denied, Unauthenticated, Unavailable, ZTServeError
from ztserve.transport import channels, protocol
from ztserve.transport import directory as door
from ztserve.transport.replicas import Lane
from ztserve.transport.retry import Attempts
from ztserve.transport.route import Route

_LOG = logging.getLogger(__name__)

_Route: TypeAlias = Route[grpc.Channel]


class Upkeep:
    """Follows the source and the directory; opens, replaces and retires lanes.

    A new lane to a replica that has an older one takes its place when it is ready, so
    that rotation costs no call; the older one ends with its last call.
    """

    def __init__(self, route: _Route) -> None:
        self._route = route
        self._known = threading.Event()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._watching: Any = None
        self._unsubscribe = [
            one.subscribe(self._wake.set)
            for one in (route.source, route.quarantine)
            if one is not None
        ]
        self._tend_once()
        self._threads = [_started(self._tend)]
        if route.deployment:
            self._threads.append(_started(self._follow))

    def lane(self, attempts: Attempts) -> Lane[grpc.Channel]:
        """Take a lane for one attempt; wait for a first replica to be known."""
        if self._closed.is_set():
            raise Unavailable("this client is closed")
        if self._route.deployment and not self._known.is_set():
            self._known.wait(min(attempts.left_s(), protocol.KNOWN_S))
        return self._route.lane(attempts.tried)

    def close(self) -> None:
        """Let go of all lanes."""
        self._closed.set()
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._wake.set()
        if self._watching is not None:
            self._watching.cancel()
        for thread in self._threads:
            thread.join(timeout=protocol.READY_S)
        self._route.replicas.keep_only(())

    def _tend(self) -> None:
        pause_s = protocol.RENEW_S
        while not self._closed.is_set():
            if not self._wake.wait(pause_s) and pause_s == protocol.RENEW_S:
                self._route.renew()
            self._wake.clear()
            all_open = self._tend_once()
            pause_s = protocol.RENEW_S if all_open else protocol.AGAIN_S

    def _tend_once(self) -> bool:
        """Open the lanes that are missing; return whether there is one for each."""
        opened = [self._open(address) for address in self._route.look()]
        if self._route.addresses:
            self._known.set()
        else:
            self._known.clear()
        self._break_off()
        return all(opened)

    def _break_off(self) -> None:
        """End what runs with those who may not be believed any longer."""
        distrusted, self._route.distrusted = self._route.distrusted, 0
        if distrusted:
            # Short calls may end: where a root was dropped, the server is often good.
            timer = threading.Timer(
                protocol.PART_S, self._route.replicas.cut, (distrusted,)
            )
            timer.daemon = True
            timer.start()
        if self._watching is not None:
            try:
                self._route.check_directory()
            except ZTServeError:
                self._watching.cancel()

    def _open(self, address: str) -> bool:
        route = self._route
        generation = route.generation
        channel = grpc.secure_channel(
            door.checked_target(address), route.credentials, options=route.options
        )
        waits = route.patient and address in route.replicas
        if waits and not self._is_ready(channel):
            channel.close()
            return False
        route.replicas.install(Lane(address, channel, generation))
        return True

    def _is_ready(self, channel: grpc.Channel) -> bool:
        """Wait for `channel`, but no longer than until there is news."""
        ready = grpc.channel_ready_future(channel)
        until = time.monotonic() + protocol.READY_S
        while True:
            try:
                ready.result(protocol.NEWS_S)
                return True
            except grpc.FutureTimeoutError:
                if self._wake.is_set() or time.monotonic() > until:
                    ready.cancel()
                    return False

    def _follow(self) -> None:
        while not self._closed.is_set():
            try:
                self._watch()
            except ZTServeError as error:
                self._route.trouble = error
                if isinstance(error, Denied | Unauthenticated):
                    self._known.set()  # whoever waits need wait no longer
                _LOG.info("directory %s: %s", self._route.directory, error)
            self._closed.wait(protocol.AGAIN_S)

    def _watch(self) -> None:
        route = self._route
        route.check_directory()
        identity = route.source.current()
        with grpc.secure_channel(
            door.checked_target(route.directory),
            channels.credentials(identity, route.directory_id),
            options=channels.options(route.directory_id, protocol.MAX_MESSAGE_BYTES),
        ) as channel:
            watch = cast("Any", channel).unary_stream(door.PATH)
            self._watching = call = watch(door.watch_request(route.target))
            try:
                for message in call:
                    route.announce(door.read_deployment(message))
                    self._wake.set()
            except grpc.RpcError as error:
                raise protocol.failure(error, route.directory_id) from None


def _started(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name="ztserve-client", daemon=True)
    thread.start()
    return thread
