"""A caller's arrays and texts <-> messages of the Open Inference Protocol.

The client's half of the codec. What comes back from a server is checked as strictly
as what goes in: a verified server may still be broken.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from ztserve.errors import InvalidInput, ZTServeError
from ztserve.transport import codec
from ztserve.transport.v1 import inference_pb2 as pb
from ztserve.types import DATATYPES, Array, Request, Tensor, Value

Given: TypeAlias = Array | str | bytes | float | Sequence[object]
"""What a caller may give: an array, a text, or (nested) lists of numbers or texts."""

_NAMES: Mapping[np.dtype[np.generic], str] = MappingProxyType(
    {dtype: name for name, dtype in DATATYPES.items() if name != "BF16"}
)
_OF_LISTS = {"b": "BOOL", "i": "INT64", "u": "UINT64", "f": "FP32"}
"""Datatype of a Python list, by numpy's kind of it, where none is declared."""


def request(
    inputs: Mapping[str, Given],
    *,
    model: str = "",
    version: str = "",
    id: str = "",
    datatypes: Mapping[str, str] = MappingProxyType({}),
) -> Request:
    """Return the Request of `inputs`.

    The datatype of an array is its own; `datatypes` overrides it by name, and is the
    only way to BF16 (held in uint16). Lists of floats become FP32, of integers INT64.
    Raises InvalidInput, naming the input, for what no datatype can hold.
    """
    tensors = tuple(
        tensor(name, value, datatypes.get(name)) for name, value in inputs.items()
    )
    return Request(model, version, id, tensors)


def tensor(name: str, value: Given, datatype: str | None = None) -> Tensor:
    """Return `value` as a tensor of `datatype`, or of its own where None."""
    if isinstance(value, str | bytes):
        return Tensor(name, "BYTES", (1,), (_bytes(value),))
    try:
        array: Array = np.asarray(value)
    except ValueError as error:
        raise InvalidInput(
            f"input {name!r}: nested lists must have equal lengths"
        ) from error
    if array.dtype.kind in "OSU" or datatype == "BYTES":
        strings = tuple([_bytes(one, name) for one in array.ravel().tolist()])
        return Tensor(name, "BYTES", array.shape, strings)
    if datatype is None:
        datatype = _datatype(name, value, array)
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        raise InvalidInput(
            f"input {name!r}: datatype {datatype!r} is none of {', '.join(DATATYPES)}"
        )
    data = np.ascontiguousarray(array, dtype=dtype).tobytes()
    return Tensor(name, datatype, array.shape, data)


def message(request: Request) -> bytes:
    """Return `request` as a ModelInferRequest; its tensors travel raw."""
    m = pb.ModelInferRequest(
        model_name=request.model, model_version=request.version, id=request.id
    )
    for one in request.inputs:
        m.inputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
    for name in request.outputs:
        m.outputs.add(name=name)
    contents = (codec.raw(one.data) for one in request.inputs)
    return codec.with_raw(m, m.RAW_INPUT_CONTENTS_FIELD_NUMBER, contents)


def tensors(m: pb.ModelInferResponse) -> tuple[Tensor, ...]:
    """Return the outputs of an answer. Raises ZTServeError where it is malformed."""
    outputs, raws = m.outputs[:], m.raw_output_contents[:]
    if len(outputs) != len(raws):
        raise _malformed(f"{len(raws)} raw contents for {len(outputs)} outputs")
    return tuple([_output(t, raws[i]) for i, t in enumerate(outputs)])


def values(outputs: Iterable[Tensor]) -> dict[str, Value]:
    """Return outputs by name: a text for BYTES of shape [1], else a read-only array.

    Other BYTES become an array of `bytes` objects; BF16 is held as its bits in uint16.
    """
    return {one.name: _value(one) for one in outputs}


def example(declared: Iterable[tuple[str, str, Sequence[int]]]) -> dict[str, Value]:
    """Return an input of zeros for each (name, datatype, shape); free sizes are 1."""
    return {
        name: "hello"
        if datatype == "BYTES"
        else np.zeros([max(n, 1) for n in shape], DATATYPES[datatype])
        for name, datatype, shape in declared
    }


def _output(t: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> Tensor:
    name, datatype, shape = t.name, t.datatype, tuple(t.shape[:])
    count = math.prod(shape)
    if any(n < 0 for n in shape) or len(shape) > codec.MAX_DIMENSIONS:
        raise _malformed(f"output {name!r:.200} has the shape {shape}")
    if datatype == "BYTES":
        data = codec.strings(raw, f"output {name!r:.200}")
        if len(data) != count:
            raise _malformed(f"output {name!r:.200}: {len(data)} strings for {shape}")
        return Tensor(name, datatype, shape, data)
    dtype = DATATYPES.get(datatype)
    if dtype is None or len(raw) != count * dtype.itemsize:
        raise _malformed(
            f"output {name!r:.200}: {len(raw)} bytes for {datatype:.32} of {shape}"
        )
    return Tensor(name, datatype, shape, raw)


def _value(t: Tensor) -> Value:
    if isinstance(t.data, tuple):
        if t.shape == (1,):
            return t.data[0].decode(errors="replace")
        array: Array = np.array(t.data, dtype=object)
        return array.reshape(t.shape)
    return np.frombuffer(t.data, DATATYPES[t.datatype]).reshape(t.shape)


def _datatype(name: str, value: Given, array: Array) -> str:
    if not isinstance(value, np.ndarray | np.generic):
        found = _OF_LISTS.get(array.dtype.kind)
    else:
        found = _NAMES.get(array.dtype.newbyteorder("<"))
    if found is None:
        raise InvalidInput(
            f"input {name!r}: {array.dtype} has no datatype in the protocol; convert "
            f"it to one of {', '.join(DATATYPES)}"
        )
    return found


def _bytes(value: object, name: str = "") -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    raise InvalidInput(
        f"input {name!r}: {type(value).__name__} in it is neither number nor text; "
        "nested lists must have equal lengths"
    )


def _malformed(what: str) -> ZTServeError:
    return ZTServeError(f"the server's answer is malformed: {what}")
