import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from ztserve.artifacts.loading.header import DTYPES, parse_header
from ztserve.artifacts.statements.strict import Malformed


def test_the_layout_is_where_the_reference_writer_put_the_tensors():
    content = save({"a": torch.ones(2, 3), "b.c": torch.zeros(4, dtype=torch.int64)})
    layout = parse_header(memoryview(content))
    assert {n: (e.dtype, e.shape, e.end - e.start) for n, e in layout.items()} == {
        "a": ("F32", (2, 3), 24),
        "b.c": ("I64", (4,), 32),
    }
    extent = layout["a"]
    assert content[extent.start : extent.end] == struct.pack("<6f", *[1] * 6)


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_every_dtype_has_the_name_and_width_of_the_reference_writer(name, dtype):
    title, width = dtype
    content = save({"t": torch.zeros(4).to(getattr(torch, title))})
    extent = parse_header(memoryview(content))["t"]
    assert extent.dtype == name
    assert extent.end - extent.start == 4 * width


def test_scalars_empty_tensors_and_metadata_are_read():
    tensors = {"s": torch.tensor(1.0), "e": torch.empty(0, 3)}
    layout = parse_header(memoryview(save(tensors, {"format": "pt"})))
    assert {n: e.shape for n, e in layout.items()} == {"s": (), "e": (0, 3)}


@given(st.binary(max_size=80), st.integers(0, 80))
def test_any_bytes_either_parse_or_are_malformed(content, length):
    raw = struct.pack("<Q", length) + content
    try:
        parse_header(memoryview(raw))
    except Malformed:
        return
    load(raw)


@pytest.mark.slow
@given(st.data())
def test_what_we_take_from_a_damaged_file_the_reference_takes_too(data):
    content = bytearray(save({"a": torch.ones(2), "b": torch.ones(1)}))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    try:
        ours = parse_header(memoryview(content))
    except Malformed:
        return
    try:
        theirs = load(bytes(content))
    except SafetensorError as error:
        raise AssertionError(f"only we take {bytes(content)!r}") from error
    assert {n: e.shape for n, e in ours.items()} == {
        n: tuple(t.shape) for n, t in theirs.items()
    }


@pytest.mark.slow
def test_many_tensors_are_read_in_linear_time():
    entries = {
        f"layer.{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]}
        for n in range(1 << 14)
    }
    text = json.dumps(entries).encode()
    raw = struct.pack("<Q", len(text)) + text + bytes(1 << 14)
    assert len(parse_header(memoryview(raw))) == 1 << 14
