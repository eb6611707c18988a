"""What a deployment declares."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from ztserve.errors import ConfigError
from ztserve.types.calls import Array

DATATYPES: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        "BOOL": np.dtype("bool"),
        "UINT8": np.dtype("u1"),
        "UINT16": np.dtype("<u2"),
        "UINT32": np.dtype("<u4"),
        "UINT64": np.dtype("<u8"),
        "INT8": np.dtype("i1"),
        "INT16": np.dtype("<i2"),
        "INT32": np.dtype("<i4"),
        "INT64": np.dtype("<i8"),
        "FP16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),
        "FP32": np.dtype("<f4"),
        "FP64": np.dtype("<f8"),
    }
)
"""Open Inference Protocol datatypes of tensors, as numpy holds them."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")


def _require(fact: object, message: str) -> None:
    if not fact:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a deployment takes or gives.

    `shape` has the batch axis first; -1 is a free dimension. `low` and `high` bound
    every element, inclusively; floating-point elements must always be finite.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        here = f"TensorSpec {self.name!r}: "
        _require(_NAME.match(self.name), here + "the name must be an identifier")
        _require(
            self.datatype in DATATYPES,
            here + f"datatype {self.datatype!r} is none of {', '.join(DATATYPES)}; a "
            "text is a TextSpec",
        )
        _require(self.shape, here + "the shape needs at least the batch axis")
        _require(
            all(type(n) is int and (n == -1 or n > 0) for n in self.shape),
            here + f"shape {self.shape!r} may hold -1 (free) or positive sizes",
        )
        _require(len(self.shape) <= 16, here + "a shape has at most 16 dimensions")
        if self.low is not None and self.high is not None:
            _require(self.low <= self.high, here + "low is above high")


_GREATEST = {
    "FP16": 65504.0,
    "BF16": 2.0**128 - 2.0**120,
    "FP32": 2.0**128 - 2.0**104,
    "FP64": sys.float_info.max,
}
_least, _most = np.minimum.reduce, np.maximum.reduce


def _nearest(bound: float, datatype: str) -> float:
    if datatype == "BF16":  # the upper half of a float32, rounded to even
        bits = np.array([bound], "<f4").view("<u4")
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(bits.view("<f4")[0])
    return float(DATATYPES[datatype].type(bound)) if datatype in _GREATEST else bound


class Elements:
    """The check of every element of a tensor: finite, and within its spec's bounds.

    NaN propagates to the least and the greatest element, and an infinity lies beyond
    the datatype's greatest number, so these two tell all. A bound is rounded to the
    tensor's precision; ConfigError where the datatype cannot hold it.
    """

    def __init__(self, spec: TensorSpec) -> None:
        most = _GREATEST.get(spec.datatype, math.inf)
        self._bf16, self._bool = spec.datatype == "BF16", spec.datatype == "BOOL"
        bounds = [0.0, 1.0] if self._bool else [-most, most]
        for at, bound in enumerate((spec.low, spec.high)):
            if bound is not None:
                here = f"TensorSpec {spec.name!r}: bound {bound!r} "
                _require(abs(bound) <= most, here + f"is beyond {spec.datatype}")
                bounds[at] = _nearest(bound, spec.datatype)
        self._low, self._high = bounds
        self._free = bounds == [-math.inf, math.inf]
        bounded = spec.low is not None or spec.high is not None or self._bool
        self._expected = f"{bounds[0]:g} to {bounds[1]:g}" if bounded else "finite"

    def check(self, flat: Array) -> None:
        """Raise ValueError at the first element of 1-D `flat` that does not hold."""
        if self._free or not flat.size:
            return
        seen: Any = flat
        if self._bf16:
            seen = (seen.astype("<u4") << 16).view("<f4")
        elif self._bool:
            seen = seen.view("u1")
        if not (self._low <= _least(seen).item() and _most(seen).item() <= self._high):
            bad = int(np.argmin((seen >= self._low) & (seen <= self._high)))
            what = "NaN" if math.isnan(seen[bad]) else "out of range"
            raise ValueError(f"element {bad} is {what}; expected {self._expected}")


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A text that a deployment takes or gives (``BYTES`` of shape [1], UTF-8).

    As an output it passes the PII filter.
    """

    name: str
    max_chars: int = 8192

    def __post_init__(self) -> None:
        here = f"TextSpec {self.name!r}: "
        _require(_NAME.match(self.name), here + "the name must be an identifier")
        _require(self.max_chars > 0, here + "max_chars must be positive")


Spec: TypeAlias = TensorSpec | TextSpec


@dataclass(frozen=True, slots=True)
class Batch:
    """Join calls on axis 0 after validation, split them again before filtering."""

    max_size: int
    """Most rows in one call of `predict`."""
    wait_ms: float = 0.0
    """Longest wait for calls that have already been admitted."""

    def __post_init__(self) -> None:
        _require(self.max_size >= 1, "Batch: max_size must be at least 1")
        _require(0 <= self.wait_ms <= 1000, "Batch: wait_ms must lie in 0..1000")


@dataclass(frozen=True, slots=True)
class Description:
    """What a deployment tells of itself to those who may ask."""

    model: str
    version: str
    digest: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    ready: bool = True
