"""The same model behind plain Ray Serve, and behind bare gRPC in a Serve replica.

As fast as a careful user would write them: raw tensor bytes, one torch thread, no
work besides. `Plain` answers Serve's HTTP and gRPC proxies and its HAProxy ingress;
`Bare` opens a gRPC port of its own in the replica, without TLS or any check.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import numpy as np
import torch

from bench.generators import LoadError
from bench.oip import INFER, add_servicer
from bench.question import Question
from ztserve.transport.v1.inference_pb2 import ModelInferRequest, ModelInferResponse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request
    from starlette.responses import Response

ROW = np.arange(64, dtype="<f4").reshape(1, 64) % 17
"""The one input that every arm is asked: 64 pixels in 0..16."""


def network() -> torch.nn.Sequential:
    """Return the network of examples/digits.py: [n, 64] pixels to [n, 10] scores.

    Its weights are fixed and untrained, which costs the same.
    """
    torch.manual_seed(0)
    nn = torch.nn
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()


class Model:
    """The network over raw float32 bytes."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._network = network()

    def answer(self, pixels: bytes) -> bytes:
        """Return 10 probabilities (40 bytes) for 64 pixels (256 bytes)."""
        array = np.frombuffer(pixels, dtype="<f4").reshape(1, 64).copy()
        with torch.inference_mode():
            probabilities = self._network(torch.from_numpy(array)).softmax(dim=1)
        return bytes(probabilities.numpy().tobytes())

    def infer(self, request: ModelInferRequest) -> ModelInferResponse:
        """Answer one Open Inference Protocol request."""
        reply = ModelInferResponse(model_name="digits", model_version="1")
        reply.outputs.add(name="probabilities", datatype="FP32", shape=(1, 10))
        reply.raw_output_contents.append(self.answer(request.raw_input_contents[0]))
        return reply


def request_bytes() -> bytes:
    """Return the serialized request that the gRPC arms are sent."""
    request = ModelInferRequest(model_name="digits")
    request.inputs.add(name="pixels", datatype="FP32", shape=(1, 64))
    request.raw_input_contents.append(ROW.tobytes())
    return bytes(request.SerializeToString())


def judge(arm: str, probabilities: bytes) -> None:
    """Raise LoadError unless `arm` answered what the model answers."""
    wanted = np.frombuffer(Model().answer(ROW.tobytes()), "<f4")
    if not np.allclose(np.frombuffer(probabilities, "<f4"), wanted, atol=1e-5):
        raise LoadError(f"{arm} gives another answer than the model")


def judge_messages(arm: str, messages: Sequence[bytes]) -> None:
    """Raise LoadError unless `arm` answered with one right ModelInferResponse."""
    if len(messages) != 1:
        raise LoadError(f"{arm} answers with {len(messages)} messages")
    judge(arm, ModelInferResponse.FromString(messages[0]).raw_output_contents[0])


def question() -> Question:
    """Return what the arms are asked."""
    return Question(INFER, request_bytes(), ROW.tobytes(), judge, judge_messages)


class Plain:
    """What a Ray Serve user writes today."""

    def __init__(self) -> None:
        self._model = Model()

    async def __call__(self, request: Request) -> Response:
        """Answer Serve's HTTP proxy or HAProxy."""
        from starlette.responses import Response

        return Response(self._model.answer(await request.body()))

    async def ModelInfer(  # noqa: N802, the protocol's own name
        self, request: ModelInferRequest
    ) -> ModelInferResponse:
        """Answer Serve's gRPC proxy."""
        return self._model.infer(request)

    def pid(self) -> int:
        """Return the replica's process id."""
        return os.getpid()


class _Bare:
    def __init__(self) -> None:
        self._model = Model()

    def ModelInfer(  # noqa: N802, the protocol's own name
        self, request: ModelInferRequest, _context: grpc.ServicerContext
    ) -> ModelInferResponse:
        return self._model.infer(request)


class Bare:
    """A replica with a gRPC server of its own: no TLS, no check, no room."""

    def __init__(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_servicer(_Bare(), self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def place(self) -> tuple[int, str]:
        """Return the replica's process id and the address of its server."""
        return os.getpid(), f"127.0.0.1:{self._port}"
