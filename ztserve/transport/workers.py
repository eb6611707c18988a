"""The threads on which calls are answered."""

import logging
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeAlias

_LOG = logging.getLogger(__name__)

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

    A thread starts whenever none is idle, so there are as many as the server lets
    calls run at once. There is no queue and no future with its locks, which makes a
    call cheaper than on a `ThreadPoolExecutor`.
    """

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._closed = False

    def submit(  # type: ignore[override]
        self, function: Callable[..., Any], /, *arguments: Any
    ) -> _Ending:
        """Run `function` on a thread; what is returned tells only of its end."""
        ending = _Ending()
        job = (ending, function, arguments)
        try:
            worker = self._idle.pop()
        except IndexError:
            _Worker(self, job).start()
            return ending
        worker.job = job
        worker.turn.release()
        return ending

    def take_back(self, worker: _Worker) -> None:
        """Have `worker` wait for its next turn, or end where the pool is closed."""
        self._idle.append(worker)
        if self._closed:
            self.close()

    def close(self) -> None:
        """End the idle threads now, the others after their call."""
        self._closed = True
        while self._idle:
            try:
                self._idle.pop().turn.release()
            except IndexError:
                return
