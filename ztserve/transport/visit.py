"""How one call is received: judged, admitted, answered or refused, and let go."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, cast

import grpc

from ztserve.errors import CallError, InvalidInput, ZTServeError
from ztserve.transport import callers, status
from ztserve.transport.admission import Admission
from ztserve.transport.arrival import Cancelled, Reception, Refusal, new_id, source
from ztserve.transport.credentials import Facts, ServerCredentials
from ztserve.transport.limits import Limits
from ztserve.transport.methods import Method
from ztserve.transport.rpc import Reaper, Rpc
from ztserve.types import Call, Peer

_LOG = logging.getLogger(__name__)
_HEALTH_RESERVE = 8


@dataclass(frozen=True, slots=True)
class Desk:
    """What all calls of one server share."""

    limits: Limits
    credentials: ServerCredentials
    admission: Admission
    reception: Reception
    reaper: Reaper
    on_refused: Callable[[Refusal], object] | None


def answer(
    desk: Desk, method: Method, messages: Iterator[bytes], context: grpc.ServicerContext
) -> bytes:
    """Answer a unary call. The handler that gRPC calls on a worker thread."""
    visit = _Visit(desk, method, messages, context)
    try:
        call = visit.enter(context, desk.limits.max_call_s)
        return method.answer(call, visit.read)  # type: ignore[misc]
    except Exception as error:  # noqa: BLE001 - told to caller, audit or log
        visit.refuse(context, error)
    finally:
        visit.leave()


Several: TypeAlias = Sequence[tuple[Iterator[bytes], Any]]
"""Of each call its messages and its context."""


def answer_all(
    desk: Desk, method: Method, several: Several
) -> Iterator[tuple[int, bytes | None]]:
    """Answer unary calls whose messages are there; yield each one's place and answer.

    None: that call's context was aborted.
    """
    visits: list[_Visit] = []
    entered: list[tuple[int, Call]] = []
    try:
        for at, (messages, context) in enumerate(several):
            visits.append(_Visit(desk, method, messages, context))
            try:
                call = visits[at].enter(context, desk.limits.max_call_s)
            except Exception as error:  # noqa: BLE001 - told to caller, audit or log
                visits[at].refused(context, error)
                yield at, None
            else:
                entered.append((at, call))
        calls = [(call, visits[at].read) for at, call in entered]
        for position, outcome in method.answer_all(calls):  # type: ignore[misc]
            at = entered[position][0]
            if isinstance(outcome, Exception):
                visits[at].refused(several[at][1], outcome)
                yield at, None
            else:
                visits[at].leave()
                yield at, outcome
    finally:
        for visit in visits:
            visit.leave()


def stream(
    desk: Desk, method: Method, messages: Iterator[bytes], context: grpc.ServicerContext
) -> Iterator[bytes]:
    """Answer a stream. The handler that gRPC calls on a worker thread."""
    visit = _Visit(desk, method, messages, context)
    try:
        visit.enter(context, desk.limits.max_stream_s)
        visit.rpc.still = visit.still
        for piece in method.stream(visit):  # type: ignore[misc]
            visit.rpc.sending()
            yield piece
            visit.rpc.running()
    except Exception as error:  # noqa: BLE001 - told to caller, audit or log
        visit.refuse(context, error)
    finally:
        visit.leave()


class _Visit:
    """One call from its arrival to its end; the `methods.Exchange` of a stream."""

    __slots__ = (
        "_admitted",
        "_bound",
        "_cancelled",
        "_desk",
        "_messages",
        "_method",
        "call",
        "facts",
        "peer",
        "rpc",
    )

    call: Call

    def __init__(
        self,
        desk: Desk,
        method: Method,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
    ) -> None:
        self._desk = desk
        self._method = method
        self._admitted = False
        self._bound: str | None = None
        """The request for which the peer asserts its caller."""
        self._cancelled = Cancelled(context)
        self._messages = 1
        self.rpc = Rpc(messages, context, desk.limits)
        self.facts: Facts = {}
        self.peer: Peer | None = None

    def judge(self) -> Peer:
        """Return the peer as it is judged at this moment. Raises Unauthenticated."""
        return self._desk.credentials.peer(self.facts)

    def still(self) -> None:
        """Raise CallError, and tell the audit, once the peer may not go on."""
        try:
            self.judge()
        except CallError as error:
            self.rpc.still = None  # told once
            self._tell(error, self.call.source_ip, self.call.source_port)
            raise

    def enter(self, context: grpc.ServicerContext, longest_s: float) -> Call:
        """Judge the peer, find room, and make the Call; no message is read."""
        desk, method = self._desk, self._method
        self.facts = cast("Facts", context.auth_context())
        peer = desk.credentials.peer(self.facts)
        health = method.stream is None and method.operation.method == "GET"
        self.peer = peer
        desk.admission.enter(peer.id, reserve=_HEALTH_RESERVE if health else 0)
        self._admitted = True
        self.call, self._bound = desk.reception.call(
            context, peer, method.operation, longest_s, self._cancelled
        )
        self.rpc.deadline = self.call.deadline
        desk.reaper.add(self.rpc)
        return self.call

    def read(self) -> bytes:
        """Return the call's one message, or the first one of a stream."""
        message = self.rpc.read()
        if self._bound is not None:
            callers.check_request(self._bound, message, self.call.peer)
        return message

    def more(self) -> tuple[Call, bytes] | None:
        """Return a stream's next message and its Call, the peer judged anew."""
        most = self._desk.limits.max_stream_messages
        message = self.rpc.more()
        if message is None:
            return None
        self._messages += 1
        if self._messages > most:
            raise InvalidInput(f"one stream carries at most {most} requests")
        return self._desk.reception.again(self.call, self.facts), message

    def refuse(self, context: grpc.ServicerContext, error: Exception) -> NoReturn:
        """End the call with the status of `error`."""
        call_id = self.call.id if hasattr(self, "call") else new_id()
        if not isinstance(error, ZTServeError):
            _LOG.error("call %s failed", call_id, exc_info=error)
        elif isinstance(error, CallError) and not hasattr(self, "call"):
            self._tell(error, *source(context.peer()))
        error.__traceback__ = None  # its frames would keep the stream: see Cancelled
        context.set_trailing_metadata(status.trailers(error, call_id))
        context.abort(status.status(error).code, status.sentence(error, call_id))

    def refused(self, context: grpc.ServicerContext, error: Exception) -> None:
        """End one call of several with the status of `error`, and let go of it."""
        try:
            self.refuse(context, error)
        except Exception as ended:  # noqa: BLE001 - how a context aborts
            ended.__traceback__ = None
        finally:
            self.leave()

    def leave(self) -> None:
        """Give the call's place free, and let go of gRPC's part of it, once."""
        self._desk.reaper.discard(self.rpc)
        self._cancelled.end()
        self.rpc.end()
        if self._admitted and self.peer is not None:
            self._admitted = False
            self._desk.admission.leave(self.peer.id)

    def _tell(self, error: CallError, address: str, port: int) -> None:
        if self._desk.on_refused is not None:
            self._desk.on_refused(
                Refusal(self._method.path, error, self.peer, address, port)
            )
