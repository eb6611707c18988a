"""On which thread a call is answered: where that is short, on the loop's own."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from ztserve.transport import messages
from ztserve.transport.loop.carrier import guarded
from ztserve.transport.loop.exchange import Aborted, Exchange
from ztserve.transport.loop.house import Arrived
from ztserve.transport.loop.reactor import Reactor
from ztserve.transport.loop.wire import Wire
from ztserve.transport.methods import Method
from ztserve.transport.visit import Desk, answer, answer_all, stream
from ztserve.transport.workers import Workers

_LOG = logging.getLogger(__name__)

SHORT_S = 0.015
"""Calls of a turn that take less, all together, are answered by the loop's thread;
less than its deputy's patience (`reactor.PATIENCE_S`)."""
WEIGHT = 0.2
"""Of the last turn's time, in what is expected of the next."""
UNKNOWN_S = 1.0
"""What is expected of a method at first, and again once it took too long: about two
dozen turns on other threads until it is believed to be short."""

_Outcome: TypeAlias = tuple[Callable[..., Any], Exchange, bytes]
"""What to do on the loop: `Wire.answer` or `Wire.end`, and what with."""


class Answers:
    """Has calls answered; what they send goes back to the loop."""

    reactor: Reactor

    def __init__(self, desk: Desk, workers: Workers) -> None:
        self._desk = desk
        self._workers = workers
        self._expected_s: dict[str, float] = {}
        """By path: how long the calls of one turn take together."""

    def __call__(self, several: list[Arrived]) -> bool:
        """Begin to answer; return whether the caller still leads the loop."""
        method, call, wire = several[0]
        if method.answer_all is None or not call.is_whole:
            handle = self._unary if method.answer else self._stream
            self._workers.submit(handle, method, call, wire)
            return True
        expected_s = self._expected_s.get(method.path, UNKNOWN_S)
        if expected_s > SHORT_S or not self.reactor.may_leave:
            self._workers.submit(self._elsewhere, method, several)
            return True
        leads = self.reactor.away(lambda: list(self._together(method, several)), _told)
        if not leads:
            self._expected_s[method.path] = UNKNOWN_S
        return leads

    def _elsewhere(self, method: Method, several: list[Arrived]) -> None:
        for act, call, given in self._together(method, several):
            self.reactor.post(act, call, given)

    def _together(self, method: Method, several: list[Arrived]) -> Iterator[_Outcome]:
        began = time.monotonic()
        pairs = [(call.messages(), call) for _, call, _ in several]
        left = dict(enumerate(several))
        try:
            for at, message in answer_all(self._desk, method, pairs):
                _, call, wire = left.pop(at)
                if message is None:
                    yield wire.end, call, call.trailers()
                else:
                    yield wire.answer, call, message
        except Exception:  # noqa: BLE001 - by a fault of ours
            _LOG.exception("calls could not be answered")
        for _, call, wire in left.values():
            yield wire.end, call, call.trailers()
        took_s = time.monotonic() - began
        known_s = self._expected_s.get(method.path, UNKNOWN_S)
        self._expected_s[method.path] = known_s + WEIGHT * (took_s - known_s)

    def _unary(self, method: Method, call: Exchange, wire: Wire) -> None:
        try:
            message = answer(self._desk, method, call.messages(), call)  # type: ignore[arg-type]
        except Aborted:
            wire.post(wire.end, call, call.trailers())
        else:
            wire.post(wire.answer, call, message)

    def _stream(self, method: Method, call: Exchange, wire: Wire) -> None:
        try:
            for piece in stream(self._desk, method, call.messages(), call):  # type: ignore[arg-type]
                if not call.reserve(len(piece)):
                    break
                wire.piece(call, piece)
        except Aborted:
            wire.post(wire.end, call)  # whether it has a head, the loop knows
        else:
            wire.post(wire.end, call, messages.OK)


def _told(outcomes: Sequence[_Outcome]) -> None:
    for act, call, given in outcomes:
        guarded(act, call, given)
