"""One tensor off the wire, checked against its spec."""

import math

import numpy as np

from ztserve.errors import InvalidInput
from ztserve.types import DATATYPES, Array, Elements, Tensor, TensorSpec


class TensorCheck:
    """The checks of one declared tensor, made ready once."""

    def __init__(self, spec: TensorSpec) -> None:
        self.name = spec.name
        self._spec = spec
        self._dtype = DATATYPES[spec.datatype]
        self._elements = Elements(spec)

    def read(self, tensor: Tensor) -> Array:
        """Return `tensor` as a C-contiguous, aligned array over the bytes of the wire.

        It is read-only where the bytes are, and a copy only where they lie askew.
        Raises InvalidInput, saying what was expected.
        """
        spec, shape, data = self._spec, tensor.shape, tensor.data
        if tensor.datatype != spec.datatype:
            raise self._refusal(_wanted(spec.datatype), _datatype(tensor.datatype))
        if not _fits(shape, spec.shape):
            free = " with 1 or more for -1" if 0 in shape else ""
            raise self._refusal(f"shape {list(spec.shape)}{free}", _shape(shape))
        if isinstance(data, tuple):
            raise self._refusal("raw contents", "strings of bytes")
        got = data.nbytes if isinstance(data, memoryview) else len(data)
        if got != math.prod(shape) * self._dtype.itemsize:
            size = math.prod(shape) * self._dtype.itemsize
            raise self._refusal(f"{size} bytes for shape {list(shape)}", str(got))
        if isinstance(data, memoryview) and not data.c_contiguous:
            data = data.tobytes()
        flat: Array = np.frombuffer(data, self._dtype)
        if not flat.flags.aligned:
            flat = flat.copy()
        try:
            self._elements.check(flat)
        except ValueError as error:
            raise InvalidInput(f"input {self.name!r}: {error}") from None
        return flat.reshape(shape)

    def _refusal(self, expected: str, got: str) -> InvalidInput:
        return InvalidInput(f"input {self.name!r}: expected {expected}, got {got}")


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    if len(shape) != len(declared):
        return False
    for size, wanted in zip(shape, declared, strict=True):
        if size < 1 or wanted not in (size, -1):
            return False
    return True


def _shape(shape: tuple[int, ...]) -> str:
    return str(list(shape)) if len(shape) <= 16 else f"{len(shape)} dimensions"


def _wanted(datatype: str) -> str:
    """Name the datatype, as the callers' numpy does too where it has it."""
    numpy = "" if datatype == "BF16" else f" (numpy.{DATATYPES[datatype].name})"
    return f"datatype {datatype}{numpy}"


def _datatype(name: str) -> str:
    return name if name in DATATYPES or name == "BYTES" else "an unknown one"
