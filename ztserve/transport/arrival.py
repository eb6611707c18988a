"""From a gRPC call to `types.Call`: who, for whom, what, until when, from where."""

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ztserve.errors import CallError, Unauthenticated
from ztserve.identity import JwtProof
from ztserve.transport import callers
from ztserve.transport.heads import Metadata
from ztserve.transport.loop.credentials import Credentials, Visitor
from ztserve.transport.loop.exchange import Exchange
from ztserve.types import Call, Caller, Operation, Peer

WITHHELD = "zt-"
"""Metadata under this prefix is between our own parts: no other room sees it."""
DROPPED = "caller header dropped"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call that was refused before there was a `types.Call`, for the audit."""

    path: str
    error: CallError
    peer: Peer | None
    """None: the peer's identity itself did not hold."""
    source_ip: str
    source_port: int


class Cancelled:
    """Whether nobody waits for the answer any more: `Call.cancelled`.

    It lets go of the exchange when the call has ended: whoever keeps a Call would
    otherwise keep its connection and what that holds.
    """

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange: Exchange | None = exchange

    def __call__(self) -> bool:
        """Return whether the call has ended, by whosever hand."""
        exchange = self._exchange
        return exchange is None or exchange.over

    def end(self) -> None:
        """Let go: the call has ended."""
        self._exchange = None


class Reception:
    """Makes the Calls of one server. Thread-safe."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        delegates: Collection[str],
        proof: JwtProof | None,
        host: str,
        port: int,
    ) -> None:
        self._credentials = credentials
        self._delegates = frozenset(delegates)
        self._proof = proof
        self._host = host
        self._port = port

    def call(
        self,
        exchange: Exchange,
        peer: Peer,
        operation: Operation,
        longest_s: float,
        cancelled: Cancelled,
    ) -> tuple[Call, str | None]:
        """Return the Call that has just arrived from the verified `peer`.

        And what `callers.check_request` needs where the peer asserts a caller. Its
        deadline is the caller's, at most `longest_s` ahead. Raises Unauthenticated
        where a delegate's caller header or the peer's own token does not hold.
        """
        headers = _NO_HEADERS
        caller: Caller | None = None
        bound: str | None = None
        notes: tuple[str, ...] = ()
        if exchange.metadata:
            headers, asserted = sorted_out(exchange.metadata)
            if asserted:
                if peer.id in self._delegates:
                    caller, bound = self._caller(asserted, peer)
                else:
                    notes = (DROPPED,)
        if self._proof is not None:
            shown = dict(headers)
            self._proof.check(shown.pop("authorization", None), peer)
            headers = MappingProxyType(shown)
        source_ip, source_port = exchange.source
        call = Call(
            id=new_id(),
            peer=peer,
            caller=caller,
            operation=operation,
            deadline=min(exchange.due, time.monotonic() + longest_s),
            headers=headers,
            host=self._host,
            port=self._port,
            source_ip=source_ip,
            source_port=source_port,
            notes=notes,
            cancelled=cancelled,
        )
        return call, bound

    def again(self, call: Call, visitor: Visitor) -> Call:
        """Return the Call of a stream's next message: same words, judged anew.

        Raises Unauthenticated where the peer's identity does not hold any more.
        """
        return replace(call, id=new_id(), peer=self._credentials.peer(visitor))

    def _caller(self, asserted: list[bytes], peer: Peer) -> tuple[Caller, str]:
        if len(asserted) > 1:
            raise Unauthenticated(callers.PUBLIC, f"{len(asserted)} caller headers")
        ours = self._credentials.id
        return callers.read(asserted[0], audience=ours, peer=peer)


_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def sorted_out(metadata: Metadata) -> tuple[Mapping[str, str], list[bytes]]:
    """Return what rooms may see, and the caller headers.

    A header given twice is one of both values (RFC 9110, 5.3). Binary ones are
    dropped: no policy can speak of them.
    """
    headers: dict[str, str] = {}
    asserted: list[bytes] = []
    for name, value in metadata:
        if name.startswith(WITHHELD):
            if name == callers.HEADER and isinstance(value, bytes):
                asserted.append(value)
        elif isinstance(value, str):
            headers[name] = f"{headers[name]},{value}" if name in headers else value
    return MappingProxyType(headers), asserted


def new_id() -> str:
    """Return a fresh call id: 128 random bits in hex."""
    return os.urandom(16).hex()
