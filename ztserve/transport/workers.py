"""The threads on which calls are answered."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

_LOG = logging.getLogger(__name__)

RESERVE = 16
"""Threads beyond `max_in_flight`: a call too many is told so, and health is told."""

_Job: TypeAlias = tuple[Callable[..., object], tuple[Any, ...]]


class _Worker(threading.Thread):
    """A thread that takes one job after the other from `Workers`."""

    def __init__(self, workers: "Workers", job: _Job) -> None:
        super().__init__(name="ztserve-call", daemon=True)
        self.job: _Job | None = job
        self.turn = threading.Lock()
        self.turn.acquire()
        self._workers = workers

    def run(self) -> None:
        while (job := self.job) is not None:
            self.job = None
            function, arguments = job
            try:
                function(*arguments)
            except BaseException:  # noqa: BLE001 - logged; the thread serves the next
                _LOG.exception("a call ended its thread's work")
            finally:
                del job, function, arguments
                self._workers.take_back(self)
            self.turn.acquire()


class Workers:
    """A thread pool whose idle threads form a stack: the warmest takes the next call.

    A thread starts whenever none is idle, until there are `most`; then jobs wait.
    There are no futures with their locks, which makes a call cheaper than on a
    `ThreadPoolExecutor`.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: list[_Worker] = []
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._started = 0
        self._closed = False

    def submit(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run `function` on a thread."""
        job = (function, arguments)
        with self._lock:
            starts = not self._idle and self._started < self._most
            self._started += starts
            if not starts:
                self._give(job)
        if starts:
            try:
                _Worker(self, job).start()
            except RuntimeError:  # the system has no thread for us
                _LOG.warning("no thread could be started; a call waits for another")
                with self._lock:
                    self._started -= 1
                    self._give(job)

    def _give(self, job: _Job) -> None:
        if self._idle:
            worker = self._idle.pop()
            worker.job = job
            worker.turn.release()
        else:
            self._jobs.append(job)

    def take_back(self, worker: _Worker) -> None:
        """Have `worker` do what waits, or wait itself; end where the pool is closed."""
        with self._lock:
            self._idle.append(worker)
            if self._jobs:
                self._give(self._jobs.popleft())
            elif self._closed:
                self._idle.remove(worker)
                worker.turn.release()

    def close(self) -> None:
        """End the idle threads now, the others after their call."""
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.pop().turn.release()
