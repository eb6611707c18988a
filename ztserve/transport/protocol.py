"""What both clients say and hear, apart from the waiting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from ztserve.errors import (
    Denied,
    InferenceError,
    Interrupted,
    NotFound,
    Unavailable,
)
from ztserve.identity import JwtSource
from ztserve.transport import callers, codec, status, values
from ztserve.transport.methods import SERVICE
from ztserve.transport.v1 import inference_pb2 as pb
from ztserve.types import Caller, Tensor

INFER = SERVICE + "ModelInfer"
STREAM = SERVICE + "ModelStreamInfer"
READY = SERVICE + "ServerReady"
METADATA = SERVICE + "ModelMetadata"

ASK_READY = pb.ServerReadyRequest().SerializeToString()
ASK_METADATA = pb.ModelMetadataRequest().SerializeToString()
Headers: TypeAlias = tuple[tuple[str, str | bytes], ...]
"""Metadata of a call."""
NONE: Mapping[str, str] = MappingProxyType({})

AUTHORIZATION = "authorization"
"""Where a call bears a JWT-SVID (JWT-SVID 5.3)."""
MAX_MESSAGE_BYTES = 64 << 20
TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 600.0
KNOWN_S = 5.0
"""How long a call waits for the directory to name a first replica."""
LOOK_S = 1.0
"""How often what has a time is seen to."""
AGAIN_S = 1.0
"""Pause before the directory is asked again."""
WATCH_S = 3600.0
"""Of the directory; then it is asked anew."""
CLOSE_S, EMPTIED_S = 1.0, 0.02
"""How long `close` waits for connections to end, and how often it looks."""
MAY_NOT_ASK = (Denied, NotFound)


class Declared(NamedTuple):
    """An input or output that a model declares; -1 in its shape: any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a deployment tells of itself."""

    model: str
    version: str
    digest: str
    inputs: tuple[Declared, ...]
    outputs: tuple[Declared, ...]

    @property
    def datatypes(self) -> dict[str, str]:
        """The datatype of each input by name."""
        return {one.name: one.datatype for one in self.inputs}

    def example(self) -> dict[str, values.Given]:
        """Return an input of zeros."""
        return dict(values.example(self.inputs))


def headers(
    caller: Caller | None, server: str, message: bytes, tokens: JwtSource | None = None
) -> Headers:
    """Return the metadata of a call on behalf of `caller`, with a token of ours.

    Raises IdentityError where the agent gives us none for this server.
    """
    found: list[tuple[str, str | bytes]] = []
    if caller is not None:
        header = callers.written(caller, audience=server, request=message)
        found.append((callers.HEADER, header))
    if tokens is not None:
        found.append((AUTHORIZATION, tokens.fetch(server).authorization))
    return tuple(found)


def answer(message: bytes) -> tuple[Tensor, ...]:
    """Return the outputs in a ModelInferResponse."""
    return values.tensors(codec.parse(pb.ModelInferResponse, message))


def piece(message: bytes, server: str) -> tuple[Tensor, ...]:
    """Return the outputs in a ModelStreamInferResponse, or raise its error."""
    m = codec.parse(pb.ModelStreamInferResponse, message)
    if m.error_message:
        known = m.infer_response.parameters
        name = known[status.ERROR_KEY].string_param or InferenceError.__name__
        call_id = known[status.CALL_KEY].string_param
        raise status.rebuilt(name, m.error_message, call_id, server)
    return values.tensors(m.infer_response)


def metadata(message: bytes) -> Metadata:
    """Return what a ModelMetadataResponse says."""
    m = codec.parse(pb.ModelMetadataResponse, message)
    return Metadata(
        m.name,
        m.versions[0] if m.versions else "",
        m.properties.get("digest", ""),
        _declared(m.inputs),
        _declared(m.outputs),
    )


def ready(message: bytes) -> bool:
    """Return what a ServerReadyResponse says."""
    return codec.parse(pb.ServerReadyResponse, message).ready


def midway(error: Exception) -> Exception:
    """Return `error` as it is to be told after a part of the answer has come."""
    if isinstance(error, Unavailable):
        return Interrupted("the connection broke during the answer", str(error))
    return error


def undeclared(
    inputs: Mapping[str, values.Given], datatypes: Mapping[str, str]
) -> bool:
    """Return whether an input is a list, whose datatype only the model can tell."""
    return any(
        isinstance(value, list | tuple | int | float) and name not in datatypes
        for name, value in inputs.items()
    )


def _declared(
    specs: Sequence[pb.ModelMetadataResponse.TensorMetadata],
) -> tuple[Declared, ...]:
    return tuple(Declared(one.name, one.datatype, tuple(one.shape)) for one in specs)
