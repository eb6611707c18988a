"""The way of a request, in one straight function.

::

    wire ─▶ transport ─▶ Call ─▶ authorization ─▶ validation ─▶ Inputs ─▶ inference ─┐
           mTLS, Peer           judged before the body is read            (batched)  │
    wire ◀─ transport ◀─ Reply ◀──────────────────────────────────── filtering ◀─────┘
                     audit holds one record around all of it, whatever happens

The order of the rooms cannot be configured. A stream walks the same way: its text
leaves piece by piece through the same filter.
"""

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TypeAlias

from ztserve.audit import Log, Record
from ztserve.authorization import PolicySet
from ztserve.errors import AuditError
from ztserve.filtering import OutputFilter
from ztserve.inference import Place, Runner
from ztserve.types import (
    Call,
    Description,
    Inputs,
    Outputs,
    Receive,
    Reply,
    Request,
)
from ztserve.validation import Validator

_Walk: TypeAlias = Generator[tuple[Place, Inputs], Outputs, Reply]


class Pipeline:
    """One deployment's rooms, in order. Thread-safe: one thread walks one call."""

    def __init__(
        self,
        description: Description,
        *,
        policies: PolicySet,
        validator: Validator,
        runner: Runner,
        outputs: OutputFilter,
        log: Log,
    ) -> None:
        self._description = description
        self._policies = policies
        self._validator = validator
        self._runner = runner
        self._outputs = outputs
        self._log = log
        self._outcomes: Counter[str] = Counter()
        self._counting = threading.Lock()

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Calls so far by outcome: released, refused, failed, cancelled."""
        with self._counting:
            return dict(self._outcomes)

    def infer(self, call: Call, receive: Receive) -> Reply:
        """Answer one request; the record is written before the reply leaves.

        Raises CallError for what the caller may be told, InferenceError for what only
        the audit may, AuditError where the record cannot be written.
        """
        walk = self._walk(call, receive)
        place, inputs = next(walk)
        return _arrived(walk, partial(place.run, call, inputs))

    @property
    def takes_several(self) -> bool:
        """Whether `infer_all` is of use: several calls of one thread in one step."""
        return not self._runner.overlaps

    def infer_all(
        self, calls: Sequence[tuple[Call, Receive]]
    ) -> Iterator[tuple[int, Reply | Exception]]:
        """Answer several requests on one thread, as `infer` each; bodies are there.

        They walk alone, but for the model, through which they are taken together.
        Yields each one's place in `calls` and what became of it, as soon as it is
        known.
        """
        waiting: list[tuple[int, _Walk, Place, Call, Inputs]] = []
        for at, (call, receive) in enumerate(calls):
            walk = self._walk(call, receive)
            try:
                place, inputs = next(walk)
            except Exception as error:  # noqa: BLE001 - it is that call's alone
                yield at, error
            else:
                waiting.append((at, walk, place, call, inputs))
        if not waiting:
            return
        answers = self._runner.run_all([one[2:] for one in waiting])
        for (at, walk, *_), answer in zip(waiting, answers, strict=True):
            try:
                reply = _arrived(walk, answer)
            except Exception as error:  # noqa: BLE001 - it is that call's alone
                yield at, error
            else:
                yield at, reply

    def _walk(self, call: Call, receive: Receive) -> "_Walk":
        """Walk one request; yields what goes into the model and is sent its answer."""
        with self._record(call) as record:
            self._judge(call, record)
            with self._runner.admit() as place:
                request = receive()
                record.received(request)
                inputs = self._checked(request, record)
                outputs = yield place, inputs
                record.stage("inference")
            reply = self._outputs.release(outputs, request.outputs)
            record.released(reply)
        return reply

    def stream(self, call: Call, receive: Receive) -> Iterator[Reply]:
        """Answer one request piece by piece.

        A first record is written before the first piece leaves, the closing one
        before the stream ends.
        """
        with self._record(call) as record:
            self._judge(call, record)
            with self._runner.admit() as place:
                request = receive()
                record.received(request)
                inputs = self._checked(request, record)
                release = self._outputs.stream(request.outputs)
                # Closed here, within the record: the model's code has ended by then.
                with closing(place.stream(call, inputs)) as answer:
                    for outputs in answer:
                        piece = release.feed(outputs)
                        if piece is not None:
                            record.released(piece, last=False)
                            yield piece
            record.stage("inference")
            last = release.close()
            record.released(last)
        if last is not None:
            yield last

    def describe(self, call: Call) -> Description:
        """Answer live, ready and metadata calls, to those who may ask."""
        with self._record(call) as record:
            self._judge(call, record)
            record.described()
        return self._description

    def _judge(self, call: Call, record: Record) -> None:
        decision = self._policies.authorize(call)
        record.rule, record.shadow = decision.rule, decision.shadow
        record.stage("authorization")

    def _checked(self, request: Request, record: Record) -> Inputs:
        inputs = self._validator.check(request)
        self._outputs.select(request.outputs)  # before the model works for nothing
        record.rows = inputs.rows
        record.stage("validation")
        return inputs

    @contextmanager
    def _record(self, call: Call) -> Iterator[Record]:
        record = self._log.record(call)
        record.model = self._description.model
        record.version = self._description.version
        record.digest = self._description.digest
        try:
            with record:
                yield record
        except AuditError:
            record.outcome = "failed"  # whatever it was, nothing leaves
            raise
        finally:
            with self._counting:
                self._outcomes[record.outcome] += 1


def _arrived(walk: _Walk, answer: Callable[[], Outputs]) -> Reply:
    """Wait for the model, and walk the rest of the way."""
    try:
        outputs = answer()
    except BaseException as error:
        walk.throw(error)  # through the record, which says how it ended
        raise
    try:
        walk.send(outputs)
    except StopIteration as done:
        reply: Reply = done.value
        return reply
    raise AssertionError("a walk that goes on after the model")
