import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve.errors import ConfigError
from ztserve.types import DATATYPES, Elements, TensorSpec

FLOATS = ("FP16", "BF16", "FP32", "FP64")


def bits(datatype, *values):
    """The elements `values` as `datatype` holds them."""
    if datatype == "BF16":
        return (np.array(values, "<f4").view("<u4") >> 16).astype("<u2")
    return np.array(values, DATATYPES[datatype])


@pytest.mark.parametrize("datatype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 17, 99])
def test_one_element_that_is_not_finite_is_found_wherever_it_is(datatype, value, at):
    flat = bits(datatype, *[0.0] * 100)
    flat[at] = bits(datatype, value)[0]
    what = "NaN" if math.isnan(value) else "out of range"
    with pytest.raises(ValueError, match=f"^element {at} is {what}; expected finite$"):
        Elements(TensorSpec("x", datatype, (-1,))).check(flat)


@pytest.mark.parametrize("datatype", FLOATS)
def test_the_greatest_finite_numbers_pass(datatype):
    greatest = {"FP16": 65504.0, "BF16": 3.3895313892515355e38}.get(datatype)
    if greatest is None:
        greatest = float(np.finfo(DATATYPES[datatype]).max)
    Elements(TensorSpec("x", datatype, (-1,))).check(
        bits(datatype, -greatest, greatest)
    )


@pytest.mark.parametrize("datatype", FLOATS)
def test_the_element_nearest_to_a_bound_lies_within_it(datatype):
    spec = TensorSpec("x", datatype, (-1,), low=-0.1, high=0.1)
    near = np.float32(0.1).view("u4") + 0x8000 & 0xFFFF0000
    top = near.view("f4") if datatype == "BF16" else 0.1
    Elements(spec).check(bits(datatype, -top, 0.0, top))


def test_bounds_are_inclusive_and_named():
    check = Elements(TensorSpec("x", "FP32", (-1,), low=0, high=16)).check
    check(bits("FP32", 0, 16))
    with pytest.raises(
        ValueError, match=r"^element 1 is out of range; expected 0 to 16$"
    ):
        check(bits("FP32", 0, 16.001))
    with pytest.raises(
        ValueError, match=r"^element 0 is out of range; expected 0 to 16$"
    ):
        check(bits("FP32", -1e-30, 1))


def test_whole_numbers_are_compared_exactly():
    check = Elements(TensorSpec("x", "INT64", (-1,), high=2**53)).check
    check(bits("INT64", 2**53))
    with pytest.raises(ValueError, match="out of range"):
        check(bits("INT64", 2**53 + 1))


def test_whole_numbers_without_bounds_are_all_welcome():
    for datatype in ("UINT8", "INT8", "UINT64", "INT64", "INT16"):
        info = np.iinfo(DATATYPES[datatype])
        Elements(TensorSpec("x", datatype, (-1,))).check(
            bits(datatype, info.min, info.max)
        )


def test_a_bool_is_the_byte_0_or_1():
    check = Elements(TensorSpec("x", "BOOL", (-1,))).check
    check(np.array([0, 1], "u1").view(bool))
    with pytest.raises(
        ValueError, match=r"^element 1 is out of range; expected 0 to 1$"
    ):
        check(np.array([0, 2], "u1").view(bool))


@pytest.mark.parametrize(
    ("datatype", "low", "high"),
    [("FP16", None, 1e6), ("FP32", -1e39, None), ("FP64", math.nan, None)],
)
def test_a_bound_that_the_datatype_cannot_hold_is_refused(datatype, low, high):
    with pytest.raises(ConfigError, match=f"TensorSpec 'x': bound .* {datatype}"):
        Elements(TensorSpec("x", datatype, (-1,), low=low, high=high))


def test_nothing_is_all_right():
    Elements(TensorSpec("x", "FP32", (-1,), low=0)).check(bits("FP32"))


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1), st.floats(-5, 0), st.floats(0, 5))
def test_it_says_what_asking_each_element_says(values, low, high):
    flat = np.array(values, "<f4")
    low, high = float(np.float32(low)), float(np.float32(high))
    held = all(low <= value <= high for value in flat.tolist())
    spec = TensorSpec("x", "FP32", (-1,), low=low, high=high)
    if held:
        Elements(spec).check(flat)
        return
    first = next(i for i, v in enumerate(flat.tolist()) if not low <= v <= high)
    with pytest.raises(ValueError, match=f"^element {first} is "):
        Elements(spec).check(flat)


@settings(deadline=None)
@given(st.binary(min_size=2, max_size=64))
def test_bf16_is_judged_as_the_float32_it_is_the_upper_half_of(raw):
    flat = np.frombuffer(raw[: len(raw) // 2 * 2], "<u2")
    wide = [struct.unpack("<f", b"\0\0" + half.tobytes())[0] for half in flat]
    try:
        Elements(TensorSpec("x", "BF16", (-1,))).check(flat)
        assert all(map(math.isfinite, wide))
    except ValueError:
        assert not all(map(math.isfinite, wide))
