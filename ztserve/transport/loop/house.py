"""What all connections of one server share."""

from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ztserve.transport.http2 import Bounds
from ztserve.transport.limits import Limits
from ztserve.transport.loop.credentials import LoopCredentials
from ztserve.transport.methods import Method
from ztserve.transport.tls import Ends

if TYPE_CHECKING:
    from ztserve.transport.loop.exchange import Exchange
    from ztserve.transport.loop.wire import Wire

MAX_OF_ONE_ADDRESS = 256
"""Connections of one address, of all that there may be."""


Arrived: TypeAlias = "tuple[Method, Exchange, Wire]"


class Answer(Protocol):
    """Has calls of one method answered."""

    def __call__(self, several: "list[Arrived]") -> bool:
        """Begin to; return whether the caller still leads (`Reactor.away`)."""


class House:
    """Limits, identity, methods and the books of one server's connections."""

    def __init__(
        self,
        *,
        limits: Limits,
        ends: Ends,
        credentials: LoopCredentials,
        methods: dict[bytes, Method],
        answer: Answer,
        refused: Callable[[str, str], None],
    ) -> None:
        self.limits = limits
        self.ends = ends
        self.credentials = credentials
        self.methods = methods
        self.answer = answer
        self.refused = refused
        """Told the cause of a refused handshake, and the address."""
        self.bounds = Bounds(
            max_streams=limits.max_streams_per_connection,
            max_header_bytes=limits.max_metadata_bytes,
        )
        self.wires: set[Wire] = set()
        self._by_address: Counter[str] = Counter()
        self._fresh: list[Arrived] = []
        self._jobs: deque[list[Arrived]] = deque()
        self.soon: Callable[..., object]
        """Have something done later in this turn of the loop."""
        self.post: Callable[..., object]
        """Have something done on the loop; from any thread."""

    def arrived(self, method: Method, call: "Exchange", wire: "Wire") -> None:
        """Take a call; what arrives in one turn of the loop is answered together."""
        self._fresh.append((method, call, wire))

    def dispatch(self) -> bool:
        """Have what arrived answered; return whether the caller still leads."""
        fresh, self._fresh = self._fresh, []
        together: dict[int, list[Arrived]] = {}
        for method, call, wire in fresh:
            if method.answer_all is not None and call.is_whole:
                together.setdefault(id(method), []).append((method, call, wire))
            else:
                self._jobs.append([(method, call, wire)])
        self._jobs.extend(together.values())
        while self._jobs:
            if not self.answer(self._jobs.popleft()):
                return False  # the one who leads now goes on with the rest
        return True

    def enter(self, wire: "Wire", address: str) -> bool:
        """Count a connection in; return whether there is a place for it."""
        most = self.limits.max_connections
        if len(self.wires) >= most or self._by_address[address] >= min(
            most, MAX_OF_ONE_ADDRESS
        ):
            return False
        self.wires.add(wire)
        self._by_address[address] += 1
        return True

    def leave(self, wire: "Wire", address: str) -> None:
        """Count a connection out."""
        self.wires.discard(wire)
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]

    def ended(self, reason: str, address: str) -> None:
        """Tell of a connection that was ended for what its peer did."""
        self.refused(f"HTTP/2: {reason}", address)
