"""One output, checked against its spec and made ready for the wire."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from ztserve.errors import Withheld
from ztserve.filtering.text import TextFilter
from ztserve.types import DATATYPES, Elements, Tensor, TensorSpec, TextSpec, Value

BROKEN = "the model's answer did not meet its declared contract"
"""What the caller is told: the details are the deployment's own business."""


def broken(name: str, what: str) -> Withheld:
    """Return the refusal of output `name`; only the audit learns `what`."""
    return Withheld(BROKEN, f"output {name!r}: {what}")


class TensorRelease:
    """The checks of one declared tensor, made ready once."""

    def __init__(self, spec: TensorSpec) -> None:
        self.name = spec.name
        self._spec = spec
        self._dtype = DATATYPES[spec.datatype]
        self._elements = Elements(spec)

    def release(self, value: Value, max_bytes: int) -> Tensor:
        """Return `value` as it may leave: little-endian, C-contiguous, a copy.

        The copy is what is checked, so that what is checked is what leaves. Raises
        Withheld where it is not what its spec says or exceeds `max_bytes`.
        """
        # Subclasses may see their elements otherwise: a masked array hides its NaN.
        if type(value) is not np.ndarray:
            raise self._refusal("an array", type(value).__name__)
        if value.dtype != self._dtype:
            raise self._refusal(f"dtype {self._dtype}", str(value.dtype))
        if not _fits(value.shape, self._spec.shape):
            shape = str(list(value.shape))
            raise self._refusal(f"shape {list(self._spec.shape)}", shape)
        if value.nbytes > max_bytes:
            raise self._refusal(f"at most {max_bytes} bytes", str(value.nbytes))
        data = value.tobytes()
        if data:
            try:
                self._elements.check(np.frombuffer(data, self._dtype))
            except ValueError as error:
                raise broken(self.name, str(error)) from None
        return Tensor(self.name, self._spec.datatype, value.shape, data)

    def _refusal(self, expected: str, got: str) -> Withheld:
        return broken(self.name, f"expected {expected}, got {got}")


class TextRelease:
    """The checks of one declared text."""

    def __init__(self, spec: TextSpec, rules: TextFilter) -> None:
        self.name = spec.name
        self.rules = rules
        self._max_chars = spec.max_chars

    def read(self, value: Value, used_chars: int = 0) -> str:
        """Return `value`, the model's text or the next piece of it, not yet filtered.

        `used_chars` is what the earlier pieces had. Raises Withheld where it is no str
        or the text is longer than its spec allows.
        """
        if type(value) is not str:
            got = type(value).__name__
            raise broken(self.name, f"expected a str, got {got}")
        if used_chars + len(value) > self._max_chars:
            raise broken(self.name, f"expected at most {self._max_chars} characters")
        return value

    def tensor(self, filtered: str, max_bytes: int) -> Tensor:
        """Return a `filtered` text as it may leave; raises Withheld."""
        try:
            data = filtered.encode("utf-8")
        except UnicodeEncodeError as error:
            raise broken(self.name, f"character {error.start} is no Unicode") from None
        if len(data) > max_bytes:
            got = len(data)
            raise broken(self.name, f"expected at most {max_bytes} bytes, got {got}")
        return Tensor(self.name, "BYTES", (1,), (data,))


Plan: TypeAlias = Mapping[str, TensorRelease | TextRelease]
"""The checks of all declared outputs, by name and in order."""


def size(tensor: Tensor) -> int:
    """Return how many bytes of contents leave with `tensor`."""
    data = tensor.data
    return sum(map(len, data)) if isinstance(data, tuple) else len(data)


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    # A free dimension may be empty here: nothing found is an answer.
    if len(shape) != len(declared):
        return False
    for size, wanted in zip(shape, declared, strict=True):
        if wanted not in (size, -1):
            return False
    return True
