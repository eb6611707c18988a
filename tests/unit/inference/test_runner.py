import asyncio
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from tests.unit.inference.support import a_call, eventually
from tests.unit.inference.support import in_threads as run_in_threads
from ztserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Denied,
    InferenceError,
    InvalidInput,
    NotFound,
    Overloaded,
)
from ztserve.inference import Runner, current_call, current_calls
from ztserve.types import Batch, Call, Inputs, TensorSpec, TextSpec

X = (TensorSpec("x", "FP32", (-1, 2)),)
Y = (TensorSpec("y", "FP32", (-1, 2)),)
TEXT = (TextSpec("text"),)


def rows(*values: float) -> Inputs:
    array = np.array([[v, v] for v in values], np.float32)
    array.flags.writeable = False
    return Inputs({"x": array}, rows=len(values))


def run(runner: Runner, inputs: Inputs, call: Call | None = None):
    with runner.admit() as place:
        return place.run(call or a_call(), inputs).values


def pieces(runner: Runner, inputs: Inputs, call: Call | None = None):
    with runner.admit() as place:
        return [p.values for p in place.stream(call or a_call(), inputs)]


def in_threads(work, n: int) -> list:
    return run_in_threads(*[partial(work, i) for i in range(n)])


async def async_double(x):
    await asyncio.sleep(0)
    return x * 2


def test_predict_may_be_sync_or_async_and_may_return_a_coroutine():
    def returns_one(x):
        return async_double(x)

    for predict in (lambda x: x * 2, async_double, returns_one):
        runner = Runner(predict, inputs=X, outputs=Y)
        assert run(runner, rows(1, 2))["y"].tolist() == [[2, 2], [4, 4]]
        runner.close()


def test_the_model_gets_a_tensor_of_its_own_that_it_may_write_to():
    def predict(x):
        assert isinstance(x, torch.Tensor)
        x += 1
        return x

    inputs = rows(1)
    assert run(Runner(predict, inputs=X, outputs=Y), inputs)["y"].tolist() == [[2, 2]]
    assert inputs.values["x"].tolist() == [[1, 1]]


def test_bfloat16_passes_as_its_bits():
    spec = (TensorSpec("x", "BF16", (-1, 2)),)
    bits = torch.tensor([[1.5, 2.5]], dtype=torch.bfloat16).view(torch.uint16).numpy()

    def predict(x):
        assert x.dtype is torch.bfloat16
        return x + 1

    out = run(Runner(predict, inputs=spec, outputs=Y), Inputs({"x": bits}, 1))["y"]
    back = torch.from_numpy(out).view(torch.bfloat16)
    assert back.tolist() == [[2.5, 3.5]]


def test_a_dict_is_taken_by_output_name():
    runner = Runner(lambda x: {"y": x, "z": "hi"}, inputs=X, outputs=Y)
    assert set(run(runner, rows(1))) == {"y", "z"}


@pytest.mark.parametrize("result", [None, 3, [1.0], object()])
def test_what_is_no_output_is_the_models_failure(result):
    runner = Runner(lambda x: result, inputs=X, outputs=Y)
    with pytest.raises(InferenceError, match="output 'y': predict gave a"):
        run(runner, rows(1))


def test_one_value_for_two_outputs_is_the_models_failure():
    runner = Runner(lambda x: x, inputs=X, outputs=Y + TEXT)
    with pytest.raises(InferenceError, match="for 2 declared outputs"):
        run(runner, rows(1))


def test_an_exception_of_the_model_is_told_as_an_inference_error():
    def predict(x):
        raise KeyError("secret")

    with pytest.raises(InferenceError, match="KeyError: 'secret'"):
        run(Runner(predict, inputs=X, outputs=Y), rows(1))


def test_the_model_may_refuse_an_input_itself():
    def predict(x):
        raise InvalidInput("x is odd")

    with pytest.raises(InvalidInput, match="x is odd"):
        run(Runner(predict, inputs=X, outputs=Y), rows(1))


def test_a_denial_of_an_inner_hop_is_not_told_as_the_callers_own():
    def predict(x):
        raise Denied("this identity may not do this", "inner")

    with pytest.raises(InferenceError, match="a call made by predict failed: Denied"):
        run(Runner(predict, inputs=X, outputs=Y), rows(1))


# --- batching -----------------------------------------------------------------


@pytest.mark.slow
def test_calls_that_queue_together_go_through_the_model_together():
    sizes = []
    first = threading.Event()

    def predict(x):
        sizes.append(len(x))
        if len(sizes) == 1:
            first.wait(5)
        return x * 10

    runner = Runner(predict, inputs=X, outputs=Y, batch=Batch(8))

    def work(i):
        if i == 9:
            time.sleep(0.3)
            first.set()
            return None
        return run(runner, rows(i))["y"].tolist()

    results = in_threads(work, 10)
    assert results[:9] == [[[i * 10, i * 10]] for i in range(9)]
    assert sum(sizes) == 9
    assert max(sizes) > 1


def test_a_lone_call_does_not_wait_for_company():
    runner = Runner(lambda x: x, inputs=X, outputs=Y, batch=Batch(32, wait_ms=1000))
    start = time.monotonic()
    run(runner, rows(1))
    assert time.monotonic() - start < 0.5


@pytest.mark.slow
def test_a_call_waits_for_those_already_admitted():
    sizes = []

    def predict(x):
        sizes.append(len(x))
        return x

    runner = Runner(predict, inputs=X, outputs=Y, batch=Batch(2, wait_ms=1000))

    def work(i):
        with runner.admit() as place:
            eventually(lambda: runner.ongoing == 2)
            time.sleep(0.1 * i)
            place.run(a_call(), rows(i))

    in_threads(work, 2)
    assert sizes == [2]


def test_an_admitted_call_that_fails_is_not_waited_for():
    runner = Runner(lambda x: x, inputs=X, outputs=Y, batch=Batch(2, wait_ms=1000))
    with pytest.raises(InvalidInput), runner.admit():
        raise InvalidInput("bad")
    start = time.monotonic()
    run(runner, rows(1))
    assert time.monotonic() - start < 0.5
    assert runner.ongoing == 0


def test_rows_of_different_shapes_are_not_joined():
    sizes = []

    def predict(x):
        sizes.append(tuple(x.shape))
        time.sleep(0.01)
        return x

    spec = (TensorSpec("x", "FP32", (-1, -1)),)
    runner = Runner(predict, inputs=spec, outputs=Y, batch=Batch(8))

    def work(i):
        array = np.zeros((1, 2 + i % 2), np.float32)
        return run(runner, Inputs({"x": array}, 1))["y"].shape

    shapes = in_threads(work, 8)
    assert shapes == [(1, 2 + i % 2) for i in range(8)]


def test_one_callers_bad_row_does_not_fail_anothers_call():
    def predict(x):
        if (x == 13).any():
            raise ValueError("unlucky")
        time.sleep(0.005)
        return x

    runner = Runner(predict, inputs=X, outputs=Y, batch=Batch(8))
    results = in_threads(lambda i: run(runner, rows(13 if i == 3 else i)), 8)
    assert isinstance(results[3], InferenceError)
    for i in set(range(8)) - {3}:
        assert results[i]["y"].tolist() == [[i, i]]


def test_a_batch_that_loses_rows_is_the_models_failure():
    runner = Runner(lambda x: x[:1], inputs=X, outputs=Y, batch=Batch(8, wait_ms=500))

    def work(i):
        with runner.admit() as place:
            time.sleep(0.05)
            return place.run(a_call(), rows(i))

    # each is run again alone, where one row for one is right
    assert all(not isinstance(r, Exception) for r in in_threads(work, 4))


def test_more_rows_than_max_size_go_alone():
    runner = Runner(lambda x: x, inputs=X, outputs=Y, batch=Batch(2))
    assert len(run(runner, rows(1, 2, 3))["y"]) == 3


@pytest.mark.slow
def test_many_callers_each_get_their_own_rows():
    runner = Runner(lambda x: x * 2, inputs=X, outputs=Y, batch=Batch(16, wait_ms=1))

    def work(i):
        for k in range(50):
            value = float(i * 100 + k)
            assert run(runner, rows(value))["y"].tolist() == [[2 * value] * 2]

    assert in_threads(work, 16) == [None] * 16
    assert runner.ongoing == 0


# --- who, how long, how many ---------------------------------------------------


def test_self_call_names_the_call_and_a_batch_names_them_all():
    seen = []

    def predict(x):
        seen.append((current_call().id, len(current_calls())))
        return x

    run(Runner(predict, inputs=X, outputs=Y), rows(1))
    assert seen == [("c", 1)]
    with pytest.raises(RuntimeError, match="outside of predict"):
        current_call()


def test_beyond_the_queue_a_call_is_refused_and_nothing_is_lost():
    go = threading.Event()

    def predict(x):
        go.wait(10)
        return x

    runner = Runner(predict, inputs=X, outputs=Y, max_ongoing=1, max_queued=2)

    refused = []

    def work(i):
        if i == 5:
            eventually(lambda: len(refused) == 2)
            assert runner.ongoing == 3
            go.set()
            return None
        try:
            return run(runner, rows(i))
        except Overloaded as error:
            refused.append(error)
            raise

    results = in_threads(work, 6)
    assert "limit" in str(refused[0])
    assert len(refused) == 2
    assert sum("y" in r for r in results[:5] if isinstance(r, dict)) == 3


@pytest.mark.slow
def test_a_deadline_ends_the_wait_in_the_queue():
    go = threading.Event()

    def predict(x):
        go.wait(5)
        return x

    runner = Runner(predict, inputs=X, outputs=Y)

    def work(i):
        if i == 2:
            time.sleep(0.6)
            go.set()
            return None
        time.sleep(0.05 * i)
        return run(runner, rows(i), a_call(5.0 if i == 0 else 0.2))

    results = in_threads(work, 3)
    assert "y" in results[0]
    assert isinstance(results[1], DeadlineExceeded)


def test_a_cancelled_call_never_reaches_the_model():
    ran = []

    def predict(x):
        ran.append(1)
        return x

    runner = Runner(predict, inputs=X, outputs=Y)
    with pytest.raises(Cancelled):
        run(runner, rows(1), a_call(cancelled=lambda: True))
    assert not ran
    assert "y" in run(runner, rows(1))


@pytest.mark.slow
def test_an_async_model_is_cancelled_when_its_caller_goes_away():
    ended = threading.Event()

    async def predict(x):
        try:
            await asyncio.sleep(10)
        finally:
            ended.set()

    runner = Runner(predict, inputs=X, outputs=Y)
    with pytest.raises(DeadlineExceeded):
        run(runner, rows(1), a_call(0.2))
    assert ended.wait(2)
    runner.close()


def test_a_place_is_expected_once_however_often_it_runs():
    runner = Runner(lambda x: x, inputs=X, outputs=Y, batch=Batch(8, wait_ms=1))
    with runner.admit() as place:
        for _ in range(3):
            place.run(a_call(), rows(1))
    assert runner._combiner._expected == 0
    with runner.admit() as place, runner.admit():
        place.run(a_call(), rows(1))
        assert runner._combiner._expected == 1
    assert runner._combiner._expected == 0


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()])
def test_what_would_end_the_calls_thread_is_the_models_failure(error):
    def predict(x):
        raise error

    with pytest.raises(InferenceError, match=type(error).__name__):
        run(Runner(predict, inputs=X, outputs=Y), rows(1))


def test_another_model_that_predict_misses_is_not_told_as_the_callers_own():
    def predict(x):
        raise NotFound("model 'inner' is not served here")

    with pytest.raises(InferenceError, match="a call made by predict failed: NotFound"):
        run(Runner(predict, inputs=X, outputs=Y), rows(1))


def test_an_answer_is_not_changed_by_the_next_callers():
    """A model may write all its answers into one buffer."""
    buffer = torch.zeros(1, 2)
    array = np.zeros((1, 2), np.float32)

    def reuses_a_tensor(x):
        return buffer.copy_(x)

    def reuses_an_array(x):
        array[:] = x.numpy()
        return array

    for predict in (reuses_a_tensor, reuses_an_array):
        runner = Runner(predict, inputs=X, outputs=Y)
        first = run(runner, rows(1))["y"]
        streamed = pieces(runner, rows(2))[0]["y"]
        run(runner, rows(7))
        assert first.tolist() == [[1, 1]]
        assert streamed.tolist() == [[2, 2]]


def test_self_call_in_a_batch_of_several_says_to_use_self_calls():
    told = []

    def predict(x):
        if len(x) > 1:
            assert len(current_calls()) == len(x)
            with pytest.raises(RuntimeError, match=r"a batch of 2 calls; self\.calls"):
                current_call()
            told.append(1)
        return x

    runner = Runner(predict, inputs=X, outputs=Y, batch=Batch(2, wait_ms=1000))

    def work(i):
        with runner.admit() as place:
            eventually(lambda: runner.ongoing == 2)
            place.run(a_call(), rows(i))

    assert in_threads(work, 2) == [None, None]
    assert told == [1]


@pytest.mark.slow
def test_first_calls_that_come_together_meet_a_whole_torch():
    """They would import it half, were it not imported when the runner is made."""
    code = """
import sys, threading
import numpy as np
from tests.unit.inference.support import a_call, in_threads
from ztserve.inference import Runner
from ztserve.types import Inputs, TensorSpec

X = (TensorSpec("x", "FP32", (-1, 2)),)
assert "torch" not in sys.modules
runner = Runner(lambda x: x.numpy(), inputs=X, outputs=X)

def work():
    with runner.admit() as place:
        place.run(a_call(60), Inputs({"x": np.zeros((1, 2), np.float32)}, 1))

print(in_threads(*[work] * 4))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[None, None, None, None]", done.stderr


# --- streams ---------------------------------------------------------------------


def generator(prompt):
    yield from prompt.split()


async def async_generator(prompt):
    for word in prompt.split():
        await asyncio.sleep(0)
        yield word


PROMPT = Inputs({"prompt": "a b c"}, rows=1)
ASK = (TextSpec("prompt"),)


@pytest.mark.parametrize(
    "predict",
    [generator, async_generator, lambda prompt: generator(prompt)],
    ids=["generator", "async generator", "returns one"],
)
def test_a_generator_streams_its_pieces_and_infer_joins_them(predict):
    runner = Runner(predict, inputs=ASK, outputs=TEXT)
    assert pieces(runner, PROMPT) == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    assert run(runner, PROMPT) == {"text": "abc"}
    runner.close()


def test_stream_of_a_unary_predict_is_one_piece():
    runner = Runner(lambda x: x, inputs=X, outputs=Y)
    assert len(pieces(runner, rows(1))) == 1


def test_a_stream_of_tensors_cannot_be_joined():
    def predict(x):
        yield x

    with pytest.raises(InferenceError, match="only texts can be joined"):
        run(Runner(predict, inputs=X, outputs=Y), rows(1))


def test_a_generator_is_closed_when_its_reader_leaves():
    closed = []

    def predict(prompt):
        try:
            yield "a"
            yield "b"
        finally:
            closed.append(1)

    runner = Runner(predict, inputs=ASK, outputs=TEXT)
    with runner.admit() as place:
        stream = place.stream(a_call(), PROMPT)
        next(stream)
        stream.close()
    assert closed == [1]
    assert pieces(runner, PROMPT)


def test_a_failing_generator_is_the_models_failure():
    def predict(prompt):
        yield "a"
        raise ValueError("broken")

    runner = Runner(predict, inputs=ASK, outputs=TEXT)
    with pytest.raises(InferenceError, match="ValueError: broken"):
        pieces(runner, PROMPT)
    with pytest.raises(InferenceError, match="ValueError: broken"):
        run(runner, PROMPT)


@pytest.mark.slow
def test_the_models_cleanup_waits_for_the_step_that_runs():
    inside, order = threading.Event(), []

    def predict(prompt):
        if prompt == "slow":
            inside.set()
            time.sleep(0.3)
            order.append("step")
            return "a"

        def stream():
            try:
                yield "a"
                yield "b"
            finally:
                order.append("cleanup")

        return stream()

    runner = Runner(predict, inputs=ASK, outputs=TEXT)

    def reader():
        with runner.admit() as place:
            answer = place.stream(a_call(), PROMPT)
            next(answer)
            assert inside.wait(5)
            answer.close()

    def other():
        time.sleep(0.1)
        run(runner, Inputs({"prompt": "slow"}, 1))

    assert in_threads(lambda i: (reader, other)[i](), 2) == [None, None]
    assert order == ["step", "cleanup"]


def test_a_stream_whose_caller_has_gone_never_reaches_the_model():
    ran = []

    def predict(prompt):
        ran.append(1)
        yield "a"

    runner = Runner(predict, inputs=ASK, outputs=TEXT)
    with pytest.raises(Cancelled):
        pieces(runner, PROMPT, a_call(cancelled=lambda: True))
    assert not ran


def test_a_stream_ends_when_its_caller_goes():
    gone, closed = threading.Event(), []

    def predict(prompt):
        try:
            while True:
                yield "a"
        finally:
            closed.append(1)

    runner = Runner(predict, inputs=ASK, outputs=TEXT)
    with runner.admit() as place:
        answer = place.stream(a_call(cancelled=gone.is_set), PROMPT)
        next(answer)
        gone.set()
        with pytest.raises(Cancelled):
            next(answer)
    assert closed == [1]
    assert runner.ongoing == 0
