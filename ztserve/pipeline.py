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
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from ztserve.audit import Log, Record
from ztserve.authorization import PolicySet
from ztserve.errors import AuditError
from ztserve.filtering import OutputFilter
from ztserve.inference import Runner
from ztserve.types import Call, Description, Inputs, Receive, Reply, Request
from ztserve.validation import Validator


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
        with self._record(call) as record:
            self._judge(call, record)
            with self._runner.admit() as place:
                request = receive()
                record.received(request)
                inputs = self._checked(request, record)
                outputs = place.run(call, inputs)
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
