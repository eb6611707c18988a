import random
import threading
import time

import numpy as np
import pytest

from tests.unit.inference.support import a_call, eventually, in_threads
from ztserve.errors import CallError, Cancelled, DeadlineExceeded, InferenceError
from ztserve.inference.batching import Combiner, split
from ztserve.inference.turns import Turns
from ztserve.types import Batch, Inputs, Outputs


def rows(*values):
    return Inputs({"x": np.array([[v] for v in values], np.float32)}, len(values))


def echo(calls, inputs):
    return Outputs(inputs.values)


def combiner(step=echo, **batch):
    return Combiner(step, Batch(**{"max_size": 8, **batch}), Turns())


def at_rest(it: Combiner) -> bool:
    """Whether nothing is left behind that a later call would wait for."""
    return not (it._queue or it._busy or it._turns._taken or it._expected)


class Gate:
    """A step that waits, so that calls queue behind it."""

    def __init__(self):
        self.entered, self.open = threading.Event(), threading.Event()
        self.sizes = []

    def __call__(self, calls, inputs):
        self.sizes.append(inputs.rows)
        self.entered.set()
        assert self.open.wait(10)
        return Outputs(inputs.values)


class Queued:
    """Calls in threads behind a step that holds the model."""

    def __init__(self, step=None, **batch):
        self.gate = Gate()
        self.then = step or echo
        self.it = combiner(self.step, **batch)
        self.results: dict[int, object] = {}
        self.threads: list[threading.Thread] = []

    def step(self, calls, inputs):
        # the first step is the gate's, those behind are as the test says
        return (self.gate if not self.gate.sizes else self.then)(calls, inputs)

    def add(self, call, inputs):
        number = len(self.threads)

        def work():
            try:
                answer = self.it.run(call, inputs, expected=False)
                self.results[number] = answer.values["x"].tolist()
            except BaseException as error:
                self.results[number] = error

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()
        if number == 0:
            assert self.gate.entered.wait(10)
        else:
            until = time.monotonic() + 10
            while len(self.it._queue) < 1 and number not in self.results:
                assert time.monotonic() < until

    def finish(self):
        self.gate.open.set()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        assert at_rest(self.it)
        return [self.results[number] for number in range(len(self.threads))]


def test_calls_that_queue_together_are_joined_and_split_again():
    queued = Queued()
    for i in range(4):
        queued.add(a_call(), rows(i, i + 10))
    eventually(lambda: len(queued.it._queue) == 3)
    assert queued.finish() == [[[i], [i + 10]] for i in range(4)]
    assert queued.gate.sizes == [2]


def test_a_step_takes_no_more_rows_than_max_size():
    sizes = []

    def step(calls, inputs):
        sizes.append(inputs.rows)
        return Outputs(inputs.values)

    queued = Queued(step, max_size=3)
    queued.add(a_call(), rows(0))
    for i in range(1, 8):
        queued.add(a_call(), rows(i))
    eventually(lambda: len(queued.it._queue) == 7)
    assert queued.finish() == [[[i]] for i in range(8)]
    assert sizes == [3, 3, 1]


@pytest.mark.slow
def test_a_waiting_call_that_is_cancelled_leaves_the_queue():
    gone = threading.Event()
    queued = Queued()
    queued.add(a_call(), rows(0))
    queued.add(a_call(cancelled=gone.is_set), rows(1))
    queued.add(a_call(), rows(2))
    eventually(lambda: len(queued.it._queue) == 2)
    gone.set()
    eventually(lambda: 1 in queued.results)
    assert len(queued.it._queue) == 1
    results = queued.finish()
    assert isinstance(results[1], Cancelled)
    assert results[::2] == [[[0]], [[2]]]


@pytest.mark.slow
def test_a_leader_that_is_cancelled_before_its_turn_passes_the_lead_on():
    it, results = combiner(), {}

    def work(name, call):
        try:
            results[name] = it.run(call, rows(7), expected=False).values["x"].tolist()
        except CallError as error:
            results[name] = error

    with it._turns.turn(None):  # a stream has the model
        leader = threading.Thread(target=work, args=("leader", a_call(0.05)))
        leader.start()
        eventually(lambda: it._queue)
        behind = threading.Thread(target=work, args=("behind", a_call()))
        behind.start()
        leader.join(10)
        assert isinstance(results["leader"], DeadlineExceeded)
        assert it._queue[0].leads
    behind.join(10)
    assert results["behind"] == [[7]]
    assert at_rest(it)


@pytest.mark.slow
def test_a_call_that_runs_late_is_told_so_and_the_step_goes_on():
    late = Queued(lambda calls, inputs: time.sleep(0.5) or Outputs(inputs.values))
    late.add(a_call(), rows(0))
    late.add(a_call(), rows(1))
    late.add(a_call(0.3), rows(2))
    eventually(lambda: len(late.it._queue) == 2)
    results = late.finish()
    assert isinstance(results[2], DeadlineExceeded)
    assert results[:2] == [[[0]], [[1]]]


class Interrupt:
    """Raises what an interrupt from the keyboard does, once it is set."""

    def __init__(self):
        self.set = threading.Event()

    def __call__(self):
        if self.set.is_set():
            raise KeyboardInterrupt
        return False


@pytest.mark.slow
def test_an_interrupted_thread_in_the_queue_blocks_no_other():
    interrupt, queued = Interrupt(), Queued()
    queued.add(a_call(), rows(0))
    for i in (1, 2, 3):
        queued.add(a_call(cancelled=interrupt if i == 1 else bool), rows(i))
    eventually(lambda: len(queued.it._queue) == 3)
    interrupt.set.set()
    eventually(lambda: 1 in queued.results)
    results = queued.finish()
    assert isinstance(results[1], KeyboardInterrupt)
    assert [results[0], *results[2:]] == [[[0]], [[2]], [[3]]]


@pytest.mark.slow
def test_an_interrupted_leader_blocks_no_other():
    interrupt, it = Interrupt(), combiner()

    def leader():
        return it.run(a_call(cancelled=interrupt), rows(1), expected=False)

    def behind():
        eventually(lambda: it._busy)
        return it.run(a_call(), rows(2), expected=False).values["x"].tolist()

    def stream():
        eventually(lambda: len(it._queue) == 2)
        interrupt.set.set()
        eventually(lambda: len(it._queue) == 1)
        it._turns._pass_on()

    it._turns._take(None)  # a stream has the model
    results = in_threads(leader, behind, stream)
    assert isinstance(results[0], KeyboardInterrupt)
    assert results[1] == [[2]]
    assert at_rest(it)


def test_an_interrupt_within_the_step_is_the_leaders_and_the_others_are_told():
    def step(calls, inputs):
        raise KeyboardInterrupt

    queued = Queued(step)
    for i in range(4):
        queued.add(a_call(), rows(i))
    eventually(lambda: len(queued.it._queue) == 3)
    kinds = [type(result) for result in queued.finish()[1:]]
    assert sorted(kinds, key=str) == [KeyboardInterrupt, InferenceError, InferenceError]


def test_a_batch_too_large_for_memory_runs_one_by_one():
    def step(calls, inputs):
        if len(calls) > 1:
            raise MemoryError
        return Outputs(inputs.values)

    queued = Queued(step)
    for i in range(3):
        queued.add(a_call(), rows(i))
    eventually(lambda: len(queued.it._queue) == 2)
    assert queued.finish() == [[[0]], [[1]], [[2]]]


def test_a_call_that_has_gone_is_not_run_again_after_its_batch_failed():
    gone, ran = threading.Event(), []

    def step(calls, inputs):
        if len(calls) > 1:
            gone.set()
            raise InferenceError("poisoned")
        ran.append(inputs.values["x"].tolist())
        return Outputs(inputs.values)

    queued = Queued(step)
    queued.add(a_call(), rows(0))
    queued.add(a_call(), rows(1))
    queued.add(a_call(cancelled=gone.is_set), rows(2))
    eventually(lambda: len(queued.it._queue) == 2)
    results = queued.finish()
    assert isinstance(results[2], Cancelled)
    assert ran == [[[1]]]


def test_a_step_that_forgets_a_call_is_the_models_failure():
    with pytest.raises(InferenceError, match="gave no answer for this call"):
        combiner(lambda calls, inputs: None).run(a_call(), rows(1), expected=False)


@pytest.mark.slow
def test_a_leader_waits_for_the_expected_and_no_longer():
    it = combiner(wait_ms=300)
    it.expect(1)
    start = time.monotonic()
    it.run(a_call(), rows(1), expected=True)
    assert time.monotonic() - start < 0.25
    it.expect(2)  # one of them does not come
    start = time.monotonic()
    it.run(a_call(), rows(1), expected=True)
    assert time.monotonic() - start >= 0.29
    it.expect(-1)
    assert at_rest(it)


@pytest.mark.slow
def test_a_leader_goes_as_soon_as_the_expected_one_is_called_off():
    it = combiner(wait_ms=1000)
    it.expect(2)
    timer = threading.Timer(0.1, it.expect, (-1,))
    timer.start()
    start = time.monotonic()
    it.run(a_call(), rows(1), expected=True)
    assert time.monotonic() - start < 0.9
    timer.join()


@pytest.mark.slow
def test_whatever_happens_each_call_ends_and_nothing_stays_behind():
    """Many callers who leave, come late and fail, by chance."""

    def step(calls, inputs):
        values = inputs.values["x"]
        time.sleep(float(values[0, 0] % 3) / 1000)
        if (values == 13).any():
            raise InferenceError("unlucky")
        return Outputs({"x": values * 2})

    it = combiner(step, wait_ms=1)
    wrong = []

    def work(seed):
        dice = random.Random(seed)
        for _ in range(40):
            value = dice.randrange(20)
            until = time.monotonic() + dice.choice((0.0, 0.05, 0.2, 5.0))
            leaves = time.monotonic() + dice.choice((0.02, 5.0, 5.0))
            call = a_call(
                until - time.monotonic(),
                cancelled=lambda leaves=leaves: time.monotonic() > leaves,
            )
            expected = dice.random() < 0.5
            if expected:
                it.expect(1)
            try:
                answer = it.run(call, rows(value), expected=expected)
                if answer.values["x"].tolist() != [[2 * value]]:
                    wrong.append(value)
            except (CallError, InferenceError):
                continue

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    assert at_rest(it)


def test_outputs_are_split_by_rows_and_a_missing_row_is_told():
    whole = Outputs({"y": np.arange(6).reshape(3, 2)})
    first, second = split(whole, [1, 2])
    assert first.values["y"].tolist() == [[0, 1]]
    assert second.values["y"].tolist() == [[2, 3], [4, 5]]
    for bad in (np.zeros((2, 2)), np.float32(1), "text"):
        with pytest.raises(InferenceError, match="keep the batch axis first"):
            split(Outputs({"y": bad}), [1, 2])
