"""The JSON of the Open Inference Protocol (version 2) <-> the values between rooms.

Strict: no NaN, no name twice, no unknown field, no number where the datatype has none.
Shapes and ranges are validation's part; here a tensor only has to be what it says.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ztserve.errors import InferenceError, InvalidInput
from ztserve.types import DATATYPES, Request, Tensor

MAX_TENSORS = 256
MAX_DIMENSIONS = 16
MAX_TEXT = 256
_BODY = ("id", "inputs", "model_name", "model_version", "outputs", "parameters")
_INPUT = ("data", "datatype", "name", "parameters", "shape")
_OUTPUT = ("name", "parameters")
_BINARY = ("binary_data", "binary_data_output", "binary_data_size")
_FLOATS = ("FP16", "BF16", "FP32", "FP64")


def read_request(body: bytes) -> Request:
    """Return what a JSON body asks for. Raises InvalidInput, which names the field."""
    try:
        fields = json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        # Ours say what is wrong; a parser's might quote the body.
        told = error.args[0] if isinstance(error, _Refused) else "not JSON in UTF-8"
        raise InvalidInput(f"the body is refused: {told}") from None
    fields = _object(fields, _BODY, "the body")
    _no_parameters(fields, "the body")
    inputs = _list(fields, "inputs", "the body")
    outputs = _list(fields, "outputs", "the body") if "outputs" in fields else []
    if not inputs:
        raise InvalidInput("inputs: at least one is needed")
    return Request(
        model=_text(fields, "model_name", "the body"),
        version=_text(fields, "model_version", "the body"),
        id=_text(fields, "id", "the body"),
        inputs=tuple(_tensor(one, at) for at, one in enumerate(inputs)),
        outputs=tuple(_output(one, at) for at, one in enumerate(outputs)),
        size=len(body),
    )


class _Refused(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("a name is given twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise _Refused(f"{name} is not JSON")


def _object(value: Any, allowed: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInput(f"{where} must be an object")
    for name in value:
        if name not in allowed:
            raise InvalidInput(
                f"{where}: unknown field {name[:MAX_TEXT]!r}; there are "
                f"{', '.join(allowed)}"
            )
    return value


def _list(fields: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list) or len(value) > MAX_TENSORS:
        raise InvalidInput(f"{where}: {name} must be a list of at most {MAX_TENSORS}")
    return value


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise InvalidInput(
            f"{where}: {name} must be a text of at most {MAX_TEXT} characters"
        )
    return value


def _no_parameters(fields: Mapping[str, Any], where: str) -> None:
    """Refuse parameters, save those that ask for JSON, which it is anyway."""
    given = _object(fields.get("parameters", {}), _BINARY, f"parameters of {where}")
    if any(value is not False for value in given.values()):
        raise InvalidInput(
            f"{where}: binary tensors are not taken over HTTP; send JSON numbers, or "
            "use gRPC"
        )


def _output(value: Any, at: int) -> str:
    where = f"outputs[{at}]"
    fields = _object(value, _OUTPUT, where)
    _no_parameters(fields, where)
    name = _text(fields, "name", where)
    if not name:
        raise InvalidInput(f"{where}: name is missing")
    return name


def _tensor(value: Any, at: int) -> Tensor:
    fields = _object(value, _INPUT, f"inputs[{at}]")
    name = _text(fields, "name", f"inputs[{at}]")
    if not name:
        raise InvalidInput(f"inputs[{at}]: name is missing")
    where = f"input {name!r}"
    _no_parameters(fields, where)
    shape = _shape(fields.get("shape"), where)
    flat = _flat(fields.get("data"), shape, where)
    datatype = _text(fields, "datatype", where)
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, _strings(flat, where))
    if datatype not in DATATYPES:
        known = ", ".join((*DATATYPES, "BYTES"))
        raise InvalidInput(f"{where}: datatype must be one of {known}")
    return Tensor(name, datatype, shape, _numbers(flat, datatype, where))


def _shape(value: Any, where: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 1 << 31 for size in value)
    ):
        raise InvalidInput(
            f"{where}: shape must be a list of 1 to {MAX_DIMENSIONS} sizes"
        )
    return tuple(value)


def _flat(value: Any, shape: tuple[int, ...], where: str) -> list[Any]:
    """Return row-major data, which may come flat or nested as `shape` says."""
    if not isinstance(value, list):
        raise InvalidInput(f"{where}: data must be a list")
    flat = value
    if value and isinstance(value[0], list):
        flat = [value]
        for size in shape:
            if not all(isinstance(one, list) and len(one) == size for one in flat):
                raise InvalidInput(f"{where}: data is not nested as shape says")
            flat = [inner for one in flat for inner in one]
    expected = math.prod(shape)
    if len(flat) != expected:
        raise InvalidInput(
            f"{where}: data has {len(flat)} elements, shape {list(shape)} has "
            f"{expected}"
        )
    return flat


def _strings(flat: list[Any], where: str) -> tuple[bytes, ...]:
    if not all(type(one) is str for one in flat):
        raise InvalidInput(f"{where}: BYTES are given as strings")
    try:
        return tuple(one.encode() for one in flat)
    except UnicodeEncodeError:
        raise InvalidInput(f"{where}: half of a surrogate pair is no text") from None


def _numbers(flat: list[Any], datatype: str, where: str) -> bytes:
    kinds, dtype = set(map(type, flat)), DATATYPES[datatype]
    if datatype in _FLOATS:
        if not kinds <= {int, float}:
            raise InvalidInput(f"{where}: {datatype} takes numbers only")
        return _floats(flat, datatype, where)
    if datatype == "BOOL":
        if not kinds <= {bool}:
            raise InvalidInput(f"{where}: BOOL takes true and false only")
        return bytes(flat)
    if not kinds <= {int}:
        raise InvalidInput(f"{where}: {datatype} takes whole numbers only")
    bits = dtype.itemsize * 8 - (dtype.kind == "i")
    least, most = -(1 << bits) if dtype.kind == "i" else 0, (1 << bits) - 1
    if flat and not (least <= min(flat) and max(flat) <= most):
        raise InvalidInput(f"{where}: {datatype} reaches from {least} to {most}")
    return np.array(flat, dtype).tobytes()


def _floats(flat: list[Any], datatype: str, where: str) -> bytes:
    wide = np.dtype("<f4") if datatype == "BF16" else DATATYPES[datatype]
    try:
        with np.errstate(over="ignore"):
            values = np.array(flat, "<f8").astype(wide)
    except OverflowError:
        values = np.array([np.inf], wide)
    if not np.isfinite(values).all():
        raise InvalidInput(f"{where}: a number is beyond {datatype}")
    if datatype == "BF16":  # the upper half of a float32, rounded to even
        bits = values.view("<u4")
        values = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return values.tobytes()


# --- replies ----------------------------------------------------------------------


def write_reply(request: Request, outputs: Iterable[Tensor]) -> bytes:
    """Return an answer as JSON. Raises InferenceError where a value has no JSON."""
    answer: dict[str, Any] = {"model_name": request.model}
    if request.version:
        answer["model_version"] = request.version
    if request.id:
        answer["id"] = request.id
    answer["outputs"] = [
        {
            "name": one.name,
            "datatype": one.datatype,
            "shape": list(one.shape),
            "data": _plain(one),
        }
        for one in outputs
    ]
    try:
        return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise InferenceError("an output is not finite, so JSON cannot say it") from (
            error
        )


def _plain(tensor: Tensor) -> list[Any]:
    data = tensor.data
    if isinstance(data, tuple):
        try:
            return [one.decode() for one in data]
        except UnicodeDecodeError as error:
            raise InferenceError(
                f"output {tensor.name!r}: bytes that are no text need gRPC"
            ) from error
    values = np.frombuffer(data, DATATYPES[tensor.datatype])
    if tensor.datatype == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    plain: list[Any] = values.tolist()
    return plain
