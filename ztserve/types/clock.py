"""The one clock: wall time that never runs backward.

Every check of validity asks it. Its time is the later of what the wall clock says and
of what it said before plus the time that passed since, by a clock that nobody can set
(CLOCK_BOOTTIME: it goes on while the machine sleeps). So a wall clock that is set back
revives nothing that expired: checks fail closed until the process is started anew or
true time catches up. A wall clock that is set forward is believed at once, since what
may have expired must not be used. Either, over `MAX_STEP_S`, is told to those who asked
(`on_clock_step`): it may be an attack.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

_LOG = logging.getLogger(__name__)

MAX_STEP_S = 60.0
_GRAIN_S = 0.001
"""What the wall clock is ahead by less is not kept: slewing is no step."""
_from_timestamp = datetime.fromtimestamp

# Where there is no CLOCK_BOOTTIME (only Linux has it), a machine that slept looks as
# if its clock had been set forward.
_steady: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)


class Clock:
    """A clock over `wall` (Unix seconds, can be set) and `steady` (seconds, cannot)."""

    __slots__ = ("_callbacks", "_lock", "_offset", "_seen", "_steady", "_wall")

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = _steady,
    ) -> None:
        self._wall, self._steady = wall, steady
        self._offset = self._seen = wall() - steady()
        self._lock = threading.Lock()
        self._callbacks: dict[object, Callable[[float], None]] = {}

    def now(self) -> datetime:
        """Return the time in UTC: never less, by over 1 ms, than it was before."""
        wall = self._wall()  # first: a pause between the two must not look like a step
        offset = wall - self._steady()
        ahead = offset - self._offset
        if not -_GRAIN_S <= ahead <= _GRAIN_S:
            self._far_off(offset)
        return _from_timestamp(wall if ahead > 0 else wall - ahead, UTC)

    def on_step(self, callback: Callable[[float], None]) -> Callable[[], None]:
        """Have `callback` told of steps of the wall clock; return how to end that.

        It is called with the seconds (below zero: set back) at the next `now` after a
        step of over `MAX_STEP_S`, or after smaller ones that add up to that; once for
        each, on the thread that asked, so it should return soon.
        """
        key = object()
        with self._lock:
            self._callbacks[key] = callback

        def unsubscribe() -> None:
            with self._lock:
                self._callbacks.pop(key, None)

        return unsubscribe

    def _far_off(self, offset: float) -> None:
        """Take note of a wall clock that is `offset` ahead of the steady one."""
        with self._lock:
            # Read again: of two threads the slower one knows only what was.
            latest = self._wall() - self._steady()
            self._offset = max(self._offset, offset, latest)
            seconds = latest - self._seen
            if abs(seconds) <= MAX_STEP_S:
                return
            self._seen = latest
            callbacks = list(self._callbacks.values())
        _LOG.warning("clock-stepped: the wall clock was set by %+.3f s", seconds)
        for callback in callbacks:
            try:
                callback(seconds)
            except Exception:  # noqa: BLE001
                # One listener's fault must not leave everybody without the time.
                _LOG.exception("a listener to steps of the clock failed")


_clock = Clock()
now = _clock.now
on_clock_step = _clock.on_step
