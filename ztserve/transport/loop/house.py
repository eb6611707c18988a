"""What all connections of one server share."""

import random
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ztserve.errors import Overloaded
from ztserve.transport.admission import Admission
from ztserve.transport.http2 import Bounds
from ztserve.transport.limits import Limits
from ztserve.transport.loop.carrier import guarded
from ztserve.transport.loop.credentials import Credentials
from ztserve.transport.methods import Method
from ztserve.transport.tls import Ends

if TYPE_CHECKING:
    from ztserve.transport.loop.exchange import Exchange
    from ztserve.transport.loop.wire import Wire

MAX_OF_ONE_ADDRESS = 256
"""Connections of one address, of all that there may be."""
MAX_OF_ONE_PRINCIPAL = 192
"""Of these, of one SPIFFE ID: so that there is room for its neighbours."""
STEPS = 4
"""Of handshakes, in one turn of the loop: a step costs as much as several calls."""


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
        credentials: Credentials,
        methods: dict[bytes, Method],
        admission: Admission,
        answer: Answer,
        refused: Callable[[str, str], None],
    ) -> None:
        self.limits = limits
        self.ends = ends
        self.credentials = credentials
        self.methods = methods
        self.admission = admission
        self.answer = answer
        self.refused = refused
        """Told the cause of a refused handshake, and the address."""
        self.bounds = Bounds(
            max_streams=limits.max_streams_per_connection,
            max_header_bytes=limits.max_metadata_bytes,
        )
        self.wires: set[Wire] = set()
        self._by_address: Counter[str] = Counter()
        self._principals: dict[Wire, tuple[str, str]] = {}
        """Address and SPIFFE ID of the connections whose handshake is done."""
        self._by_principal: Counter[tuple[str, str]] = Counter()
        self._strangers: dict[Wire, str] = {}
        """Connections whose handshake is not done, and their addresses."""
        self._steps: dict[Wire, bytes] = {}
        """What they sent, and whose turn has not come yet."""
        self._stepping = False
        self._held = 0
        """Bytes of requests that are on their way to those who answer."""
        self._fresh: list[Arrived] = []
        self._jobs: deque[list[Arrived]] = deque()
        self.soon: Callable[..., object]
        """Have something done later in this turn of the loop."""
        self.later: Callable[..., object]
        """Have something done on the loop after so many seconds."""
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
        """Count a connection in; return whether there is a place for it.

        Whoever has not shown a certificate keeps no place from others.
        """
        limits, strangers = self.limits, self._strangers
        crowded = self._by_address[address] >= MAX_OF_ONE_ADDRESS
        if (
            crowded
            or len(self.wires) >= limits.max_connections
            or len(strangers) >= limits.max_handshakes
        ):
            rivals = [
                one for one, at in strangers.items() if at == address or not crowded
            ]
            if not rivals:
                return False
            # By chance: of a fast flood, the oldest would be who came before it.
            random.choice(rivals).give_way()  # noqa: S311
        self.wires.add(wire)
        self._strangers[wire] = address
        self._by_address[address] += 1
        return True

    def known(self, wire: "Wire", principal: str) -> bool:
        """Note who made a handshake; return whether there is a place for this one.

        With idle connections, whoever has a certificate, and no right to anything,
        could keep all others of its address away.
        """
        key = self._strangers.pop(wire, ""), principal
        if self._by_principal[key] >= MAX_OF_ONE_PRINCIPAL:
            return False
        self._by_principal[key] += 1
        self._principals[wire] = key
        return True

    def take_turn(self, wire: "Wire", data: bytes) -> None:
        """Have a step of a handshake done by `data`, when it is its turn."""
        if not self._stepping:
            self._stepping = True
            self.soon(self._take_steps)
        self._steps[wire] = data

    def _take_steps(self) -> None:
        for wire in list(islice(self._steps, STEPS)):
            guarded(wire.step, self._steps.pop(wire))
        self._stepping = bool(self._steps)
        if self._stepping:
            self.later(0.0, self._take_steps)  # in the next turn

    def hold(self, count: int) -> None:
        """Count bytes of requests in, or out. Raises Overloaded for too many."""
        most = self.limits.max_requests_bytes
        if count > 0 and self._held + count > most:
            raise Overloaded(
                "this server has all the requests that it can hold; try again later",
                f"{self._held} bytes of requests are here, the limit is {most}",
            )
        self._held += count

    def leave(self, wire: "Wire", address: str) -> None:
        """Count a connection out."""
        self._strangers.pop(wire, None)
        self._steps.pop(wire, None)
        key = self._principals.pop(wire, None)
        if key is not None:
            self._by_principal[key] -= 1
            if not self._by_principal[key]:
                del self._by_principal[key]
        self.wires.discard(wire)
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]

    def ended(self, reason: str, address: str) -> None:
        """Tell of a connection that was ended for what its peer did."""
        self.refused(f"HTTP/2: {reason}", address)
