"""The server's event loop: one thread leads it, and may answer calls itself.

Handing a call to another thread and back costs more than a small model takes. So
whoever leads may do such work in its own turn; meanwhile a deputy stands by, and leads
in its place where that takes too long: nothing that the work does can hold up the
connections, or whoever asks whether we are alive, for longer than `PATIENCE_S`.

What the loop holds is touched by the thread that leads, and by no other.
"""

import contextlib
import heapq
import itertools
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from ztserve.transport.loop.carrier import guarded
from ztserve.transport.loop.plug import Plug

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_Job: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]

PATIENCE_S = 0.02
"""How often the deputy looks whether the leader is away for too long; it leads after
one to two times that."""
ACCEPTED = 16
"""Connections that are taken in one turn: each has its handshake to do."""
EXHAUSTED_S = 0.5
"""Pause of accepting where the process can have no more files."""
FAULT_S = 0.01
"""After a fault of ours in a turn: one that comes again must not take all the time."""
_MAX_WAIT_S = 1.0
_EVENTS = 256


class Reactor:
    """Sockets, timers and what other threads post; runs on two threads of its own.

    `connected` makes the protocol of a new connection; `turned` is called at the end of
    each turn, and returns whether the caller still leads (see `away`).
    """

    def __init__(
        self,
        listener: socket.socket,
        connected: Callable[[], Any],
        turned: Callable[[], bool],
    ) -> None:
        self._listener = listener
        self._connected = connected
        self._turned = turned
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._plugs: dict[int, Plug] = {}
        self._soon: deque[_Job] = deque()
        self._posted: deque[_Job] = deque()
        self._rung = False
        self._timers: list[tuple[float, int, _Job]] = []
        self._count = itertools.count()
        self._lock = threading.Lock()
        self._leader: threading.Thread | None = None
        self._away_since: float | None = None
        self._deputies = 0
        """Threads that stand by: without one, the leader does no work of others."""
        self._closing = self._closed = False
        self._ended = threading.Event()
        listener.settimeout(0)
        self._epoll.register(listener, select.EPOLLIN)
        self._epoll.register(self._bell, select.EPOLLIN)

    # --- from any thread --------------------------------------------------------

    def start(self) -> None:
        """Begin, on two threads."""
        threads = [
            threading.Thread(target=self._serve, name="ztserve-loop", daemon=True)
            for _ in range(2)
        ]
        self._leader = threads[0]
        for thread in threads:
            thread.start()

    def post(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Have something done on the loop, after what was posted before."""
        self._posted.append((action, arguments))
        if not self._rung:
            self._rung = True
            with self._lock:
                if not self._closed:
                    os.eventfd_write(self._bell, 1)

    def stop(self, patience_s: float) -> None:
        """Close all connections, and end; wait for that, but not for ever."""
        self._closing = True
        self.post(int)  # no more than a ring
        self._ended.wait(patience_s)

    # --- on the loop ------------------------------------------------------------

    def soon(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Have something done later in this turn."""
        self._soon.append((action, arguments))

    def later(self, seconds: float, action: Callable[..., Any], *given: Any) -> None:
        """Have something done in a while."""
        at = time.monotonic() + seconds
        heapq.heappush(self._timers, (at, next(self._count), (action, given)))

    def deafen(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(self._listener)
        self._listener.close()

    @property
    def may_leave(self) -> bool:
        """Whether a deputy stands by, so that the leader may do work of others."""
        return self._deputies > 0

    def away(self, work: Callable[[], _T], then: Callable[[_T], object]) -> bool:
        """Do `work`, and `then` what it needs of the loop; return who leads by now.

        False: it took so long that another thread leads. `then` is posted, and the
        caller returns from its turn at once, touching nothing.
        """
        with self._lock:
            self._away_since = time.monotonic()
        try:
            found = work()
        finally:
            with self._lock:
                leads = self._leader is threading.current_thread()
                if leads:
                    self._away_since = None
        if leads:
            then(found)
        else:
            self.post(then, found)
        return leads

    # --- its threads ------------------------------------------------------------

    def _serve(self) -> None:
        me = threading.current_thread()
        while not self._ended.is_set():
            if self._leader is not me:
                self._stand_by(me)
                continue
            try:
                self._lead()
            except Exception:  # noqa: BLE001 - logged; a fault of ours ends no server
                _LOG.exception("a turn of the loop ended early")
                time.sleep(FAULT_S)

    def _stand_by(self, me: threading.Thread) -> None:
        """Wait until the leader is away for too long; then lead."""
        with self._lock:
            self._deputies += 1
        looked: float | None = None
        while not self._ended.wait(PATIENCE_S):
            since = self._away_since
            if since is None or since != looked:
                looked = since
                continue
            with self._lock:
                if self._away_since == since:
                    self._leader, self._away_since = me, None
                    break
        with self._lock:
            self._deputies -= 1

    def _lead(self) -> None:
        while True:
            for fd, mask in self._poll():
                self._heard(fd, mask)
            self._run_posted()
            if self._closing:
                self._close()
                return
            self._run_timers()
            self._run_soon()
            if not self._turned():
                return
            self._run_soon()

    def _poll(self) -> list[tuple[int, int]]:
        wait_s = 0.0 if self._soon or self._posted else _MAX_WAIT_S
        if self._timers and wait_s:
            wait_s = min(max(self._timers[0][0] - time.monotonic(), 0.0), wait_s)
        return self._epoll.poll(wait_s, _EVENTS)

    def _heard(self, fd: int, mask: int) -> None:
        plug = self._plugs.get(fd)
        if plug is not None:
            _carried(plug, plug.heard, mask)
        elif fd == self._bell:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        elif fd == self._listener.fileno():
            self._accept()

    def _accept(self) -> None:
        for _ in range(ACCEPTED):
            try:
                raw, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _LOG.warning("no connection can be accepted now: %s", error)
                self._epoll.modify(self._listener, 0)
                self.later(EXHAUSTED_S, self._listen_again)
                return
            plug = Plug(raw, address, self._epoll, self._plugs, self.soon)
            _carried(plug, plug.begin, self._connected())

    def _listen_again(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._epoll.modify(self._listener, select.EPOLLIN)

    def _run_posted(self) -> None:
        self._rung = False  # before we look: what is posted from now on rings again
        for _ in range(len(self._posted)):
            action, arguments = self._posted.popleft()
            guarded(action, *arguments)

    def _run_soon(self) -> None:
        while self._soon:
            action, arguments = self._soon.popleft()
            guarded(action, *arguments)

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            action, arguments = heapq.heappop(self._timers)[2]
            guarded(action, *arguments)

    def _close(self) -> None:
        self.deafen()
        for plug in list(self._plugs.values()):
            plug.abort()
        self._run_soon()
        self._posted.clear()
        with self._lock:  # or a late post would ring what another has by that number
            self._closed = True
            os.close(self._bell)
        self._epoll.close()
        self._ended.set()


def _carried(plug: Plug, action: Callable[[Any], None], given: Any) -> None:
    """Have one connection do something; a fault of it ends no other."""
    try:
        action(given)
    except Exception:  # noqa: BLE001 - logged; the connection ends
        _LOG.exception("a connection could not be carried")
        plug.abort()
