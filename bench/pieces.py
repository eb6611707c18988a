"""What ``bench.request --stream`` asks: 100 pieces of text, behind each arm.

Each of 20 bytes, sent as it is made. There is no model: what a stream costs shows.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from bench.generators import LoadError
from bench.oip import STREAM
from bench.question import Question
from ztserve import ModelRef, TextSpec, VerifiedModel, ZTDeployment
from ztserve.transport import values
from ztserve.transport.v1.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

PIECES = tuple(f"words {a}{b} of my text " for a in "abcdefghij" for b in "abcdefghij")
TEXT = "".join(PIECES)
SYNC_PATH = "/sync"
"""Where `PlainWords` answers from a generator that is not async, as Ray Serve's own
documentation has it, and as `Words` does: Starlette has each piece made on a thread."""


class Words(ZTDeployment):
    """ztserve's: every room is on, the filter of texts too."""

    model = ModelRef("digits@production")
    service = "inference-service"
    inputs = (TextSpec("prompt", max_chars=96),)
    outputs = (TextSpec("text", max_chars=2 * len(TEXT)),)

    def load(self, model: VerifiedModel) -> None:
        """Load nothing."""

    def predict(self, prompt: str) -> Iterator[str]:
        """Answer piece by piece."""
        assert prompt
        yield from PIECES


class PlainWords:
    """What a Ray Serve user writes today, for either proxy."""

    async def __call__(self, request: Request) -> Response:
        """Answer Serve's HTTP proxy or HAProxy, chunk by chunk."""
        from starlette.responses import StreamingResponse

        await request.body()
        if request.scope["path"] == SYNC_PATH:
            return StreamingResponse(map(str.encode, PIECES), media_type="text/plain")

        async def chunks() -> AsyncIterator[bytes]:
            for piece in PIECES:
                yield piece.encode()
                await asyncio.sleep(0)  # as a model that is waited for lets others run

        return StreamingResponse(chunks(), media_type="text/plain")

    async def ModelStreamInfer(  # noqa: N802, the protocol's own name
        self, request: ModelInferRequest
    ) -> AsyncIterator[ModelStreamInferResponse]:
        """Answer Serve's gRPC proxy, message by message."""
        for piece in PIECES:
            reply = ModelInferResponse(model_name=request.model_name, model_version="1")
            reply.outputs.add(name="text", datatype="BYTES", shape=(1,))
            text = piece.encode()
            reply.raw_output_contents.append(len(text).to_bytes(4, "little") + text)
            yield ModelStreamInferResponse(infer_response=reply)

    def pid(self) -> int:
        """Return the replica's process id."""
        return os.getpid()


def judge(arm: str, body: bytes) -> None:
    """Raise LoadError unless `arm` answered with the whole text."""
    if body != TEXT.encode():
        raise LoadError(f"{arm} answers with {len(body)} bytes, not with the text")


def judge_messages(arm: str, messages: Sequence[bytes]) -> None:
    """Raise LoadError unless `arm` answered with the whole text, in 100 pieces."""
    if len(messages) != len(PIECES):
        raise LoadError(f"{arm} answers in {len(messages)} pieces, not {len(PIECES)}")
    read = map(ModelStreamInferResponse.FromString, messages)
    raws = [one.infer_response.raw_output_contents for one in read]
    judge(arm, b"".join(raw[4:] for several in raws for raw in several))


def question() -> Question:
    """Return what the arms are asked."""
    asked = values.request({"prompt": "go"}, model="digits")
    return Question(STREAM, values.message(asked), b"go", judge, judge_messages)
