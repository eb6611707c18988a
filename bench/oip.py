"""The Open Inference Protocol's calls, as servicer functions that Ray Serve takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import grpc

from ztserve.transport.v1.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = "inference.GRPCInferenceService"
INFER, STREAM = (f"/{SERVICE}/{name}" for name in ("ModelInfer", "ModelStreamInfer"))
SERVICERS = (f"{__name__}.add_servicer", f"{__name__}.add_stream_servicer")
"""Where Ray Serve's gRPC proxy finds `add_servicer` and `add_stream_servicer`."""


class Servicer(Protocol):
    """What answers the call."""

    def ModelInfer(  # noqa: N802, the protocol's own name
        self, request: ModelInferRequest, context: grpc.ServicerContext
    ) -> ModelInferResponse:
        """Answer one request."""


def add_servicer(servicer: Servicer, server: grpc.Server) -> None:
    """Add the service to a gRPC server, as generated code would."""
    infer = grpc.unary_unary_rpc_method_handler(
        servicer.ModelInfer,
        request_deserializer=ModelInferRequest.FromString,
        response_serializer=ModelInferResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": infer})
    server.add_generic_rpc_handlers((handler,))


class StreamServicer(Protocol):
    """What answers the streaming call."""

    def ModelStreamInfer(  # noqa: N802, the protocol's own name
        self, request: ModelInferRequest, context: grpc.ServicerContext
    ) -> Iterator[ModelStreamInferResponse]:
        """Answer one request, message by message."""


def add_stream_servicer(servicer: StreamServicer, server: grpc.Server) -> None:
    """Add the streaming call; of a caller's requests, the first is taken.

    Ray Serve has one way for a call that sends one message and takes many; on the wire
    it is what the protocol has.
    """
    stream = grpc.unary_stream_rpc_method_handler(
        servicer.ModelStreamInfer,
        request_deserializer=ModelInferRequest.FromString,
        response_serializer=ModelStreamInferResponse.SerializeToString,
    )
    handlers = {"ModelStreamInfer": stream}
    handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
    server.add_generic_rpc_handlers((handler,))
