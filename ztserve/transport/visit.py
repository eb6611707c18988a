"""How one call is received: judged, admitted, answered or refused, and let go."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ztserve.errors import CallError, InvalidInput, ZTServeError
from ztserve.transport import callers, heads, status
from ztserve.transport.admission import Admission
from ztserve.transport.arrival import Cancelled, Reception, Refusal, new_id
from ztserve.transport.limits import Limits
from ztserve.transport.loop.credentials import Credentials
from ztserve.transport.loop.exchange import Exchange
from ztserve.transport.methods import Answer, AnswerAll, Method, Stream
from ztserve.transport.rpc import Reaper, Rpc
from ztserve.types import Call, Peer

_LOG = logging.getLogger(__name__)
_HEALTH_RESERVE = 8


@dataclass(frozen=True, slots=True)
class Desk:
    """What all calls of one server share."""

    limits: Limits
    credentials: Credentials
    admission: Admission
    reception: Reception
    reaper: Reaper
    on_refused: Callable[[Refusal], object] | None


class Visit:
    """One call from its arrival to its end; the `methods.Exchange` of a stream.

    What ends it otherwise than well is told to its caller, the audit or the log, and
    is its `Exchange.status`.
    """

    __slots__ = (
        "_admitted",
        "_bound",
        "_cancelled",
        "_desk",
        "_exchange",
        "_messages",
        "_method",
        "call",
        "peer",
        "rpc",
    )

    call: Call

    def __init__(self, desk: Desk, method: Method, exchange: Exchange) -> None:
        self._desk = desk
        self._method = method
        self._exchange = exchange
        self._admitted = False
        self._bound: str | None = None
        """The request for which the peer asserts its caller."""
        self._cancelled = Cancelled(exchange)
        self._messages = 1
        self.rpc = Rpc(exchange, desk.limits)
        self.peer: Peer | None = None

    def answer(self, give: Answer) -> bytes | None:
        """Answer a unary call; None: it is refused."""
        try:
            return give(self.enter(), self.read)
        except Exception as error:  # noqa: BLE001 - told to caller, audit or log
            self.refuse(error)
            return None
        finally:
            self.leave()

    def stream(self, give: Stream) -> Iterator[bytes]:
        """Answer a stream; yield the messages of the answer."""
        try:
            self.enter()
            self.rpc.still = self.still
            for piece in give(self):
                self.rpc.sending()
                yield piece
                self.rpc.running()
            self._exchange.status = heads.GOOD
        except Exception as error:  # noqa: BLE001 - told to caller, audit or log
            self.refuse(error)
        finally:
            self.leave()

    def judge(self) -> Peer:
        """Return the peer as it is judged at this moment. Raises Unauthenticated."""
        return self._desk.credentials.peer(self._exchange.visitor)

    def still(self) -> None:
        """Raise CallError, and tell the audit, once the peer may not go on."""
        try:
            self.judge()
        except CallError as error:
            self.rpc.still = None  # told once
            self._tell(error)
            raise

    def enter(self) -> Call:
        """Judge the peer, find room, and make the Call; no message is read."""
        desk, method = self._desk, self._method
        streams, limits = method.stream is not None, desk.limits
        self.peer = peer = self.judge()
        health = not (streams or method.named) and method.operation.method == "GET"
        desk.admission.enter(peer.id, reserve=_HEALTH_RESERVE if health else 0)
        self._admitted = True
        call, self._bound = desk.reception.call(
            self._exchange,
            peer,
            method.operation,
            limits.max_stream_s if streams else limits.max_call_s,
            self._cancelled,
        )
        if method.named is not None:
            call = replace(call, operation=method.named(call.headers))
        self.call = call
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
        again = self._desk.reception.again
        return again(self.call, self._exchange.visitor), message

    def refuse(self, error: Exception) -> None:
        """Have the call end with the status of `error`."""
        entered = hasattr(self, "call")
        call_id = self.call.id if entered else new_id()
        if isinstance(error, CallError) and not entered:
            try:
                self._tell(error)
            except Exception as fault:  # noqa: BLE001 - it is what ends the call now
                error = fault
        if not isinstance(error, ZTServeError):
            _LOG.error("call %s failed", call_id, exc_info=error)
        error.__traceback__ = None  # its frames would keep all that the call held
        self._exchange.status = heads.Status(
            status.status(error).code,
            status.sentence(error, call_id),
            status.trailers(error, call_id),
        )

    def leave(self) -> None:
        """Give the call's place free, once."""
        self._desk.reaper.discard(self.rpc)
        self._cancelled.end()
        if self._admitted and self.peer is not None:
            self._admitted = False
            self._desk.admission.leave(self.peer.id)

    def _tell(self, error: CallError) -> None:
        if self._desk.on_refused is not None:
            address, port = self._exchange.source
            self._desk.on_refused(
                Refusal(self._method.path, error, self.peer, address, port)
            )


def answer_all(
    visits: Sequence[Visit], give: AnswerAll
) -> Iterator[tuple[int, bytes | None]]:
    """Answer unary calls whose messages are there; yield each one's place and answer.

    None: that call is refused.
    """
    entered: list[tuple[int, Call]] = []
    try:
        for at, visit in enumerate(visits):
            try:
                call = visit.enter()
            except Exception as error:  # noqa: BLE001 - told to caller, audit or log
                visit.refuse(error)
                visit.leave()
                yield at, None
            else:
                entered.append((at, call))
        calls = [(call, visits[at].read) for at, call in entered]
        for position, outcome in give(calls):
            at = entered[position][0]
            if isinstance(outcome, Exception):
                visits[at].refuse(outcome)
                visits[at].leave()
                yield at, None
            else:
                visits[at].leave()
                yield at, outcome
    finally:
        for visit in visits:
            visit.leave()
