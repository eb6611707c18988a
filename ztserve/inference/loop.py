"""The event loop of asynchronous model code, on a thread of its own."""

import asyncio
import threading
from collections.abc import Awaitable
from typing import Any

from ztserve.inference.batching import LOOK_UP_S, still_wanted
from ztserve.inference.context import working_for
from ztserve.types import Call


class ModelLoop:
    """Runs awaitables for waiting threads; at most `max_ongoing` at a time."""

    def __init__(self, max_ongoing: int) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._places = asyncio.Semaphore(max_ongoing)

    def wait(self, calls: tuple[Call, ...], awaitable: Awaitable[Any]) -> Any:
        """Return what `awaitable` gives; cancel it when nobody waits any more."""
        future = asyncio.run_coroutine_threadsafe(
            self._run(calls, awaitable), self._running()
        )
        while True:
            try:
                return future.result(timeout=LOOK_UP_S)
            except TimeoutError:
                if future.done():
                    raise
            try:
                for call in calls:
                    still_wanted(call)
            except BaseException:
                future.cancel()
                raise

    def close(self) -> None:
        """Stop the loop and its thread."""
        with self._lock:
            loop, thread, self._loop = self._loop, self._thread, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=5)
            if not thread.is_alive():
                loop.close()

    async def _run(self, calls: tuple[Call, ...], awaitable: Awaitable[Any]) -> Any:
        async with self._places:
            with working_for(calls):
                return await awaitable

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="ztserve-model", daemon=True
                )
                self._thread.start()
            return self._loop
