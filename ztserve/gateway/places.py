"""How much may be here at once: connections, requests, and bytes of bodies."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ztserve.errors import Overloaded
from ztserve.gateway.limits import Limits


class Places:
    """Counts what is here; nothing waits. For one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_address: Counter[str] = Counter()
        self._by_peer: Counter[str] = Counter()
        self._bodies = 0

    def connect(self, address: str) -> bool:
        """Count a connection from `address` in, if there is a place for it."""
        limits = self._limits
        if (
            self._by_address.total() >= limits.max_connections
            or self._by_address[address] >= limits.max_connections_per_address
        ):
            return False
        self._by_address[address] += 1
        return True

    def disconnect(self, address: str) -> None:
        """Count a connection from `address` out."""
        _less(self._by_address, address, 1)

    @property
    def in_flight(self) -> int:
        """Requests that are being answered now."""
        return self._by_peer.total()

    @contextmanager
    def request(self, peer: str) -> Iterator[None]:
        """Hold a place for one request of `peer`. Raises Overloaded."""
        limits, own = self._limits, self._by_peer[peer]
        if own >= limits.max_in_flight_per_peer:
            raise Overloaded(
                "you have too many requests in flight here; try again later",
                f"{peer} has {own} requests in flight, the limit for one peer is "
                f"{limits.max_in_flight_per_peer}",
            )
        if self.in_flight >= limits.max_in_flight:
            raise Overloaded(
                "this gateway has all the requests that it can take; try again later",
                f"{self.in_flight} requests in flight, the limit is "
                f"{limits.max_in_flight}",
            )
        self._by_peer[peer] += 1
        try:
            yield
        finally:
            _less(self._by_peer, peer, 1)

    @contextmanager
    def body(self, size: int) -> Iterator[None]:
        """Hold room for a body of `size` bytes. Raises Overloaded."""
        if self._bodies + size > self._limits.max_bodies_bytes:
            raise Overloaded(
                "this gateway has all the bodies that it can hold; try again later",
                f"{self._bodies} bytes of bodies are here, {size} more would be over "
                f"{self._limits.max_bodies_bytes}",
            )
        self._bodies += size
        try:
            yield
        finally:
            self._bodies -= size


def _less(counts: Counter[str], key: str, by: int) -> None:
    counts[key] -= by
    if counts[key] <= 0:
        del counts[key]
