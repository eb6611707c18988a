"""The replicas of one server, as a client knows them; no I/O.

Each has a channel; the client chooses one for each call.
"""

import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Generic, Protocol, TypeVar

from ztserve.errors import Unavailable

ASIDE_S = 0.5
"""How long a replica that could not take a call is left aside, if others can."""
_RANDOM = random.Random()  # noqa: S311 - which replica is asked is no secret
"""Our own: the state of the module's is its user's, who may have seeded it."""


class Way(Protocol):
    """A channel to one replica."""

    address: str
    in_flight: int
    aside_until: float

    @property
    def is_closed(self) -> bool:
        """Whether nothing is left open."""

    @property
    def is_up(self) -> bool:
        """Whether a call can leave at once; asked from any thread."""

    def leave(self) -> None:
        """Take no more calls, and close when the last has ended."""


W = TypeVar("W", bound=Way)


class Replicas(Generic[W]):
    """Chooses a replica for each call: of two at random, the one with fewer calls.

    Mitzenmacher, The Power of Two Choices in Randomized Load Balancing (2001).
    `take` and `give_back` may be called from any thread, all else on the loop.
    """

    def __init__(self, make: Callable[[str], W]) -> None:
        self._make = make
        self._ways: dict[str, W] = {}
        self._retired: list[W] = []
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[W]:
        """Yield all channels that may have something open, also retired ones."""
        self._retired = [one for one in self._retired if not one.is_closed]
        return iter([*self._ways.values(), *self._retired])

    @property
    def in_flight(self) -> int:
        """Calls on all channels, also on retired ones."""
        return sum(way.in_flight for way in self)

    def take(self, avoid: Collection[str] = ()) -> W:
        """Count a call in on a channel, if possible to none of those in `avoid`.

        Raises Unavailable where there is no replica at all.
        """
        with self._lock:
            ways = list(self._ways.values())
            if not ways:
                raise Unavailable("no replica is known")
            way = ways[0]
            if len(ways) > 1:
                way = _chosen(ways, avoid)
            way.in_flight += 1
            return way

    def give_back(self, way: W, *, refused: bool = False) -> None:
        """Count a call out; `refused`: this replica could not take it."""
        with self._lock:
            way.in_flight -= 1
            if refused:
                way.aside_until = time.monotonic() + ASIDE_S

    def keep_only(self, addresses: Collection[str]) -> None:
        """Have a channel to each of `addresses`, and take no more calls to others."""
        fresh = {a: self._make(a) for a in addresses if a not in self._ways}
        with self._lock:
            gone = [self._ways.pop(a) for a in list(self._ways) if a not in addresses]
            self._ways |= fresh
        for way in gone:
            way.leave()
        self._retired += gone


def _chosen(ways: list[W], avoid: Collection[str]) -> W:
    now = time.monotonic()
    fresh = [way for way in ways if way.address not in avoid]
    able = [way for way in fresh if way.aside_until <= now]
    # A replica that was killed is known to be gone before the directory says so; a
    # call that tried it would cost a retry, of which there are few.
    up = [way for way in able if way.is_up]
    best = up or able or fresh or ways
    if len(best) == 1:
        return best[0]
    one, other = _RANDOM.sample(best, 2)
    return one if one.in_flight <= other.in_flight else other
