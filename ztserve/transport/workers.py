"""The threads on which calls are answered."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeAlias

_LOG = logging.getLogger(__name__)

RESERVE = 16
"""Threads beyond `max_in_flight`: a call too many is told so, and health is told."""

_Job: TypeAlias = tuple["_Ending", Callable[..., Any], tuple[Any, ...]]


class _Ending:
    """What gRPC needs of a future: to be told, once, that the job has ended."""

    __slots__ = ("_callbacks", "_ended")

    def __init__(self) -> None:
        self._callbacks: list[Callable[[object], object]] = []
        self._ended = False

    def add_done_callback(self, callback: Callable[[object], object]) -> None:
        self._callbacks.append(callback)
        if self._ended:
            self._tell()

    def end(self) -> None:
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        try:
            callback = self._callbacks.pop()  # atomic: only one of two threads gets it
        except IndexError:
            return
        callback(self)


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
            ending, function, arguments = job
            try:
                function(*arguments)
            except BaseException:  # noqa: BLE001 - logged; the thread serves the next
                _LOG.exception("a call ended its thread's work")
            finally:
                del job, function, arguments
                # Idle first: a call that is admitted next finds this thread.
                self._workers.take_back(self)
                ending.end()
            self.turn.acquire()


class Workers(futures.Executor):
    """A thread pool whose idle threads form a stack: the warmest takes the next call.

    A thread starts whenever none is idle, until there are `most`; then jobs wait.
    There is no future with its locks, which makes a call cheaper than on a
    `ThreadPoolExecutor`.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: list[_Worker] = []
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._started = 0
        self._closed = False

    def submit(  # type: ignore[override]
        self, function: Callable[..., Any], /, *arguments: Any
    ) -> _Ending:
        """Run `function` on a thread; what is returned tells only of its end."""
        ending = _Ending()
        job = (ending, function, arguments)
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
        return ending

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
