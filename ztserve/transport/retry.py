"""When a call may be sent again: only if it surely did not run, and not for ever."""

import random
import time

from ztserve.errors import DeadlineExceeded, Interrupted, Overloaded, Unavailable

MAX_ATTEMPTS = 4
FIRST_PAUSE_S = 0.02
SAFE = (Overloaded, Unavailable)
"""The errors that mean that the call surely did not run."""
UNFIT = (*SAFE, Interrupted)
"""The errors after which other replicas are asked first for a while."""


class Budget:
    """Keeps retries to a tenth of all calls, beyond a small credit.

    As gRPC's own retry throttling (gRFC A6): where everything fails, retrying makes
    it worse.
    """

    CREDIT = 100
    PRICE = 10
    """Of one retry; a call that succeeded earns 1."""

    def __init__(self) -> None:
        self._tokens = self.CREDIT

    def earn(self) -> None:
        """Count a call that succeeded."""
        if self._tokens < self.CREDIT:
            self._tokens += 1

    def spend(self) -> bool:
        """Return whether one retry may be made, and count it."""
        if self._tokens < self.PRICE:
            return False
        self._tokens -= self.PRICE
        return True


class Attempts:
    """The attempts at one call: what time is left, and where it was tried."""

    def __init__(self, budget: Budget, timeout_s: float) -> None:
        self._budget = budget
        self._timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s
        """By `time.monotonic`."""
        self._last: Exception | None = None
        self._count = 0
        self.tried: set[str] = set()

    def left_s(self) -> float:
        """Return the seconds that are left. Raises DeadlineExceeded if none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self.late()
        return left

    def late(self) -> DeadlineExceeded:
        """Return the error of a call that was not answered in time."""
        public = f"no answer within {self._timeout_s:g} s"
        before = f"; the attempt before failed: {self._last}" if self._last else ""
        return DeadlineExceeded(public, public + before)

    def pause_s(self, error: Exception, address: str = "") -> float:
        """Return how long to wait before the next attempt, or raise `error`."""
        self._count += 1
        self._last = error
        self.tried.add(address)
        pause: float = FIRST_PAUSE_S * 2**self._count * (0.5 + random.random() / 2)  # noqa: S311
        if (
            not isinstance(error, SAFE)
            or self._count >= MAX_ATTEMPTS
            or time.monotonic() + pause >= self.deadline
            or not self._budget.spend()
        ):
            raise error
        return pause
