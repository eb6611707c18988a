import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve.errors import ConfigError, InvalidInput, NotFound
from ztserve.types import DATATYPES, Request, Tensor, TensorSpec, TextSpec
from ztserve.validation import Validator

PIXELS = TensorSpec("pixels", "FP32", (-1, 4), low=0, high=16)
MASK = TensorSpec("mask", "BOOL", (-1,))
NOTE = TextSpec("note", max_chars=8)


def validator(*specs, max_rows=8, max_bytes=1024):
    return Validator(specs, model="digits", max_rows=max_rows, max_bytes=max_bytes)


def request(*tensors, model="digits"):
    return Request(model=model, version="", id="", inputs=tensors)


def pixels(rows=2, name="pixels"):
    return Tensor(name, "FP32", (rows, 4), np.ones((rows, 4), "<f4").tobytes())


def mask(rows=2):
    return Tensor("mask", "BOOL", (rows,), b"\1" * rows)


def note(text=b"hi"):
    return Tensor("note", "BYTES", (1,), (text,))


def refused(check, *tensors):
    with pytest.raises(InvalidInput) as caught:
        check.check(request(*tensors))
    return caught.value.public


def test_inputs_come_by_name_in_any_order():
    check = validator(PIXELS, MASK, NOTE)
    inputs = check.check(request(note(), mask(), pixels()))
    assert list(inputs.values) == ["pixels", "mask", "note"]
    assert inputs.values["note"] == "hi"
    assert inputs.values["mask"].tolist() == [True, True]
    assert inputs.rows == 2


def test_text_alone_is_one_row():
    assert validator(NOTE).check(request(note())).rows == 1


def test_another_model_is_not_found():
    with pytest.raises(NotFound) as caught:
        validator(PIXELS).check(request(pixels(), model="secret-model"))
    assert caught.value.public == "there is no such model here; expected 'digits'"


def test_a_missing_input_is_named():
    public = refused(validator(PIXELS, MASK), pixels())
    assert public == "missing input 'mask'; expected 'pixels', 'mask'"


def test_an_unknown_input_is_named():
    public = refused(validator(PIXELS), pixels(), pixels(name="pixles"))
    assert public == "unknown input 'pixles'; expected 'pixels'"


def test_a_name_that_is_none_is_not_repeated():
    public = refused(validator(PIXELS), pixels(name="<script>bob@example.com"))
    assert public == "unknown input (not an identifier); expected 'pixels'"


def test_an_input_given_twice_is_refused():
    public = refused(validator(PIXELS), pixels(), pixels())
    assert public == "input 'pixels': expected once, got 2 times"


def test_no_input_at_all_is_refused():
    assert refused(validator(PIXELS)) == "missing input 'pixels'; expected 'pixels'"


def test_the_batch_axis_is_common():
    public = refused(validator(PIXELS, MASK), pixels(2), mask(3))
    expected = "expected 2 rows, as many as input 'pixels', got 3"
    assert public == f"input 'mask': {expected}"


def test_rows_are_bounded():
    check = validator(PIXELS, max_rows=2)
    assert check.check(request(pixels(2))).rows == 2
    public = refused(check, pixels(3))
    assert public == "input 'pixels': expected at most 2 rows, got 3"


def test_bytes_are_bounded_in_all():
    check = validator(PIXELS, NOTE, max_bytes=33)
    check.check(request(pixels(), note(b"a")))
    public = refused(check, pixels(), note(b"ab"))
    assert public == "inputs: expected at most 33 bytes in all, got 34"


@pytest.mark.parametrize("specs", [(), (PIXELS, PIXELS)])
def test_declarations_are_at_least_one_and_by_distinct_names(specs):
    with pytest.raises(ConfigError, match="expected at least one, each name once"):
        validator(*specs)


@pytest.mark.parametrize("limits", [{"max_rows": 0}, {"max_bytes": 0}])
def test_no_limit_can_be_off(limits):
    with pytest.raises(ConfigError, match="must be positive"):
        validator(PIXELS, **limits)


names = st.sampled_from(["pixels", "mask", "note", "", "x"]) | st.text(max_size=5)
shapes = st.lists(st.integers(-3, 2**63) | st.integers(0, 5), max_size=4).map(tuple)
contents = (
    st.binary(max_size=80)
    | st.binary(max_size=80).map(memoryview)
    | st.lists(st.binary(max_size=12), max_size=3).map(tuple)
)
tensors = st.builds(
    Tensor, names, st.sampled_from([*DATATYPES, "BYTES"]) | st.text(), shapes, contents
)
near = st.builds(
    Tensor,
    st.just("pixels"),
    st.just("FP32"),
    st.tuples(st.integers(1, 3), st.just(4)),
    st.lists(st.floats(width=32), max_size=12).map(
        lambda values: np.array(values, "<f4").tobytes()
    ),
)


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(tensors | near | st.just(note()), max_size=4), st.data())
def test_whatever_comes_is_refused_or_is_what_was_declared(given, data):
    specs = data.draw(st.sampled_from([(PIXELS,), (NOTE,), (PIXELS, NOTE)]))
    model = data.draw(st.sampled_from(["digits"] * 5 + ["other"]))
    try:
        inputs = validator(*specs).check(request(*given, model=model))
    except (InvalidInput, NotFound):
        return
    assert model == "digits"
    assert list(inputs.values) == [spec.name for spec in specs]
    assert 1 <= inputs.rows <= 8
    for name, value in inputs.values.items():
        if name == "note":
            assert isinstance(value, str)
            assert len(value) <= 8
            continue
        assert value.dtype == np.dtype("<f4")
        assert value.shape == (inputs.rows, 4)
        assert value.flags.c_contiguous
        assert value.flags.aligned
        assert all(0 <= v <= 16 and math.isfinite(v) for v in value.ravel().tolist())
