"""What a connection and the gateway that it is one of know of each other."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from ztserve.gateway.connection import Connection
    from ztserve.gateway.head import Head
    from ztserve.gateway.limits import Limits
    from ztserve.gateway.places import Places
    from ztserve.gateway.tls import Edge
    from ztserve.types import Peer


class State(Enum):
    """What a connection is doing."""

    HANDSHAKE = auto()
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    ENDING = auto()
    CLOSED = auto()


class House(Protocol):
    """What all connections of one gateway share."""

    edge: Edge
    limits: Limits
    places: Places
    connections: set[Connection]

    def answer(self, connection: Connection, head: Head) -> Coroutine[Any, Any, None]:
        """Answer one request, whatever happens."""

    def check(self, peer: Peer) -> None:
        """Raise CallError if `peer` may not go on."""

    def refused(self, cause: str, address: str) -> None:
        """Count a connection that ended before there was a call."""
