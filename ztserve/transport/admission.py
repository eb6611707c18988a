"""How many calls may be here at once, in total and of one principal."""

import threading
from collections import Counter

from ztserve.errors import Overloaded
from ztserve.transport.limits import Limits


class Admission:
    """Counts the calls in flight. Nothing waits here: what does not fit is refused."""

    def __init__(self, limits: Limits) -> None:
        self._most = limits.max_in_flight
        self._most_each = limits.max_in_flight_per_principal
        self._by_principal: Counter[str] = Counter()
        self._total = 0
        self._lock = threading.Lock()

    def enter(self, principal: str, *, reserve: int = 0) -> None:
        """Count one call of `principal` in, or raise Overloaded.

        `reserve`: places beyond the limit that this call may take; a busy server
        still tells that it is alive.
        """
        with self._lock:
            own = self._by_principal[principal]
            if self._total >= self._most + reserve:
                raise Overloaded(
                    "this server has all the calls that it can take; try again later",
                    f"{self._total} calls in flight, the limit is {self._most}",
                )
            if own >= self._most_each + reserve:
                raise Overloaded(
                    "you have too many calls in flight here; try again later",
                    f"{principal} has {own} calls in flight, the limit for one "
                    f"principal is {self._most_each}",
                )
            self._total += 1
            self._by_principal[principal] = own + 1

    def hold(self, principal: str) -> None:
        """Count one call in that has been here: its answer is not taken yet."""
        with self._lock:
            self._total += 1
            self._by_principal[principal] += 1

    def leave(self, principal: str) -> None:
        """Count one call of `principal` out."""
        with self._lock:
            self._total -= 1
            self._by_principal[principal] -= 1
            if not self._by_principal[principal]:
                del self._by_principal[principal]

    @property
    def in_flight(self) -> int:
        """Calls that are here now."""
        return self._total
