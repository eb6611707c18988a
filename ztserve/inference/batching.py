"""Join calls on axis 0 and split their answers: one model step for many callers."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ztserve.errors import InferenceError, ZTServeError
from ztserve.inference.turns import LOOK_UP_S, Turns, still_wanted
from ztserve.types import Array, Batch, Call, Inputs, Outputs

Step = Callable[[tuple[Call, ...], Inputs], Outputs]
"""Takes joined inputs through the model. Raises ZTServeError."""


Answer = Callable[[], Outputs]
"""Waits for one call's share of a step. Raises ZTServeError."""


@dataclass(slots=True, eq=False)
class Job:
    """One call on its way through the model."""

    call: Call
    inputs: Inputs
    woken: threading.Lock = field(default_factory=threading.Lock)
    queued: bool = True
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

    One step runs at a time. The leader waits for its turn, joins what has queued, runs
    the step, wakes the others, and passes the lead on. `queued`, `leads` and the queue
    change under one mutex: there is a leader whenever there is a queue, it is the
    queue's first call, and whoever leads passes the lead on however its call ends.
    """

    def __init__(self, step: Step, batch: Batch, turns: Turns) -> None:
        self._step = step
        self._batch = batch
        self._turns = turns
        self._queue: deque[Job] = deque()
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

    def run(self, call: Call, inputs: Inputs, *, expected: bool) -> Outputs:
        """Queue, wait for the step, return this call's share of the answer.

        `expected`: the call was counted by `expect`; it no longer is once it queues.
        """
        job = Job(call, inputs)
        self._join((job,), expected=expected)
        return self._answered(job)

    def run_all(self, calls: Sequence[tuple[Call, Inputs]]) -> Iterator[Answer]:
        """Queue several that were expected at once; return each one's answer in turn.

        They are one thread's: each answer must be asked for before the next, and the
        first to be asked for takes the others along.
        """
        jobs = [Job(call, inputs) for call, inputs in calls]
        self._join(jobs, expected=len(jobs))
        try:
            for job in jobs:
                yield partial(self._answered, job)
        finally:
            for job in jobs:  # those whose answers nobody asked for
                self._leave(job)

    def _answered(self, job: Job) -> Outputs:
        try:
            if job.leads or self._wait(job):
                with self._turns.turn(job.call):
                    self._execute(self._collect())
        finally:
            self._leave(job)
        return job.answer()

    def _join(self, jobs: Sequence[Job], *, expected: int) -> None:
        with self._mutex:
            self._queue.extend(jobs)
            self._expected -= expected
            jobs[0].leads = not self._busy
            self._busy = True
            if self._collecting:
                self._more.notify()

    def _wait(self, job: Job) -> bool:
        """Wait for the answer; True where the lead came instead."""
        while not job.woken.acquire(timeout=LOOK_UP_S):
            still_wanted(job.call)
        return job.leads

    def _leave(self, job: Job) -> None:
        """Take `job` out of the queue if it is still there, and pass its lead on."""
        if not job.queued and not job.leads:
            return  # only a queued call can be given the lead: it will not come now
        with self._mutex:
            if job.queued:
                job.queued = False
                self._queue.remove(job)
            if job.leads:
                job.leads = False
                self._busy = bool(self._queue)
                if self._queue:
                    self._queue[0].leads = True
                    self._queue[0].woken.release()

    def _collect(self) -> list[Job]:
        """Take the calls of the next step from the queue, in order of arrival."""
        most = self._batch.max_size
        with self._mutex:
            if most > 1 and self._batch.wait_ms:
                self._wait_for_more(most)
            jobs: list[Job] = []
            rows = 0
            while self._queue:
                behind = self._queue[0]
                rows += behind.inputs.rows
                if jobs and (rows > most or not _joinable(jobs[0], behind)):
                    break
                behind.queued = False
                jobs.append(self._queue.popleft())
            return jobs

    def _wait_for_more(self, most: int) -> None:
        until = time.monotonic() + self._batch.wait_ms / 1000
        self._collecting = True
        while self._expected > 0 and _rows(self._queue) < most:
            if not self._more.wait(until - time.monotonic()):
                break
        self._collecting = False

    def _execute(self, jobs: list[Job]) -> None:
        try:
            wanted = [job for job in jobs if len(jobs) == 1 or _is_wanted(job)]
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
                still_wanted(job.call)
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
        except (ZTServeError, MemoryError):
            # One caller's input must not fail another's call: each runs again alone.
            self._execute_alone(jobs)
            return
        for job, share in zip(jobs, shares, strict=True):
            job.outputs = share


def _is_wanted(job: Job) -> bool:
    try:
        still_wanted(job.call)
    except ZTServeError as error:
        job.error = error
    return job.error is None


def _rows(jobs: Iterable[Job]) -> int:
    return sum(job.inputs.rows for job in jobs)


def _joinable(first: Job, other: Job) -> bool:
    return all(
        isinstance(value, np.ndarray)
        and isinstance(match := other.inputs.values[name], np.ndarray)
        and value.shape[1:] == match.shape[1:]
        for name, value in first.inputs.values.items()
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
