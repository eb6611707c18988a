"""Messages of the Open Inference Protocol <-> the values between rooms.

Nothing here judges a tensor: that is validation's part. What is refused is what has
no meaning at all: two kinds of contents at once, a field of another datatype, a
number outside of its datatype, broken length prefixes. Each refusal names the tensor.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from ztserve.errors import InvalidInput
from ztserve.transport.v1 import inference_pb2 as pb
from ztserve.types import (
    DATATYPES,
    Description,
    Reply,
    Request,
    Spec,
    Tensor,
    TextSpec,
)

MAX_TENSORS = 256
MAX_DIMENSIONS = 16
MAX_STRINGS = 65_536
"""Elements of one BYTES tensor."""
MAX_NAME = 256
"""Longest name, id or version in a request, in characters."""

# The field of InferTensorContents that holds each datatype; FP16 and BF16 have none.
_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool_contents",
        "INT8": "int_contents",
        "INT16": "int_contents",
        "INT32": "int_contents",
        "INT64": "int64_contents",
        "UINT8": "uint_contents",
        "UINT16": "uint_contents",
        "UINT32": "uint_contents",
        "UINT64": "uint64_contents",
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
        "BYTES": "bytes_contents",
    }
)
_NARROW: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "INT8": (-(1 << 7), (1 << 7) - 1),
        "INT16": (-(1 << 15), (1 << 15) - 1),
        "UINT8": (0, (1 << 8) - 1),
        "UINT16": (0, (1 << 16) - 1),
    }
)
"""Datatypes that travel in a wider field, with their least and greatest number."""
_LENGTH = struct.Struct("<I")
_RAW_OUTPUT_CONTENTS = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_INFER_RESPONSE = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER

Contents: TypeAlias = bytes | tuple[bytes, ...]


M = TypeVar("M", bound=Message)


def parse(kind: type[M], message: bytes) -> M:
    """Return `message` as a protobuf message of `kind`, or raise InvalidInput."""
    try:
        return kind.FromString(message)
    except DecodeError:
        raise InvalidInput(
            f"the message is not a valid {kind.__name__}: see the Open Inference "
            "Protocol, version 2"
        ) from None


# --- request --------------------------------------------------------------------


def request(message: bytes) -> Request:
    """Return one ModelInferRequest as a Request, or raise InvalidInput."""
    m = parse(pb.ModelInferRequest, message)
    # Counted first: millions of empty tensors fit into a message of a few MiB, and
    # making Python objects of them would hold the interpreter for seconds.
    if max(len(m.inputs), len(m.outputs), len(m.raw_input_contents)) > MAX_TENSORS:
        raise InvalidInput(f"the request has more than {MAX_TENSORS} tensors")
    # Slices: iterating over a repeated field is several times slower.
    inputs, raws = m.inputs[:], m.raw_input_contents[:]
    outputs = tuple([output.name for output in m.outputs[:]]) if m.outputs else ()
    name, version, own_id = m.model_name, m.model_version, m.id
    if len(name) > MAX_NAME or len(version) > MAX_NAME or len(own_id) > MAX_NAME:
        raise InvalidInput(
            f"model_name, model_version and id have at most {MAX_NAME} characters"
        )
    if not raws:
        tensors = tuple([_tensor(t, None) for t in inputs])
    elif len(raws) == len(inputs):
        tensors = tuple([_tensor(t, raws[i]) for i, t in enumerate(inputs)])
    else:
        raise InvalidInput(
            f"raw_input_contents has {len(raws)} entries for {len(inputs)} inputs: "
            "give one for each input, in the same order, or none"
        )
    return Request(name, version, own_id, tensors, outputs, len(message))


def _tensor(t: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    name, datatype, shape = t.name, t.datatype, tuple(t.shape[:])
    if len(shape) > MAX_DIMENSIONS or len(name) > MAX_NAME:
        raise InvalidInput(
            f"input {name[:MAX_NAME]!r}: at most {MAX_DIMENSIONS} dimensions and "
            f"{MAX_NAME} characters of name"
        )
    if raw is None:
        return Tensor(name, datatype, shape, _typed(t.contents, name, datatype))
    if t.HasField("contents"):
        raise InvalidInput(
            f"input {name!r} has both raw_input_contents and contents: give one"
        )
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, strings(raw, f"input {name!r}"))
    return Tensor(name, datatype, shape, raw)


def _typed(contents: pb.InferTensorContents, name: str, datatype: str) -> Contents:
    field = _FIELDS.get(datatype)
    if field is None:
        raise InvalidInput(
            f"input {name!r}: datatype {datatype[:32]!r} has no typed contents; send "
            "FP16 and BF16 in raw_input_contents, or one of " + ", ".join(_FIELDS)
        )
    for other, _ in contents.ListFields():
        if other.name != field:
            raise InvalidInput(
                f"input {name!r}: {other.name} is filled, but {datatype} elements "
                f"belong in {field}"
            )
    values = getattr(contents, field)
    if datatype == "BYTES":
        return tuple(values)
    dtype = DATATYPES[datatype]
    if datatype in _NARROW:
        return _narrowed(np.array(values, dtype="<i8"), name, datatype)
    return np.array(values, dtype=dtype).tobytes()


def _narrowed(
    wide: np.ndarray[tuple[int], np.dtype[np.int64]], name: str, datatype: str
) -> bytes:
    least, most = _NARROW[datatype]
    if wide.size and (wide.min() < least or wide.max() > most):
        raise InvalidInput(
            f"input {name!r}: an element is outside of {datatype} ({least}..{most})"
        )
    return wide.astype(DATATYPES[datatype]).tobytes()


def strings(raw: bytes, where: str) -> tuple[bytes, ...]:
    """Return the elements of a raw BYTES tensor; each follows its uint32 length."""
    found: list[bytes] = []
    at, end = 0, len(raw)
    while at < end:
        if at + 4 > end:
            raise InvalidInput(f"{where}: {end - at} stray bytes after the last string")
        start = at + 4
        at = start + _LENGTH.unpack_from(raw, start - 4)[0]
        if at > end:
            raise InvalidInput(
                f"{where}: a string claims {at - start} bytes, {end - start} are left"
            )
        found.append(raw[start:at])
        if len(found) > MAX_STRINGS:
            raise InvalidInput(f"{where}: more than {MAX_STRINGS} strings")
    return tuple(found)


# --- reply ----------------------------------------------------------------------


def reply(answer: Reply, model: str, version: str, own_id: str) -> bytes:
    """Return `answer` as a ModelInferResponse; its tensors travel raw."""
    described = tuple([(it.name, it.datatype, it.shape) for it in answer.outputs])
    parts = [_described(model, version, described)]
    if own_id:
        text = own_id.encode()
        parts += _head(pb.ModelInferResponse.ID_FIELD_NUMBER, len(text)), text
    for tensor in answer.outputs:
        data = raw(tensor.data)
        parts += _head(_RAW_OUTPUT_CONTENTS, len(data)), data
    return b"".join(parts)


@lru_cache(maxsize=256)  # a model has few forms of answers, and a stream's is one
def _described(
    model: str, version: str, outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
) -> bytes:
    """Return an answer without its id and its contents."""
    m = pb.ModelInferResponse(model_name=model, model_version=version)
    for name, datatype, shape in outputs:
        m.outputs.add(name=name, datatype=datatype, shape=shape)
    return m.SerializeToString()


def piece(answer: bytes) -> bytes:
    """Return one `reply` as a message of a stream, a ModelStreamInferResponse."""
    return _head(_INFER_RESPONSE, len(answer)) + answer


def with_raw(m: Message, field: int, contents: Iterable[bytes]) -> bytes:
    """Return `m` as it travels, with raw contents.

    Fields may come in any order (protobuf's encoding), and protobuf itself would copy
    these three times.
    """
    parts = [m.SerializeToString()]
    for one in contents:
        parts += _head(field, len(one)), one
    return b"".join(parts)


def _head(field: int, size: int) -> bytes:
    """Return what stands before a field of `size` bytes: its tag, its length."""
    found = bytearray((field << 3 | 2,))  # all our fields are below 16: one byte
    while size > 0x7F:
        found.append(size & 0x7F | 0x80)
        size >>= 7
    found.append(size)
    return bytes(found)


def raw(data: bytes | memoryview | tuple[bytes, ...]) -> bytes:
    """Return a tensor's data as it travels in raw contents."""
    if isinstance(data, tuple):
        return b"".join(_LENGTH.pack(len(one)) + one for one in data)
    return data if isinstance(data, bytes) else bytes(data)


def metadata(about: Description) -> pb.ModelMetadataResponse:
    """Return what a deployment tells of itself."""
    return pb.ModelMetadataResponse(
        name=about.model,
        versions=[about.version],
        platform="ztserve",
        inputs=_specs(about.inputs),
        outputs=_specs(about.outputs),
        properties={"digest": about.digest},
    )


_Declared: TypeAlias = pb.ModelMetadataResponse.TensorMetadata


def _specs(specs: Iterable[Spec]) -> list[_Declared]:
    make: Callable[..., _Declared] = pb.ModelMetadataResponse.TensorMetadata
    return [
        make(name=spec.name, datatype="BYTES", shape=[1])
        if isinstance(spec, TextSpec)
        else make(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        for spec in specs
    ]
