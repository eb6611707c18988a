"""The safetensors header, read with limits and without benefit of the doubt.

Format: 8 bytes little-endian header length, JSON, data (huggingface/safetensors).
Refused here though the reference parser takes it: tensor names twice, unknown fields,
names that are no plain ASCII, white space before the JSON, dimensions beyond any
memory, BOOL bytes other than 0 and 1, and more than `MAX_TENSORS` tensors (its time
grows faster than their number). NaN and infinity are the trainer's business.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ztserve.artifacts.statements.strict import (
    Malformed,
    Object,
    as_object,
    get,
    load_object,
    only,
)

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 16
MAX_RANK = 16
MAX_ELEMENTS = 1 << 48
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,256}\Z")

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""safetensors dtype to torch dtype (by name) and bytes an element."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one tensor lies in its file."""

    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""
    end: int

    def rows(self, start: int, stop: int) -> "Extent":
        """Return where the rows `start` to `stop` of the first dimension lie.

        Raises ValueError where it has no such rows.
        """
        count = self.shape[0] if self.shape else 0
        if not self.shape or not 0 <= start <= stop <= count:
            raise ValueError(
                f"rows {start} to {stop} of a tensor of shape {self.shape}: expected "
                f"0 <= start <= stop <= {count}"
            )
        row = (self.end - self.start) // count if count else 0
        begin = self.start + start * row
        shape = (stop - start, *self.shape[1:])
        return Extent(self.dtype, shape, begin, begin + (stop - start) * row)


Layout: TypeAlias = Mapping[str, Extent]
"""The tensors of one file by name, in the order of their bytes."""


def data_start(file: memoryview, size: int) -> int:
    """Return where the data begins in a file of `size` bytes; raises Malformed.

    `file`: at least its first 8 bytes, or all that it has.
    """
    if size < 8:
        raise Malformed(f"a file of {size} bytes has no header")
    length = int.from_bytes(file[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise Malformed(f"a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise Malformed(f"a header of {length} bytes in a file of {size}")
    return 8 + length


def parse_header(file: memoryview, size: int | None = None) -> Layout:
    """Parse the header of a file; raises Malformed.

    The tensors tile the data exactly: no gap, no overlap, nothing behind them. `file`
    is the whole file, whose BOOL values are looked at too; or, where `size` says that
    it is longer, as much of it as begins with the header: `check_values` is for later.
    """
    size = len(file) if size is None else size
    data = data_start(file, size)
    text = bytes(file[8:data]).rstrip(b" ")
    if not text.startswith(b"{") or not text.endswith(b"}"):
        raise Malformed("the header is not a JSON object padded with spaces")
    header = dict(load_object(text, limit=MAX_HEADER_BYTES))
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise Malformed(f"{len(header)} tensors; the limit is {MAX_TENSORS}")
    extents = [(name, _extent(name, node, data)) for name, node in header.items()]
    extents.sort(key=lambda item: (item[1].start, item[1].end))
    _check_tiling(extents, data, size)
    if len(file) == size:
        for name, extent in extents:
            check_values(name, extent, file[extent.start : extent.end])
    return dict(extents)


def _check_tiling(extents: list[tuple[str, Extent]], data: int, size: int) -> None:
    position = data
    for name, extent in extents:
        if extent.start != position:
            raise Malformed(f"tensor {name!r} does not begin where the last one ends")
        position = extent.end
    if position != size:
        raise Malformed(f"the tensors end at byte {position} of {size}")


def _check_metadata(node: object) -> None:
    for value in as_object(node, "__metadata__").values():
        if type(value) is not str:
            raise Malformed("__metadata__ holds something else than texts")


def _extent(name: str, node: object, data: int) -> Extent:
    if not _NAME.match(name) or ".." in name.split("/"):
        raise Malformed(f"the tensor name {name!r} is not plain")
    tensor: Object = as_object(node, f"tensor {name!r}")
    only(tensor, ("dtype", "shape", "data_offsets"), f"tensor {name!r}")
    dtype = get(tensor, "dtype", str)
    if dtype not in DTYPES:
        raise Malformed(f"tensor {name!r} has the unknown dtype {dtype!r}")
    shape = _naturals(name, tensor, "shape")
    if len(shape) > MAX_RANK or math.prod(n or 1 for n in shape) > MAX_ELEMENTS:
        raise Malformed(f"tensor {name!r} has an impossible shape")
    offsets = _naturals(name, tensor, "data_offsets")
    if len(offsets) != 2:
        raise Malformed(f"tensor {name!r} has {len(offsets)} data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype][1]:
        raise Malformed(f"tensor {name!r}: its bytes do not match its shape and dtype")
    return Extent(dtype, shape, data + begin, data + end)


def _naturals(name: str, tensor: Object, key: str) -> tuple[int, ...]:
    values = get(tensor, key, list)
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in values):
        raise Malformed(f"tensor {name!r}: {key} holds something else than sizes")
    return tuple(values)


def check_values(name: str, extent: Extent, content: memoryview) -> None:
    """Raise Malformed where a tensor's bytes, or some rows of them, are no values."""
    if extent.dtype != "BOOL" or not content:
        return
    if np.frombuffer(content, np.uint8).max() > 1:
        raise Malformed(f"tensor {name!r} is BOOL but holds other bytes than 0, 1")
