"""The Open Inference Protocol's call, as a servicer function that Ray Serve takes."""

from __future__ import annotations

from typing import Protocol

import grpc

from ztserve.transport.v1.inference_pb2 import ModelInferRequest, ModelInferResponse

SERVICE = "inference.GRPCInferenceService"
INFER = f"/{SERVICE}/ModelInfer"
SERVICER = f"{__name__}.add_servicer"
"""Where Ray Serve's gRPC proxy finds `add_servicer`."""


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
