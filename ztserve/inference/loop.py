"""The event loop of asynchronous model code, on a thread of its own."""

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

from ztserve.errors import InferenceError, Unavailable
from ztserve.inference.context import inference_mode, working_for
from ztserve.inference.turns import LOOK_UP_S, any_wanted
from ztserve.types import Call

CLOSE_S = 5.0
"""How long cancelled model code has to end."""


class ModelLoop:
    """Runs awaitables for waiting threads; at most `max_ongoing` at a time."""

    def __init__(self, max_ongoing: int) -> None:
        self._lock = threading.Lock()
        self._places = asyncio.Semaphore(max_ongoing)
        self._closing = asyncio.Event()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def wait(
        self,
        calls: tuple[Call, ...],
        awaitable: Awaitable[Any],
        *,
        within_s: float = math.inf,
    ) -> Any:
        """Return what `awaitable` gives, or raise what it raises.

        Cancels it, and waits a little for its end, where nobody waits for `calls` any
        more (Cancelled, DeadlineExceeded) or `within_s` have passed (InferenceError).
        """
        work = _Work(awaitable, partial(self._run, calls, awaitable))
        work.begin(self._running)
        until = time.monotonic() + within_s
        try:
            while not work.ended.wait(LOOK_UP_S):
                if time.monotonic() >= until:
                    raise InferenceError(f"the model's code goes on after {within_s} s")
                any_wanted(calls)
        except BaseException:
            work.cancel()
            raise
        return work.result()

    def close(self) -> None:
        """Cancel what still runs, and stop the loop and its thread."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is not None and thread is not None and thread.is_alive():
            loop.call_soon_threadsafe(self._closing.set)
            thread.join(CLOSE_S)

    async def _run(self, calls: tuple[Call, ...], awaitable: Awaitable[Any]) -> Any:
        # What ends another's work needs no place: it gives one free.
        async with self._places if calls else nullcontext():
            with working_for(calls):
                return await awaitable

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise Unavailable("this replica is stopping; try again")
            if self._loop is None:
                started = threading.Event()
                self._thread = threading.Thread(
                    target=self._live,
                    args=(started,),
                    name="ztserve-model",
                    daemon=True,
                )
                self._thread.start()
                started.wait()
            if self._loop is None:
                raise InferenceError("the model's event loop could not be started")
            return self._loop

    def _live(self, started: threading.Event) -> None:
        async def until_closed() -> None:
            self._loop = asyncio.get_running_loop()
            started.set()
            await self._closing.wait()

        try:
            with inference_mode():
                asyncio.run(until_closed())
        finally:
            started.set()


class _Work:
    """One awaitable on the loop, and the thread that waits for it."""

    def __init__(
        self, awaitable: Awaitable[Any], run: Callable[[], Coroutine[Any, Any, Any]]
    ) -> None:
        self._awaitable = awaitable
        self._run = run
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self.ended = threading.Event()

    def begin(self, running: Callable[[], asyncio.AbstractEventLoop]) -> None:
        """Have the loop take it up."""
        try:
            self._loop = running()
            self._loop.call_soon_threadsafe(self._start)
        except BaseException:
            self._discard()
            raise

    def cancel(self) -> None:
        """Cancel it; return when it has ended, or does not want to."""
        if self._loop is not None:
            with suppress(RuntimeError):  # closed: it has cancelled all that ran
                self._loop.call_soon_threadsafe(self._cancel)
        self.ended.wait(CLOSE_S)

    def result(self) -> Any:
        """Return what it gave, once it has ended, or raise what it raised."""
        if self._task is None:
            raise InferenceError("the model's code has not been run")
        return self._task.result()

    # --- on the loop ----------------------------------------------------------------

    def _start(self) -> None:
        self._task = asyncio.ensure_future(self._run())
        self._task.add_done_callback(self._end)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _end(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # marks it as seen, though the caller may be gone
        self._discard()
        self.ended.set()

    def _discard(self) -> None:
        """Let the coroutine go: it may not have begun."""
        if inspect.iscoroutine(self._awaitable):
            self._awaitable.close()
