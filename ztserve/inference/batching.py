"""Join calls on axis 0 and split their answers: one model step for many callers."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from ztserve.errors import (
    CallError,
    Cancelled,
    DeadlineExceeded,
    InferenceError,
    ZTServeError,
)
from ztserve.types import Array, Batch, Call, Inputs, Outputs

Step = Callable[[tuple[Call, ...], Inputs], Outputs]

LOOK_UP_S = 0.1
"""How often a waiting call looks whether its caller is still there."""


def still_wanted(call: Call) -> None:
    """Raise Cancelled or DeadlineExceeded where nobody waits for `call` any more."""
    if call.cancelled():
        raise Cancelled("the call was cancelled")
    if time.monotonic() >= call.deadline:
        raise DeadlineExceeded("the deadline passed before the answer was ready")


@dataclass(slots=True, eq=False)
class Job:
    """One call on its way through the model."""

    call: Call
    inputs: Inputs
    woken: threading.Lock = field(default_factory=threading.Lock)
    leads: bool = False
    outputs: Outputs | None = None
    error: ZTServeError | None = None

    def __post_init__(self) -> None:
        self.woken.acquire()

    def answer(self) -> Outputs:
        """Return this call's share of the step's outputs, or raise its error."""
        if self.error is not None:
            raise self.error
        if self.outputs is None:
            raise InferenceError("the model gave no answer for this call")
        return self.outputs


class Combiner:
    """A queue whose first call leads: it runs the model for those behind it.

    One step runs at a time. The leader takes the lead over from the call before it,
    joins what has queued, runs the step, wakes the others, and passes the lead on.
    """

    def __init__(self, step: Step, batch: Batch) -> None:
        self._step = step
        self._batch = batch
        self._queue: deque[Job] = deque()
        self._model = threading.Lock()
        self._mutex = threading.Lock()
        self._more = threading.Condition(self._mutex)
        self._busy = False
        self._collecting = False
        self._expected = 0

    def expect(self, calls: int) -> None:
        """Count calls that are on their way here and so worth a wait."""
        with self._mutex:
            self._expected += calls
            if self._collecting:
                self._more.notify()

    @contextmanager
    def turn(self, call: Call) -> Iterator[None]:
        """Hold the model alone, for one step of a stream."""
        while not self._model.acquire(timeout=LOOK_UP_S):
            still_wanted(call)
        try:
            yield
        finally:
            self._model.release()

    def run(self, call: Call, inputs: Inputs) -> Outputs:
        """Queue, wait for the step, return this call's share of the answer.

        The call must have been expected: it is no more once it has queued.
        """
        job = Job(call, inputs)
        with self._mutex:
            self._queue.append(job)
            self._expected -= 1
            leads = job.leads = not self._busy
            self._busy = True
            if self._collecting:
                self._more.notify()
        if leads or self._wait(job):
            try:
                with self.turn(call):
                    self._execute(self._collect())
            except CallError as error:
                self._drop(job)
                job.error = error
            finally:
                self._pass_on()
        return job.answer()

    def _wait(self, job: Job) -> bool:
        """Wait for the answer; True where the lead came instead."""
        while not job.woken.acquire(timeout=LOOK_UP_S):
            try:
                still_wanted(job.call)
            except CallError:
                if self._leave(job):
                    return True
                raise
        return job.leads

    def _leave(self, job: Job) -> bool:
        """Take `job` out of the queue; True where it has the lead meanwhile."""
        with self._mutex:
            if job in self._queue and not job.leads:
                self._queue.remove(job)
            return job.leads

    def _drop(self, job: Job) -> None:
        with self._mutex:
            if job in self._queue:
                self._queue.remove(job)

    def _pass_on(self) -> None:
        with self._mutex:
            self._busy = bool(self._queue)
            if self._queue:
                self._queue[0].leads = True
                self._queue[0].woken.release()

    def _collect(self) -> list[Job]:
        """Take the calls of the next step from the queue, in order of arrival."""
        most = self._batch.max_size
        with self._mutex:
            if most > 1 and self._batch.wait_ms:
                self._collecting = True
                until = time.monotonic() + self._batch.wait_ms / 1000
                while self._expected > 0 and _rows(self._queue) < most:
                    if not self._more.wait(until - time.monotonic()):
                        break
                self._collecting = False
            jobs = [self._queue.popleft()] if self._queue else []
            rows = _rows(jobs)
            while self._queue and jobs:
                behind = self._queue[0]
                rows += behind.inputs.rows
                if rows > most or not _joinable(jobs[0].inputs, behind.inputs):
                    break
                jobs.append(self._queue.popleft())
            return jobs

    def _execute(self, jobs: list[Job]) -> None:
        wanted = []
        for job in jobs:
            try:
                still_wanted(job.call)
                wanted.append(job)
            except CallError as error:
                job.error = error
        try:
            if len(wanted) > 1:
                self._execute_joined(wanted)
            else:
                self._execute_alone(wanted)
        finally:
            for job in jobs:
                if not job.leads:
                    job.woken.release()

    def _execute_alone(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            try:
                job.outputs = self._step((job.call,), job.inputs)
            except ZTServeError as error:
                job.error = error

    def _execute_joined(self, jobs: Sequence[Job]) -> None:
        rows = [job.inputs.rows for job in jobs]
        try:
            outputs = self._step(
                tuple(job.call for job in jobs), join([job.inputs for job in jobs])
            )
            shares = split(outputs, rows)
        except ZTServeError:
            # One caller's input must not fail another's call: each runs again alone.
            self._execute_alone(jobs)
            return
        for job, share in zip(jobs, shares, strict=True):
            job.outputs = share


def _rows(jobs: Sequence[Job] | deque[Job]) -> int:
    return sum(job.inputs.rows for job in jobs)


def _joinable(first: Inputs, other: Inputs) -> bool:
    return all(
        isinstance(value, np.ndarray)
        and isinstance(match := other.values[name], np.ndarray)
        and value.shape[1:] == match.shape[1:]
        for name, value in first.values.items()
    )


def join(inputs: Sequence[Inputs]) -> Inputs:
    """Concatenate on axis 0, by name. All must hold the same names and row shapes."""
    arrays: dict[str, list[Array]] = {}
    for one in inputs:
        for name, value in one.values.items():
            arrays.setdefault(name, []).append(np.asarray(value))
    joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
    return replace(inputs[0], values=joined, rows=sum(one.rows for one in inputs))


def split(outputs: Outputs, rows: Sequence[int]) -> list[Outputs]:
    """Give each call its rows back. Raises InferenceError where rows went missing."""
    total = sum(rows)
    ends = np.cumsum(rows)
    for name, value in outputs.values.items():
        if not isinstance(value, np.ndarray) or value.shape[:1] != (total,):
            shape = getattr(value, "shape", type(value).__name__)
            raise InferenceError(
                f"output {name!r} of a batch of {total} rows has shape {shape}; "
                "batched outputs keep the batch axis first"
            )
    return [
        Outputs({n: v[end - size : end] for n, v in outputs.values.items()})
        for size, end in zip(rows, ends, strict=True)
    ]
