"""One call's record: opened when the call arrives, written when it ends."""

from asyncio import CancelledError
from collections.abc import Callable
from time import perf_counter
from types import TracebackType
from typing import Literal, Self, TypeAlias

from ztserve.errors import CallError, Cancelled, InferenceError
from ztserve.types import Call, Reply, Request

Outcome: TypeAlias = Literal["unfinished", "released", "refused", "failed", "cancelled"]


class Record:
    """What is known of one call. Made only by `Log.record`; use it in a `with`.

    On leaving the `with` its line is written, whatever happened; AuditError says that
    it could not be, and then the reply must not leave.
    """

    __slots__ = (
        "_begun",
        "_stage_begun",
        "_write",
        "announced",
        "bytes_in",
        "bytes_out",
        "call",
        "digest",
        "error",
        "findings",
        "model",
        "outcome",
        "reason",
        "request_id",
        "resource",
        "rows",
        "rule",
        "shadow",
        "stages",
        "version",
    )

    def __init__(self, call: Call, write: Callable[["Record"], None]) -> None:
        self._begun = self._stage_begun = perf_counter()
        self.announced = False
        self._write = write
        self.call = call
        self.outcome: Outcome = "unfinished"
        self.error = ""
        self.reason = ""
        self.rule = ""
        self.shadow: tuple[str, ...] = ()
        self.model = ""
        self.version = ""
        self.digest = ""
        self.request_id = ""
        self.resource = ""
        self.stages: dict[str, float] = {}
        self.rows = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.findings: dict[str, int] = {}

    def stage(self, name: str) -> None:
        """Mark the end of a stage; it began where the one before ended.

        A stage that comes again, as with a stream's pieces, adds up.
        """
        now = perf_counter()
        self.stages[name] = self.stages.get(name, 0.0) + now - self._stage_begun
        self._stage_begun = now

    def seconds(self) -> float:
        """Return the time since the call arrived."""
        return perf_counter() - self._begun

    def received(self, request: Request) -> None:
        """Note what was asked; ends the stage ``receive``."""
        self.request_id = request.id
        self.bytes_in = request.size
        self.stage("receive")

    def released(self, reply: Reply | None, *, last: bool = True) -> None:
        """Note what may leave; the `last` of it ends the stage ``filtering``.

        Before the first of several pieces leaves, a line with the outcome
        ``unfinished`` is written: a process that dies then has said that it answered.
        Raises AuditError where it cannot be written.
        """
        if reply is not None:
            self.bytes_out += _size(reply)
            for kind, count in reply.findings.items():
                self.findings[kind] = self.findings.get(kind, 0) + count
        if last:
            self.outcome = "released"
            self.stage("filtering")
        elif not self.announced:
            self.announced = True
            self._write(self)

    def described(self) -> None:
        """Note that an answer leaves that no model gave: live, ready, metadata."""
        self.outcome = "released"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._end_with(error)
        self._write(self)

    def _end_with(self, error: BaseException) -> None:
        self.error = type(error).__name__
        match error:
            case Cancelled():
                self.outcome, self.reason = "cancelled", str(error.reason)
            case CallError():
                self.outcome, self.reason = "refused", str(error.reason)
            case GeneratorExit() | CancelledError():
                self.outcome = "cancelled"
            case InferenceError():
                self.outcome, self.reason = "failed", str(error)
            case _:
                # Its text may quote the request: the name alone is written.
                self.outcome = "failed"


def _size(reply: Reply) -> int:
    total = 0
    for tensor in reply.outputs:
        data = tensor.data
        if isinstance(data, tuple):
            total += sum(map(len, data))
        else:
            total += data.nbytes if isinstance(data, memoryview) else len(data)
    return total
