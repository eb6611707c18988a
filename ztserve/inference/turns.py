"""Who has the model now? One step at a time, in order of arrival."""

import threading
import time
from collections import deque

from ztserve.errors import CallError, Cancelled, DeadlineExceeded
from ztserve.types import Call

LOOK_UP_S = 0.1
"""How often a waiting call looks whether its caller is still there."""
SLICE_S = 0.001
"""For how long one thread may take turn after turn while others wait."""


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


class _Waiter:
    """A thread that waits for its turn."""

    __slots__ = ("bell", "has_it", "thread")

    def __init__(self, thread: int) -> None:
        self.bell = threading.Lock()
        self.bell.acquire()
        self.thread = thread
        self.has_it = False
        """Whether the turn was given to it, not only offered."""


class Turns:
    """A lock that goes from one to the next in order of arrival.

    A plain lock goes to whoever asks while it is free. A stream asks again as soon as
    it has let go, and would keep the model from all who wait for it. But to hand it
    over at each piece of a model that is quick costs more than the pieces. So a thread
    may take it several times in a row, for `SLICE_S`; meanwhile the first of those who
    wait is woken, and has it if it comes while it is free.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[_Waiter] = deque()
        self._taken = False
        self._rung = False
        """Whether the first of those who wait was woken, and has not looked yet."""
        self._thread, self._since = 0, 0.0
        """Who took it last, and since when nobody else."""

    def turn(self, call: Call | None) -> "_Turn":
        """Return a context that holds the model alone, for one step.

        Entering it raises Cancelled or DeadlineExceeded where nobody waits for `call`
        any more before its turn has come. None waits for as long as it takes.
        """
        return _Turn(self, call)

    def _take(self, call: Call | None) -> None:
        me = threading.get_ident()
        with self._mutex:
            if not self._taken:
                self._give(me)
                return
            waiter = _Waiter(me)
            self._waiting.append(waiter)
        try:
            while not (waiter.bell.acquire(timeout=LOOK_UP_S) and self._got(waiter)):
                if call is not None:
                    still_wanted(call)
        except BaseException:
            self._give_up(waiter)
            raise

    def _pass_on(self) -> None:
        with self._mutex:
            if not self._waiting or time.monotonic() - self._since < SLICE_S:
                self._taken = False
                self._ring()
                return
            waiter = self._waiting.popleft()
            waiter.has_it = True
            self._give(waiter.thread)
            if not self._rung:
                waiter.bell.release()
            self._rung = False

    def _give(self, thread: int) -> None:
        self._taken = True
        if thread != self._thread:
            self._thread, self._since = thread, time.monotonic()

    def _ring(self) -> None:
        if self._waiting and not self._rung:
            self._rung = True
            self._waiting[0].bell.release()

    def _got(self, waiter: _Waiter) -> bool:
        """Return whether the turn is this waiter's, whose bell has rung."""
        with self._mutex:
            if waiter.has_it:
                return True
            self._rung = False
            if self._taken:
                return False
            self._waiting.popleft()
            self._give(waiter.thread)
            return True

    def _give_up(self, waiter: _Waiter) -> None:
        with self._mutex:
            if not waiter.has_it:
                if self._waiting[0] is waiter:
                    self._rung = False
                self._waiting.remove(waiter)
                if not self._taken:
                    self._ring()
                return
        self._pass_on()  # the turn came just now


class _Turn:
    """A context, by hand: there is one for each piece of each stream."""

    __slots__ = ("_call", "_turns")

    def __init__(self, turns: Turns, call: Call | None) -> None:
        self._turns = turns
        self._call = call

    def __enter__(self) -> None:
        self._turns._take(self._call)  # noqa: SLF001 - one pair, one module

    def __exit__(self, *_: object) -> None:
        self._turns._pass_on()  # noqa: SLF001
