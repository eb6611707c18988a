"""Who has the model now? One step at a time, in order of arrival."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from ztserve.errors import CallError, Cancelled, DeadlineExceeded
from ztserve.types import Call

LOOK_UP_S = 0.1
"""How often a waiting call looks whether its caller is still there."""


def still_wanted(call: Call) -> None:
    """Raise Cancelled or DeadlineExceeded where nobody waits for `call` any more."""
    if call.cancelled():
        raise Cancelled("the call was cancelled")
    if time.monotonic() >= call.deadline:
        raise DeadlineExceeded("the deadline passed before the answer was ready")


def any_wanted(calls: tuple[Call, ...]) -> None:
    """Raise as `still_wanted` does where that holds for each of `calls`."""
    gone: CallError | None = None
    for call in calls:
        try:
            still_wanted(call)
        except CallError as error:
            gone = error
        else:
            return
    if gone is not None:
        raise gone


class Turns:
    """A lock that goes from one to the next in order of arrival.

    A plain lock goes to whoever asks while it is free. A stream asks again as soon as
    it has let go, and would keep the model from all who wait for it.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    @contextmanager
    def turn(self, call: Call | None) -> Iterator[None]:
        """Hold the model alone, for one step.

        Raises Cancelled or DeadlineExceeded where nobody waits for `call` any more
        before its turn has come. None waits for as long as it takes.
        """
        self._take(call)
        try:
            yield
        finally:
            self._pass_on()

    def _take(self, call: Call | None) -> None:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            woken = threading.Lock()
            woken.acquire()
            self._waiting.append(woken)
        try:
            while not woken.acquire(timeout=LOOK_UP_S):
                if call is not None:
                    still_wanted(call)
        except BaseException:
            with self._mutex:
                waits = woken in self._waiting
                if waits:
                    self._waiting.remove(woken)
            if not waits:  # the turn came just now
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
