"""Attacks on the model's queue: by the neighbour in a batch, by floods, by leaving."""

import math
import threading
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from tests.unit.inference.support import a_call, eventually, in_threads
from ztserve import ModelRef, TensorSpec, ZTDeployment
from ztserve.errors import Cancelled, InferenceError, Overloaded
from ztserve.inference import Runner, batching, convert, runner, turns
from ztserve.inference.turns import Turns
from ztserve.testing import serve
from ztserve.types import Batch, Inputs

X = (TensorSpec("x", "FP32", (-1, 1)),)
POISON = 13.0


def rows(*values):
    return Inputs({"x": np.array([[v] for v in values], np.float32)}, len(values))


def run(it, inputs, call=None):
    with it.admit() as place:
        return place.run(call or a_call(), inputs).values["x"].ravel().tolist()


def together(it, *values):
    """Run one call for each value, all admitted before the first begins."""

    def work(value):
        with it.admit() as place:
            eventually(lambda: it.ongoing == len(values))
            return place.run(a_call(), rows(value)).values["x"].ravel().tolist()

    return in_threads(*[lambda v=v: work(v) for v in values])


# --- the neighbour in the batch -----------------------------------------------------


def fussy(x):
    if (x == POISON).any():
        raise IndexError("index out of range in the embedding")
    return x * 2


def batched():
    return Runner(fussy, inputs=X, outputs=X, batch=Batch(4, wait_ms=1000))


def test_an_input_that_breaks_the_model_fails_nobody_else_in_its_batch():
    answers = together(batched(), 1.0, POISON, 2.0, 3.0)
    assert [answers[0], answers[2], answers[3]] == [[2], [4], [6]]
    assert isinstance(answers[1], InferenceError)


def test_without_running_them_again_alone_it_fails_them_all(monkeypatch):
    def naive(self, jobs):
        rows = [job.inputs.rows for job in jobs]
        try:
            calls = tuple(job.call for job in jobs)
            joined = self._step(calls, batching.join([job.inputs for job in jobs]))
        except InferenceError as error:
            for job in jobs:
                job.error = error
            return
        for job, share in zip(jobs, batching.split(joined, rows), strict=True):
            job.outputs = share

    monkeypatch.setattr(batching.Combiner, "_execute_joined", naive)
    answers = together(batched(), 1.0, POISON, 2.0, 3.0)
    assert all(isinstance(answer, InferenceError) for answer in answers)


@pytest.mark.slow
def test_a_neighbour_who_never_sends_its_body_delays_a_batch_by_wait_ms_only():
    it = Runner(fussy, inputs=X, outputs=X, batch=Batch(4, wait_ms=100))
    with it.admit():  # admitted, and silent for as long as it likes
        for _ in range(3):
            began = time.monotonic()
            assert run(it, rows(1.0)) == [2]
            assert 0.09 < time.monotonic() - began < 2


class Frugal:
    """A model that gives all its answers in one buffer."""

    def __init__(self):
        self.buffer = torch.zeros(1, 1)

    def __call__(self, x):
        return self.buffer.copy_(x)


def test_a_model_that_reuses_its_memory_shows_no_caller_anothers_answer():
    it = Runner(Frugal(), inputs=X, outputs=X)
    with it.admit() as place:
        mine = place.run(a_call(), rows(1.0)).values["x"]
    run(it, rows(42.0))  # before mine has been filtered and sent
    assert mine.tolist() == [[1]]


def test_without_the_copy_the_next_callers_answer_is_in_it(monkeypatch):
    monkeypatch.setattr(convert, "_from_torch", lambda value: value.detach().numpy())
    it = Runner(Frugal(), inputs=X, outputs=X)
    with it.admit() as place:
        mine = place.run(a_call(), rows(1.0)).values["x"]
    run(it, rows(42.0))
    assert mine.tolist() == [[42]]


# --- floods -------------------------------------------------------------------------


@contextmanager
def flood(calls, **limits):
    """Have `calls` callers at once at a model that does not get on."""
    go = threading.Event()

    def stuck(x):
        assert go.wait(20)
        return x

    it = Runner(stuck, inputs=X, outputs=X, **limits)
    results = []

    def work():
        try:
            results.append(run(it, rows(1.0), a_call(30)))
        except Overloaded as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(calls)]
    for thread in threads:
        thread.start()
    try:
        yield it, results
    finally:
        go.set()
        for thread in threads:
            thread.join(30)


def test_a_flood_is_refused_at_once_beyond_the_bounded_queue():
    with flood(64, max_ongoing=2, max_queued=6) as (it, results):
        eventually(lambda: len(results) == 56)  # while the model is stuck
        assert it.ongoing == 8
        assert {type(result) for result in results} == {Overloaded}
        assert results[0].public == "the model is busy; try again later"
    assert sum(result == [1] for result in results) == 8
    assert it.ongoing == 0
    assert run(it, rows(2.0)) == [2]  # and it is as before


def test_without_a_bound_it_would_all_pile_up():
    with flood(64, max_ongoing=2, max_queued=10_000) as (it, results):
        eventually(lambda: it.ongoing == 64)
        assert not results


GREEDY_STEPS = 20


class Late(Turns):
    """Turns whose waiter, once woken, comes as late as a scheduler may have it.

    Only when the turn was given to it, or there is no `hurry` any more.
    """

    def __init__(self, hurry):
        super().__init__()
        self.hurry = hurry

    def _got(self, waiter):
        eventually(lambda: waiter.has_it or not self.hurry())
        return super()._got(waiter)


def steps_before_a_victims():
    """Count the steps that a greedy stream takes before another call has its turn."""
    steps, at = [], []
    held = Late(lambda: not at and len(steps) < GREEDY_STEPS)

    def greedy():
        for _ in range(GREEDY_STEPS):
            with held.turn(None):
                eventually(lambda: at or held._waiting)  # the victim has queued
                time.sleep(0.001)  # for as long as one may go on while others wait
                steps.append(1)

    def victim():
        eventually(lambda: held._taken)
        with held.turn(None):
            at.append(len(steps))

    in_threads(greedy, victim)
    return at[0]


def test_a_greedy_stream_cannot_keep_the_model_from_who_waits():
    assert steps_before_a_victims() == 1


def test_a_plain_lock_would_let_it(monkeypatch):
    """One that goes to whoever asks while it is free, for as long as they like."""
    monkeypatch.setattr(turns, "SLICE_S", math.inf)
    assert steps_before_a_victims() == GREEDY_STEPS


# --- leaving ------------------------------------------------------------------------


class Talkative:
    """A stream that would go on for a long time, in steps of some milliseconds."""

    def __init__(self, steps=300):
        self.made, self.steps, self.closed = 0, steps, threading.Event()

    def __call__(self, x):
        try:
            for _ in range(self.steps):
                time.sleep(0.002)
                self.made += 1
                yield x
        finally:
            self.closed.set()


def steps_after_the_caller_left(model):
    """Read a stream whose pieces are all held back; leave after the tenth step."""
    gone = threading.Event()
    it = Runner(model, inputs=X, outputs=X)
    with it.admit() as place:
        answer = place.stream(a_call(cancelled=gone.is_set), rows(1.0))
        try:
            for at, _ in enumerate(answer):
                if at == 9:
                    gone.set()
        except Cancelled:
            return model.made - 10
    return model.made - 10


def test_a_model_stops_when_its_caller_has_gone_though_nobody_reads_it():
    model = Talkative()
    assert steps_after_the_caller_left(model) == 0
    assert model.closed.is_set()


@pytest.mark.slow
def test_without_looking_it_would_work_on_for_nobody(monkeypatch):
    monkeypatch.setattr(runner, "still_wanted", lambda call: None)
    assert steps_after_the_caller_left(Talkative()) == 290


class Endless(ZTDeployment):
    model: ModelRef | None = None
    inputs, outputs = X, X
    closed: list[int]

    def __init__(self, closed):
        self.closed = closed

    def predict(self, x):
        try:
            while True:
                time.sleep(0.002)
                yield x
        finally:
            self.closed.append(1)


def test_callers_who_leave_midway_hold_no_places_of_a_server():
    """Over the wire: more of them than there are places, one after the other."""
    closed: list[int] = []
    with serve(Endless, args=(closed,), max_ongoing=1, max_queued=2) as served:
        for left in range(1, 7):
            pieces = served.client.stream({"x": [[1.0]]}, timeout_s=60)
            assert next(pieces)["x"].tolist() == [[1]]
            pieces.close()
            eventually(lambda left=left: len(closed) == left)
            eventually(lambda: served.replica.ongoing == 0)
        eventually(lambda: served.replica.outcomes.get("cancelled") == 6)
        statuses = [r["status"] for r in served.records() if r["class_uid"] == 6003]
        assert statuses.count("unfinished") == 6


class Exits(ZTDeployment):
    inputs, outputs = X, X

    def predict(self, x):
        raise SystemExit(1)


def test_an_input_on_which_the_model_exits_takes_no_thread_of_the_server():
    with serve(Exits) as served:
        for _ in range(5):
            with pytest.raises(InferenceError):
                served.client.infer({"x": [[1.0]]}, timeout_s=10)
        assert served.client.ready(timeout_s=10)


class Panic(BaseException):
    """What a Rust extension raises: no Exception."""


@pytest.mark.parametrize("batch", [None, Batch(8)])
def test_a_panic_of_the_model_fails_its_own_call_and_no_other(batch):
    def predict(x):
        if (x == 13).any():
            raise Panic("index out of bounds")
        return x

    spec = TensorSpec("x", "FP32", (-1, 1))
    runner = Runner(predict, inputs=(spec,), outputs=(spec,), batch=batch)

    def ask(value):
        inputs = Inputs({"x": np.full((1, 1), value, np.float32)}, rows=1)
        with runner.admit() as place:
            return place.run(a_call(), inputs).values["x"].tolist()

    with pytest.raises(InferenceError, match="Panic: index out of bounds"):
        ask(13)
    assert ask(1) == [[1]]


def test_blamed_on_nobody_a_panic_reaches_the_callers_thread(monkeypatch):
    def predict(x):
        raise Panic

    monkeypatch.setattr(runner, "_blamed_on_the_model", nullcontext)
    it = Runner(predict, inputs=X, outputs=X)
    with pytest.raises(Panic):
        run(it, rows(1))
