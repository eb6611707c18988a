"""An event loop on a thread of its own, for those who wait on theirs."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from ztserve.errors import Unavailable
from ztserve.transport.loop.carrier import guarded

T = TypeVar("T")
_ENDED = "this client is closed"


class LoopThread:
    """Runs what other threads give it; `close` ends it."""

    def __init__(self, name: str) -> None:
        self._posted: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._woken = False
        self._ended = False
        """Whether nothing is run any more that is given from now on."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin a coroutine; return what to wait for. Raises Unavailable at the end."""
        if self._ended:
            coroutine.close()
            raise Unavailable(_ENDED)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def post(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Have something done on the loop, after what was posted before.

        Raises Unavailable at the end: then it may never be done.
        """
        self._posted.append((action, arguments))
        if (
            self._ended
        ):  # looked at after it was put there, as `_run` ends before it looks
            raise Unavailable(_ENDED)
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # closed: `_run` has looked by then
                self._loop.call_soon_threadsafe(self._run_posted)

    def close(self, last: Coroutine[Any, Any, object]) -> None:
        """End the loop when `last` has ended; do not wait for it."""
        self.run(last).add_done_callback(
            lambda _: self._loop.call_soon_threadsafe(self._loop.stop)
        )

    def join(self, patience_s: float) -> None:
        """Wait until the thread has ended, but no longer than so long."""
        self._thread.join(patience_s)

    def _run_posted(self) -> None:
        self._woken = False  # before we look: what is posted from now on wakes again
        while self._posted:
            action, arguments = self._posted.popleft()
            guarded(action, *arguments)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._ended = True
            self._run_posted()
            self._loop.run_until_complete(_end_others())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


async def _end_others() -> None:
    """Cancel what still runs, so that whoever waits for it is told."""
    await asyncio.sleep(0)  # what was given a moment ago begins
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for one in others:
        one.cancel()
    await asyncio.gather(*others, return_exceptions=True)
