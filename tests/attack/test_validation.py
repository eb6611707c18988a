"""Inputs made to get past what a model declared.

Each test first shows the attack at work where the control is not, on the way that a
server without it would go.
"""

import json
import math
import tracemalloc

import numpy as np
import pytest

from ztserve.errors import CallError, InvalidInput
from ztserve.types import Request, Tensor, TensorSpec, TextSpec
from ztserve.validation import Validator

PIXELS = TensorSpec("pixels", "FP32", (-1, 4), low=0, high=16)
FREE = TensorSpec("free", "FP32", (-1, -1, -1))
FLAGS = TensorSpec("flags", "BOOL", (-1,))
PROMPT = TextSpec("prompt", max_chars=100)


def check(spec, *tensors, **limits):
    limits = {"max_rows": 16, "max_bytes": 4096} | limits
    validator = Validator((spec,), model="m", **limits)
    return validator.check(Request(model="m", version="", id="", inputs=tensors))


def refused(spec, *tensors, **limits):
    with pytest.raises(InvalidInput) as caught:
        check(spec, *tensors, **limits)
    return caught.value.public


def floats(*values, name="pixels"):
    shape = (len(values) // 4, 4)
    return Tensor(name, "FP32", shape, np.array(values, "<f4").tobytes())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("at", range(8))
def test_one_poisoned_element_spoils_a_batch_for_all_others(poison, at):
    values = [1.0] * 8
    values[at] = poison
    # Without: JSON and numpy both take it, and one row's NaN is everybody's mean.
    taken = np.array(json.loads(json.dumps(values)), "<f4")
    assert not abs(taken.mean()) < 16
    what = "NaN" if math.isnan(poison) else "out of range"
    expected = f"input 'pixels': element {at} is {what}; expected 0 to 16"
    assert refused(PIXELS, floats(*values)) == expected


def test_a_signalling_nan_is_no_way_around():
    raw = np.array([0x7F800001, 0, 0, 0], "<u4").tobytes()
    assert math.isnan(np.frombuffer(raw, "<f4")[0])
    public = refused(PIXELS, Tensor("pixels", "FP32", (1, 4), raw))
    assert public == "input 'pixels': element 0 is NaN; expected 0 to 16"


def test_a_shape_whose_product_overflows_to_nothing():
    shape = (2**32, 2**32, 2)
    # Without: 64-bit arithmetic makes it zero elements, which is what was sent.
    with np.errstate(over="ignore"):
        assert int(np.prod(np.array(shape, "i8"))) == 0 == len(b"")
    public = refused(FREE, Tensor("free", "FP32", shape, b""))
    assert public.startswith(f"input 'free': expected {4 * 2**65} bytes for shape")


def test_two_negative_sizes_that_multiply_to_what_was_sent():
    shape = (-1, -2, 2)
    assert math.prod(shape) * 4 == 16
    public = refused(FREE, Tensor("free", "FP32", shape, b"\0" * 16))
    assert public == "input 'free': expected shape [-1, -1, -1], got [-1, -2, 2]"


def test_a_claim_of_terabytes_costs_nothing():
    shape = (1, 2**20, 2**20)
    # Without: the buffer is made as large as was claimed, before a byte is there.
    with pytest.raises(MemoryError):
        np.empty((2**20, 2**20, 2**20), "<f4")
    tracemalloc.start()
    try:
        public = refused(FREE, Tensor("free", "FP32", shape, b"\0" * 64))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert public.startswith("input 'free': expected 4398046511104 bytes for shape")
    assert peak < 64 * 1024


@pytest.mark.parametrize("sent", [0, 4, 28, 36, 64])
def test_a_shape_that_claims_other_peoples_bytes(sent):
    # Without: a pooled buffer is read as far as the shape says, into the next request
    # (Triton issue 7171).
    pool = bytearray(b"\1" * 32 + b"SECRET OF THE CALLER WHO IS NEXT")
    assert b"SECRET" in bytes(memoryview(pool)[:64])
    tensor = Tensor("pixels", "FP32", (2, 4), memoryview(pool)[:sent])
    public = refused(PIXELS, tensor)
    assert public == f"input 'pixels': expected 32 bytes for shape [2, 4], got {sent}"


def test_a_name_given_twice_so_that_two_readers_see_two_inputs():
    good, bad = floats(1, 1, 1, 1), floats(9, 9, 9, 9)
    by_name = {tensor.name: tensor for tensor in (good, bad)}
    # Without: whoever looks first sees one, whoever takes by name the other.
    assert by_name["pixels"] is bad
    assert next(t for t in (good, bad) if t.name == "pixels") is good
    assert refused(PIXELS, good, bad) == "input 'pixels': expected once, got 2 times"


def test_an_undeclared_input_that_predict_might_take_as_an_argument():
    def predict(pixels, temperature=0.0):
        return temperature

    tensors = (floats(1, 1, 1, 1), floats(9, 9, 9, 9, name="temperature"))
    # Without: whatever is sent becomes an argument.
    assert predict(**{t.name: t for t in tensors}) is tensors[1]
    public = refused(PIXELS, *tensors)
    assert public == "unknown input 'temperature'; expected 'pixels'"


def test_a_bool_that_is_neither_true_nor_false():
    raw = np.frombuffer(b"\1\2", bool)
    # Without: two values that are both true and yet differ.
    assert all(raw)
    assert raw.view("u1")[0] != raw.view("u1")[1]
    public = refused(FLAGS, Tensor("flags", "BOOL", (2,), b"\1\2"))
    assert public == "input 'flags': element 1 is out of range; expected 0 to 1"


@pytest.mark.parametrize(
    ("raw", "hidden"),
    [
        (b"ignore\xc0\x80the rest", "\ufffd"),
        (b"\xed\xa0\x80", "\ufffd"),
        (b"a\0b", "\0"),
        (b"\x1b[2Jyou are root", "\x1b"),
    ],
)
def test_text_that_means_another_thing_to_the_next_reader(raw, hidden):
    # Without: a lenient decoder lets it through, changed or as it is.
    assert hidden in raw.decode("utf-8", "replace")
    public = refused(PROMPT, Tensor("prompt", "BYTES", (1,), (raw,)))
    assert "expected" in public
    assert hidden not in public


def test_rows_and_bytes_beyond_the_limits():
    big = np.ones((17, 4), "<f4")
    assert check(PIXELS, floats(*big.ravel()), max_rows=17).rows == 17
    public = refused(PIXELS, floats(*big.ravel()))
    assert public == "input 'pixels': expected at most 16 rows, got 17"
    public = refused(PIXELS, floats(*big.ravel()), max_bytes=271)
    assert public == "inputs: expected at most 271 bytes in all, got 272"


def test_no_refusal_repeats_what_was_sent():
    secret = "bob@example.com"
    value = np.array([777.25] * 4, "<f4")
    attempts = [
        Tensor(secret, "FP32", (1, 4), value.tobytes()),
        Tensor("pixels", secret, (1, 4), value.tobytes()),
        Tensor("pixels", "FP32", (1, 4), value.tobytes()),
        Tensor("pixels", "BYTES", (1,), (secret.encode(),)),
    ]
    for tensor in attempts:
        public = refused(PIXELS, tensor)
        assert secret not in public
        assert "777" not in public


def test_a_refusal_is_always_a_call_error():
    # Without: the exceptions of numpy are as many as the ways to send nonsense.
    with pytest.raises(ValueError, match="buffer size must be a multiple"):
        np.frombuffer(b"abc", "<f4")
    for data in (b"", b"abc", (b"abc",), memoryview(b"abcd")[::-1]):
        with pytest.raises(CallError):
            check(PIXELS, Tensor("pixels", "FP32", (1, 4), data))
