import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from tests.unit.inference.support import a_call, eventually, in_threads
from ztserve.errors import (
    Cancelled,
    DeadlineExceeded,
    InferenceError,
    Unavailable,
)
from ztserve.inference import Runner, current_call
from ztserve.inference import loop as loop_module
from ztserve.inference.loop import ModelLoop
from ztserve.types import Batch, Inputs, TensorSpec, TextSpec

X = (TensorSpec("x", "FP32", (-1, 1)),)
TEXT = (TextSpec("text"),)
PROMPT = Inputs({"text": "a"}, 1)


@pytest.fixture
def loop():
    one = ModelLoop(2)
    yield one
    one.close()


@pytest.fixture
def runner_of():
    made = []

    def make(predict, **options):
        options = {"inputs": TEXT, "outputs": TEXT, **options}
        made.append(Runner(predict, **options))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


def run(runner, inputs=PROMPT, call=None):
    with runner.admit() as place:
        return place.run(call or a_call(), inputs).values


def stream(runner, call=None):
    with runner.admit() as place:
        return [piece.values for piece in place.stream(call or a_call(), PROMPT)]


def test_a_thread_gets_what_the_awaitable_gives_or_raises(loop):
    async def gives():
        await asyncio.sleep(0)
        return 7

    async def fails():
        raise KeyError("broken")

    assert loop.wait((a_call(),), gives()) == 7
    with pytest.raises(KeyError, match="broken"):
        loop.wait((a_call(),), fails())


def test_at_most_so_many_run_at_once(loop):
    running, most = 0, 0

    async def work():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1

    in_threads(*[lambda: loop.wait((a_call(),), work())] * 8)
    assert most == 2


@pytest.mark.slow
def test_what_waits_for_a_place_can_be_cancelled_before_it_begins(loop):
    """And is then no coroutine that was never awaited, which would be a warning."""
    began = []

    async def long():
        await asyncio.sleep(0.6)

    async def late():
        began.append(1)

    results = in_threads(
        *[lambda: loop.wait((a_call(),), long())] * 2,
        lambda: time.sleep(0.1) or loop.wait((a_call(0.1),), late()),
    )
    assert isinstance(results[2], DeadlineExceeded)
    assert not began


@pytest.mark.slow
def test_a_batch_goes_on_while_one_of_its_callers_is_there(loop):
    async def work():
        await asyncio.sleep(0.4)
        return "done"

    assert loop.wait((a_call(0.1), a_call()), work()) == "done"
    with pytest.raises(DeadlineExceeded):
        loop.wait((a_call(0.1), a_call(0.2)), work())


@pytest.mark.slow
def test_whoever_leaves_waits_for_the_end_of_what_it_cancelled(loop):
    ended = []

    async def work():
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.2)
            ended.append(1)

    with pytest.raises(DeadlineExceeded):
        loop.wait((a_call(0.1),), work())
    assert ended == [1]


@pytest.mark.slow
def test_what_does_not_end_is_left_after_a_bounded_time(loop, monkeypatch):
    monkeypatch.setattr(loop_module, "CLOSE_S", 0.2)
    release = asyncio.Event()

    async def stubborn():
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    start = time.monotonic()
    with pytest.raises(InferenceError, match=r"goes on after 0\.1 s"):
        loop.wait((), stubborn(), within_s=0.1)
    assert time.monotonic() - start < 2
    loop._loop.call_soon_threadsafe(release.set)


@pytest.mark.slow
def test_a_closed_loop_takes_nothing_and_ends_what_runs(loop):
    cancelled = []

    async def long():
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    def close():
        eventually(lambda: loop._loop is not None)
        time.sleep(0.1)
        loop.close()

    results = in_threads(lambda: loop.wait((a_call(),), long()), close)
    assert isinstance(results[0], asyncio.CancelledError)
    assert cancelled == [1]
    assert not loop._thread.is_alive()
    with pytest.raises(Unavailable, match="is stopping"):
        loop.wait((a_call(),), long())
    loop.close()


def test_async_model_code_runs_without_autograd_and_knows_its_call(runner_of):
    async def predict(x):
        assert torch.is_inference_mode_enabled()
        assert current_call().id == "c"
        return x

    inputs = Inputs({"x": np.zeros((1, 1), np.float32)}, 1)
    for batch in (None, Batch(4)):
        runner = runner_of(predict, inputs=X, outputs=X, batch=batch)
        assert run(runner, inputs)["x"].tolist() == [[0]]


def test_async_calls_overlap_where_nothing_is_batched(runner_of):
    both = threading.Barrier(2)

    async def predict(text):
        await asyncio.to_thread(both.wait, 5)
        return text

    runner = runner_of(predict)
    assert in_threads(*[lambda: run(runner)["text"]] * 2) == ["a", "a"]


@pytest.mark.parametrize("batch", [None, Batch(4)])
def test_an_async_model_never_sees_a_call_that_was_cancelled_before(runner_of, batch):
    ran = []

    async def predict(text):
        ran.append(1)
        return text

    runner = runner_of(predict, batch=batch)
    with pytest.raises(Cancelled):
        run(runner, call=a_call(cancelled=lambda: True))
    assert not ran


@pytest.mark.slow
def test_an_async_stream_that_comes_late_is_told_so_and_closed(runner_of):
    closed = []

    async def predict(text):
        try:
            while True:
                await asyncio.sleep(10)
                yield "a"
        finally:
            await asyncio.sleep(0.05)
            closed.append(1)

    runner = runner_of(predict)
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            stream(runner, a_call(0.15))
    assert closed == [1, 1, 1]


def test_an_async_stream_is_closed_when_its_reader_leaves(runner_of):
    closed = []

    async def predict(text):
        try:
            yield "a"
            yield "b"
        finally:
            await asyncio.sleep(0)
            closed.append(1)

    with runner_of(predict).admit() as place:
        answer = place.stream(a_call(), PROMPT)
        assert next(answer).values == {"text": "a"}
        answer.close()
    assert closed == [1]


def test_an_async_iterator_without_aclose_is_enough(runner_of):
    class Once:
        def __init__(self):
            self.left = ["a", "b"]

        def __aiter__(self):
            return self

        async def __anext__(self):
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop(0)

    runner = runner_of(lambda text: Once())
    assert stream(runner) == [{"text": "a"}, {"text": "b"}]
    assert run(runner) == {"text": "ab"}
