"""The messages of one call, and the patience that it is given."""

import logging
import threading
import time
from typing import TYPE_CHECKING

from ztserve.errors import Cancelled, DeadlineExceeded, InvalidInput, ZTServeError
from ztserve.transport.limits import Limits
from ztserve.transport.loop.exchange import Cut, Exchange

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger(__name__)

SWEEP_S = 0.25
GRACE_S = 1.0
"""After a deadline, so that the rooms' own DeadlineExceeded comes first."""


class Rpc:
    """A call that is running: reads its messages within its time.

    `due` is the moment (`time.monotonic`) at which the `Reaper` cancels it.
    """

    __slots__ = ("_exchange", "_limits", "deadline", "due", "still")

    def __init__(self, exchange: Exchange, limits: Limits) -> None:
        self._exchange = exchange
        self._limits = limits
        self.deadline = self.due = float("inf")
        self.still: Callable[[], object] | None = None
        """Raises ZTServeError once the peer may not go on; asked at each sweep."""

    def read(self) -> bytes:
        """Return the first message, whole.

        Raises InvalidInput, Overloaded, DeadlineExceeded or Cancelled.
        """
        message = self._next(self._limits.body_s, "the request did not arrive within")
        if message is None:
            raise InvalidInput("the call carried no message")
        return message

    def more(self) -> bytes | None:
        """Return a stream's next message, or None where the caller sent its last."""
        return self._next(self._limits.stream_idle_s, "the stream was silent for")

    def sending(self) -> None:
        """Bound the time that the caller takes to accept a piece of the answer."""
        self._wait(self._limits.stream_idle_s)

    def running(self) -> None:
        """Bound the call by its own deadline."""
        self._wait(float("inf"))

    def cancel(self) -> None:
        """End the call from another thread, if it has not ended by itself."""
        self._exchange.cancel()

    def _wait(self, patience_s: float) -> None:
        # A caller that is gone need not have said so: its deadline holds meanwhile.
        self.due = min(time.monotonic() + patience_s, self.deadline + GRACE_S)

    def _next(self, patience_s: float, complaint: str) -> bytes | None:
        self._wait(patience_s)
        try:
            message = self._exchange.receive()
        except Cut:
            now = time.monotonic()
            if now >= self.deadline:
                late = "the deadline passed before the message came"
                raise DeadlineExceeded(late) from None
            if now >= self.due:
                raise DeadlineExceeded(f"{complaint} {patience_s:g} s") from None
            raise Cancelled("the call ended before its message was whole") from None
        self.running()
        return message


class Reaper:
    """Cancels calls that outlast their patience, or whose peer may not go on.

    One thread a server, one sweep every quarter of a second: a call pays no more than
    a place in a set. Without it, a caller that sends or takes nothing would hold a
    thread for as long as it likes.
    """

    def __init__(self) -> None:
        self._calls: set[Rpc] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._sweep, name="ztserve-reaper", daemon=True
        )
        self.add = self._calls.add
        self.discard = self._calls.discard

    def start(self) -> None:
        """Begin to sweep."""
        self._thread.start()

    def close(self) -> None:
        """Sweep no more."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _sweep(self) -> None:
        while not self._closed.wait(SWEEP_S):
            now = time.monotonic()
            for rpc in tuple(self._calls):
                if now >= rpc.due or not _may_go_on(rpc):
                    rpc.cancel()


def _may_go_on(rpc: Rpc) -> bool:
    if rpc.still is None:
        return True
    try:
        rpc.still()
    except ZTServeError:
        return False
    except Exception:  # noqa: BLE001 - a fault for one call must not end the sweeps
        _LOG.exception("a call whose peer could not be judged is ended")
        return False
    return True
