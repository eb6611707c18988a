"""On which thread a call is answered: where that is short, on the loop's own."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from ztserve.transport.loop.carrier import guarded
from ztserve.transport.loop.exchange import Exchange
from ztserve.transport.loop.house import Arrived
from ztserve.transport.loop.reactor import Reactor
from ztserve.transport.loop.wire import Wire
from ztserve.transport.methods import Answer, AnswerAll, Method, Stream
from ztserve.transport.visit import Desk, Visit, answer_all
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

_Outcome: TypeAlias = tuple[Wire, Exchange, bytes | None]
"""For `Wire.answer`, on the loop."""


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
        if method.answer_all is not None and call.is_whole:
            return self._answer_all(method, method.answer_all, several)
        visit = Visit(self._desk, method, call)
        if method.answer is not None:
            self._workers.submit(self._unary, visit, method.answer, call, wire)
        elif method.stream is not None:
            self._workers.submit(self._stream, visit, method.stream, call, wire)
        return True

    def _answer_all(
        self, method: Method, give: AnswerAll, several: list[Arrived]
    ) -> bool:
        expected_s = self._expected_s.get(method.path, UNKNOWN_S)
        if expected_s > SHORT_S or not self.reactor.may_leave:
            self._workers.submit(self._elsewhere, method, give, several)
            return True
        leads = self.reactor.away(
            lambda: list(self._together(method, give, several)), _told
        )
        if not leads:
            self._expected_s[method.path] = UNKNOWN_S
        return leads

    def _elsewhere(
        self, method: Method, give: AnswerAll, several: list[Arrived]
    ) -> None:
        for wire, call, message in self._together(method, give, several):
            self.reactor.post(wire.answer, call, message)

    def _together(
        self, method: Method, give: AnswerAll, several: list[Arrived]
    ) -> Iterator[_Outcome]:
        began = time.monotonic()
        visits = [Visit(self._desk, method, call) for _, call, _ in several]
        left = dict(enumerate(several))
        try:
            for at, message in answer_all(visits, give):
                _, call, wire = left.pop(at)
                yield wire, call, message
        except Exception:  # noqa: BLE001 - by a fault of ours
            _LOG.exception("calls could not be answered")
        for _, call, wire in left.values():
            yield wire, call, None
        took_s = time.monotonic() - began
        known_s = self._expected_s.get(method.path, UNKNOWN_S)
        self._expected_s[method.path] = known_s + WEIGHT * (took_s - known_s)

    def _unary(self, visit: Visit, give: Answer, call: Exchange, wire: Wire) -> None:
        message: bytes | None = None
        try:
            message = visit.answer(give)
        finally:  # whatever happens, the call ends
            wire.post(wire.answer, call, message)

    def _stream(self, visit: Visit, give: Stream, call: Exchange, wire: Wire) -> None:
        try:
            for piece in visit.stream(give):
                if not call.reserve(len(piece)):
                    break
                wire.piece(call, piece)
        finally:
            wire.post(wire.end, call)


def _told(outcomes: Sequence[_Outcome]) -> None:
    for wire, call, message in outcomes:
        guarded(wire.answer, call, message)
