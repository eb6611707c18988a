"""The replicas of one server, as a client knows them; no I/O.

A lane is a channel to one replica under one state of our own identity. When the
identity changes, each replica gets a new lane; the old one takes no more calls and is
closed when the last of them has ended.
"""

import random
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ztserve.errors import Unavailable

C = TypeVar("C")
"""A channel: `grpc.Channel` or `grpc.aio.Channel`."""

ASIDE_S = 0.5
"""How long a replica that could not take a call is left aside, if others can."""


@dataclass(slots=True, eq=False)
class Lane(Generic[C]):
    """A channel to a replica."""

    address: str
    channel: C
    generation: int
    """Of our own identity."""
    calls: dict[str, Any] = field(default_factory=dict)
    """gRPC's callables of this channel, by method."""
    in_flight: int = 0
    aside_until: float = 0.0
    cut: bool = False
    """Whether its calls were broken off."""


class Replicas(Generic[C]):
    """Chooses a replica for each call: of two at random, the one with fewer calls.

    Mitzenmacher, The Power of Two Choices in Randomized Load Balancing (2001).
    Thread-safe. `close` is called for a channel that has seen its last call.
    """

    def __init__(self, close: Callable[[C], object]) -> None:
        self._close = close
        self._lanes: dict[str, Lane[C]] = {}
        self._retired: set[Lane[C]] = set()
        self._lock = threading.Lock()

    def take(self, avoid: Collection[str] = ()) -> Lane[C]:
        """Count a call in on a lane, if possible to none of the addresses in `avoid`.

        Raises Unavailable where there is no replica at all.
        """
        with self._lock:
            lanes = list(self._lanes.values())
            if not lanes:
                raise Unavailable("no replica is known")
            lane = lanes[0]
            if len(lanes) > 1:
                lane = _chosen(lanes, avoid)
            lane.in_flight += 1
            return lane

    def give_back(self, lane: Lane[C], *, refused: bool = False) -> None:
        """Count a call out; `refused`: this replica could not take it."""
        with self._lock:
            lane.in_flight -= 1
            if refused:
                lane.aside_until = time.monotonic() + ASIDE_S
            done = lane in self._retired and not lane.in_flight
            if done:
                self._retired.remove(lane)
        if done:
            self._close(lane.channel)

    def outdated(self, addresses: Iterable[str], generation: int) -> list[str]:
        """Return those of `addresses` that have no lane of `generation`."""
        with self._lock:
            return [
                address
                for address in addresses
                if address not in self._lanes
                or self._lanes[address].generation != generation
            ]

    def __contains__(self, address: str) -> bool:
        return address in self._lanes

    def install(self, lane: Lane[C]) -> None:
        """Let calls take `lane`, in the place of an older one to its address."""
        with self._lock:
            older = self._lanes.get(lane.address)
            self._lanes[lane.address] = lane
        if older is not None:
            self._retire(older)

    def keep_only(self, addresses: Collection[str]) -> None:
        """Take no more calls to other addresses."""
        with self._lock:
            gone = [a for a in self._lanes if a not in addresses]
            lanes = [self._lanes.pop(address) for address in gone]
        for lane in lanes:
            self._retire(lane)

    def cut(self, before: int) -> None:
        """Break off what still runs on retired lanes of generations `before` this."""
        with self._lock:
            lanes = [lane for lane in self._retired if lane.generation < before]
            self._retired.difference_update(lanes)
        for lane in lanes:
            lane.cut = True
            self._close(lane.channel)

    def _retire(self, lane: Lane[C]) -> None:
        with self._lock:
            done = not lane.in_flight
            if not done:
                self._retired.add(lane)
        if done:
            self._close(lane.channel)


def _chosen(lanes: list[Lane[C]], avoid: Collection[str]) -> Lane[C]:
    now = time.monotonic()
    fresh = [lane for lane in lanes if lane.address not in avoid]
    able = [lane for lane in fresh if lane.aside_until <= now]
    best = able or fresh or lanes
    if len(best) == 1:
        return best[0]
    one, other = random.sample(best, 2)
    return one if one.in_flight <= other.in_flight else other
