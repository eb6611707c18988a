"""What a server answers: the methods of the Open Inference Protocol."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import ztserve
from ztserve.errors import InferenceError, InvalidInput, NotFound, Withheld
from ztserve.transport import codec, status
from ztserve.transport.v1 import health_pb2
from ztserve.transport.v1 import inference_pb2 as pb
from ztserve.types import (
    Call,
    Description,
    Operation,
    Reply,
    Request,
    Service,
    operations,
)

SERVICE = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/Check"
_CHECKED = ("", SERVICE.strip("/"))
"""What may be asked of `HEALTH`: the whole server, or what it serves; they are one."""

Read: TypeAlias = Callable[[], bytes]
"""Reads the one message of a call, bounded in bytes and time."""


Outcome: TypeAlias = tuple[int, bytes | Exception]
"""A call's place among several, and its answer or its error."""
AnswerAll: TypeAlias = Callable[[Sequence[tuple[Call, Read]]], Iterator[Outcome]]


class Exchange(Protocol):
    """A stream: its first Call, and each further message as a Call of its own."""

    call: Call

    def read(self) -> bytes:
        """Return the first message."""

    def more(self) -> tuple[Call, bytes] | None:
        """Return the next message and its Call; None where there is none."""


Answer: TypeAlias = Callable[[Call, Read], bytes]
Stream: TypeAlias = Callable[[Exchange], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Method:
    """One method on the wire. Just one of `answer` and `stream` is given."""

    path: str
    operation: Operation
    answer: Answer | None = None
    stream: Stream | None = None
    answer_all: AnswerAll | None = None
    """Answers several calls whose messages are there, on one thread; where given."""
    named: Callable[[Mapping[str, str]], Operation] | None = None
    """Names the operation of one call by its metadata, instead of `operation`, where
    they say what it is about; raises InvalidInput."""

    def __post_init__(self) -> None:
        if (self.answer is None) == (self.stream is None):
            raise ValueError(f"{self.path}: give either an answer or a stream")


def inference_methods(
    service: Service, model: str, version: str = ""
) -> tuple[Method, ...]:
    """Return the methods by which `service` answers for the model named `model`.

    A request for another model, or for another version where `version` is given, is
    NotFound. The service judges each call itself, before its message is read.
    """
    door = _Inference(service, model, version)
    named = operations(model)
    answers: dict[str, Answer] = {
        "ServerLive": door.live,
        "ServerReady": door.ready,
        "ModelReady": door.model_ready,
        "ServerMetadata": door.server_metadata,
        "ModelMetadata": door.model_metadata,
        "ModelInfer": door.infer,
    }
    several = door.infer_all if getattr(service, "takes_several", False) else None
    return (
        *(
            Method(
                SERVICE + name,
                named[name],
                answer=answer,
                answer_all=several if name == "ModelInfer" else None,
            )
            for name, answer in answers.items()
        ),
        Method(
            SERVICE + "ModelStreamInfer", named["ModelStreamInfer"], stream=door.stream
        ),
        Method(HEALTH, named["ServerReady"], answer=door.health),
    )


class _Inference:
    def __init__(self, service: Service, model: str, version: str) -> None:
        self._service = service
        self._model = model
        self._version = version

    def infer(self, call: Call, read: Read) -> bytes:
        receive = self._receiver(read)
        reply = self._service.infer(call, receive)
        return self._encoded(reply, receive.request)

    def infer_all(self, calls: Sequence[tuple[Call, Read]]) -> Iterator[Outcome]:
        service = cast("Any", self._service)
        receivers = [self._receiver(read) for _, read in calls]
        pairs = [(call, it) for (call, _), it in zip(calls, receivers, strict=True)]
        for at, outcome in service.infer_all(pairs):
            if isinstance(outcome, Exception):
                yield at, outcome
            else:
                yield at, self._encoded(outcome, receivers[at].request)

    def stream(self, exchange: Exchange) -> Iterator[bytes]:
        call, read = exchange.call, exchange.read
        while True:
            yield from self._pieces(call, self._receiver(read))
            following = exchange.more()
            if following is None:
                return
            call, message = following
            read = _already(message)

    def _pieces(self, call: Call, receive: "_Receiver") -> Iterator[bytes]:
        """Answer one message of a stream.

        What is wrong with this message alone is told in its place, as the protocol
        has it, and the stream goes on. All else ends the stream.
        """
        try:
            for reply in self._service.stream(call, receive):
                yield codec.piece(self._encoded(reply, receive.request))
        except (InvalidInput, NotFound, Withheld, InferenceError) as error:
            yield _error(error, call, receive.request).SerializeToString()

    def live(self, call: Call, read: Read) -> bytes:
        self._service.describe(call)
        codec.parse(pb.ServerLiveRequest, read())
        return pb.ServerLiveResponse(live=True).SerializeToString()

    def ready(self, call: Call, read: Read) -> bytes:
        about = self._service.describe(call)
        codec.parse(pb.ServerReadyRequest, read())
        return pb.ServerReadyResponse(ready=about.ready).SerializeToString()

    def health(self, call: Call, read: Read) -> bytes:
        about = self._service.describe(call)
        asked = codec.parse(health_pb2.HealthCheckRequest, read())
        if asked.service not in _CHECKED:
            raise NotFound(f"service {asked.service!r:.200} is not served here")
        said = health_pb2.HealthCheckResponse
        status = said.SERVING if about.ready else said.NOT_SERVING
        return said(status=status).SerializeToString()

    def model_ready(self, call: Call, read: Read) -> bytes:
        about = self._service.describe(call)
        asked = codec.parse(pb.ModelReadyRequest, read())
        self._check(asked.name, asked.version)
        return pb.ModelReadyResponse(ready=about.ready).SerializeToString()

    def server_metadata(self, call: Call, read: Read) -> bytes:
        self._service.describe(call)
        codec.parse(pb.ServerMetadataRequest, read())
        return pb.ServerMetadataResponse(
            name="ztserve", version=ztserve.__version__
        ).SerializeToString()

    def model_metadata(self, call: Call, read: Read) -> bytes:
        about: Description = self._service.describe(call)
        asked = codec.parse(pb.ModelMetadataRequest, read())
        self._check(asked.name, asked.version)
        return codec.metadata(about).SerializeToString()

    def _receiver(self, read: Read) -> "_Receiver":
        return _Receiver(read, self._check)

    def _encoded(self, reply: Reply, request: Request | None) -> bytes:
        own_id = request.id if request else ""
        return codec.reply(reply, self._model, self._version, own_id)

    def _check(self, model: str, version: str) -> None:
        if model not in ("", self._model):
            raise NotFound(
                f"model {model!r:.200} is not served here; this is {self._model!r}"
            )
        if version and self._version and version != self._version:
            raise NotFound(
                f"version {version!r:.200} of {self._model} is not served here; this "
                f"is {self._version!r}"
            )


class _Receiver:
    """Reads and decodes the body when the service asks; keeps it for the reply."""

    __slots__ = ("_check", "_read", "request")

    def __init__(self, read: Read, check: Callable[[str, str], None]) -> None:
        self._read = read
        self._check = check
        self.request: Request | None = None

    def __call__(self) -> Request:
        self.request = codec.request(self._read())
        self._check(self.request.model, self.request.version)
        return self.request


def _already(message: bytes) -> Read:
    return lambda: message


def _error(
    error: Exception, call: Call, request: Request | None
) -> pb.ModelStreamInferResponse:
    m = pb.ModelStreamInferResponse(error_message=status.sentence(error, call.id))
    m.infer_response.id = request.id if request else ""
    for name, value in status.trailers(error, call.id):
        m.infer_response.parameters[name].string_param = value
    return m
