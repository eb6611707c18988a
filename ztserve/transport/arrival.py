"""From a gRPC call to `types.Call`: who, for whom, what, until when, from where."""

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from urllib.parse import unquote

import grpc

from ztserve.errors import CallError, InvalidInput, Unauthenticated
from ztserve.identity import JwtProof
from ztserve.transport import callers
from ztserve.transport.credentials import Facts, ServerCredentials
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

    It must let go of gRPC's context when the call has ended: whoever keeps a Call
    would otherwise keep its HTTP/2 stream, and streams are limited.
    """

    __slots__ = ("_context",)

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context: grpc.ServicerContext | None = context

    def __call__(self) -> bool:
        """Return whether the call has ended, by whosever hand."""
        context = self._context
        return context is None or not context.is_active()

    def end(self) -> None:
        """Forget the context: the call has ended."""
        self._context = None


class Reception:
    """Makes the Calls of one server. Thread-safe."""

    def __init__(
        self,
        credentials: ServerCredentials,
        *,
        delegates: Collection[str],
        max_metadata_bytes: int,
        proof: JwtProof | None,
        host: str,
        port: int,
    ) -> None:
        self._credentials = credentials
        self._delegates = frozenset(delegates)
        self._max_metadata_bytes = max_metadata_bytes
        self._proof = proof
        self._host = host
        self._port = port

    def call(
        self,
        context: grpc.ServicerContext,
        peer: Peer,
        operation: Operation,
        longest_s: float,
        cancelled: Cancelled,
    ) -> tuple[Call, str | None]:
        """Return the Call that has just arrived from the verified `peer`.

        And what `callers.check_request` needs where the peer asserts a caller. Its
        deadline is the caller's, at most `longest_s` ahead. Raises Unauthenticated
        where a delegate's caller header or the peer's own token does not hold,
        InvalidInput where there is too much metadata.
        """
        headers = _NO_HEADERS
        caller: Caller | None = None
        bound: str | None = None
        notes: tuple[str, ...] = ()
        metadata = context.invocation_metadata()
        if metadata:
            headers, asserted = sorted_out(metadata, self._max_metadata_bytes)
            if asserted:
                if peer.id in self._delegates:
                    caller, bound = self._caller(asserted, peer)
                else:
                    notes = (DROPPED,)
        if self._proof is not None:
            shown = dict(headers)
            self._proof.check(shown.pop("authorization", None), peer)
            headers = MappingProxyType(shown)
        source_ip, source_port = source(context.peer())
        remaining_s = context.time_remaining()
        call = Call(
            id=new_id(),
            peer=peer,
            caller=caller,
            operation=operation,
            deadline=time.monotonic() + min(remaining_s, longest_s),
            headers=headers,
            host=self._host,
            port=self._port,
            source_ip=source_ip,
            source_port=source_port,
            notes=notes,
            cancelled=cancelled,
        )
        return call, bound

    def again(self, call: Call, facts: Facts) -> Call:
        """Return the Call of a stream's next message: same words, judged anew.

        Raises Unauthenticated where the peer's identity does not hold any more.
        """
        return replace(call, id=new_id(), peer=self._credentials.peer(facts))

    def _caller(self, asserted: list[bytes], peer: Peer) -> tuple[Caller, str]:
        if len(asserted) > 1:
            raise Unauthenticated(callers.PUBLIC, f"{len(asserted)} caller headers")
        ours = self._credentials.id
        return callers.read(asserted[0], audience=ours, peer=peer)


_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def sorted_out(
    metadata: Collection[tuple[str, str | bytes]], max_bytes: int
) -> tuple[Mapping[str, str], list[bytes]]:
    """Return what rooms may see, and the caller headers.

    A header given twice is one of both values (RFC 9110, 5.3). Binary ones are
    dropped: no policy can speak of them. Raises InvalidInput beyond `max_bytes`:
    gRPC's own limit does not hold for what comes in CONTINUATION frames.
    """
    headers: dict[str, str] = {}
    asserted: list[bytes] = []
    size = 0
    for name, value in metadata:
        size += len(name) + len(value)
        if size > max_bytes:
            raise InvalidInput(f"the call has more than {max_bytes} bytes of metadata")
        if name.startswith(WITHHELD):
            if name == callers.HEADER and isinstance(value, bytes):
                asserted.append(value)
        elif isinstance(value, str):
            headers[name] = f"{headers[name]},{value}" if name in headers else value
    return MappingProxyType(headers), asserted


def source(peer: str) -> tuple[str, int]:
    """Return address and port of gRPC's name for the other end of a connection.

    ``ipv4:127.0.0.1:4000`` or ``ipv6:%5B::1%5D:4000``; else the text itself and 0.
    """
    kind, _, rest = peer.partition(":")
    address, _, port = rest.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return peer, 0
    if kind == "ipv6":
        address = unquote(address).strip("[]")
    return address, int(port)


def new_id() -> str:
    """Return a fresh call id: 128 random bits in hex."""
    return os.urandom(16).hex()
