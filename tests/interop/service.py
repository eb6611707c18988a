"""The grpc project's TestService on our server."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

from tests.unit.transport.support import CLI, SERVER, pem
from ztserve.errors import CallError, InvalidInput
from ztserve.identity import Source
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Limits, Method, Server
from ztserve.transport import status as statuses
from ztserve.transport.methods import Exchange, Read
from ztserve.types import Call, Operation

HERE = Path(__file__).parent
SERVICE = "/grpc.testing.TestService/"
LIMITS = Limits(
    max_streams_per_connection=32, max_in_flight=128, max_in_flight_per_principal=128
)
"""Fewer calls at once on a connection than `concurrent_large_unary` begins."""
STATUSES: dict[int, type[CallError]] = {
    row.code: kind
    for kind, row in statuses.TABLE.items()
    if issubclass(kind, CallError)
}
"""The statuses that a handler of ours can end a call with, by an error of its own."""


def _classes() -> dict[str, Any]:
    """Return the classes of test.proto, in a pool of their own."""
    with tempfile.NamedTemporaryFile() as out:
        arguments = [f"-I{HERE}", f"--descriptor_set_out={out.name}", "test.proto"]
        if protoc.main(["protoc", *arguments]):
            raise RuntimeError("test.proto cannot be read")
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read())
    pool = descriptor_pool.DescriptorPool()
    return {
        name.removeprefix("grpc.testing."): made
        for name, made in message_factory.GetMessages(found.file, pool=pool).items()
    }


MESSAGES = _classes()


def zeros(size: int) -> Any:
    """A payload of so many zeros."""
    return MESSAGES["Payload"](body=bytes(size))


@dataclass
class TestService:
    """Answers as "Server" of the grpc project's description has it."""

    __test__ = False

    calls: list[Call] = field(default_factory=list)

    def methods(self) -> tuple[Method, ...]:
        answers = {"EmptyCall": self.empty, "UnaryCall": self.unary}
        streams = {
            "StreamingInputCall": self.take,
            "StreamingOutputCall": self.converse,
            "FullDuplexCall": self.converse,
        }
        return (
            *(
                Method(SERVICE + name, _operation(name), answer=answer)
                for name, answer in answers.items()
            ),
            *(
                Method(SERVICE + name, _operation(name), stream=stream)
                for name, stream in streams.items()
            ),
        )

    def empty(self, call: Call, read: Read) -> bytes:
        self.calls.append(call)
        return MESSAGES["Empty"].FromString(read()).SerializeToString()

    def unary(self, call: Call, read: Read) -> bytes:
        self.calls.append(call)
        asked = MESSAGES["SimpleRequest"].FromString(read())
        _end_as(asked.response_status)
        answer = MESSAGES["SimpleResponse"](payload=zeros(asked.response_size))
        return answer.SerializeToString()

    def take(self, exchange: Exchange) -> Iterator[bytes]:
        self.calls.append(exchange.call)
        size = 0
        for message in _messages(exchange):
            asked = MESSAGES["StreamingInputCallRequest"].FromString(message)
            size += len(asked.payload.body)
        answer = MESSAGES["StreamingInputCallResponse"](aggregated_payload_size=size)
        yield answer.SerializeToString()

    def converse(self, exchange: Exchange) -> Iterator[bytes]:
        self.calls.append(exchange.call)
        for message in _messages(exchange):
            asked = MESSAGES["StreamingOutputCallRequest"].FromString(message)
            _end_as(asked.response_status)
            for each in asked.response_parameters:
                time.sleep(each.interval_us / 1e6)
                answer = MESSAGES["StreamingOutputCallResponse"]
                yield answer(payload=zeros(each.size)).SerializeToString()


def _operation(name: str) -> Operation:
    return Operation("POST", frozenset((SERVICE + name,)), SERVICE + name)


def _messages(exchange: Exchange) -> Iterator[bytes]:
    """Yield what the caller sends; a stream may have nothing to say.

    Our own protocol's streams begin with a message, so `Exchange.read` wants one.
    """
    following = exchange.more()
    while following is not None:
        yield following[1]
        following = exchange.more()


def _end_as(asked: Any) -> None:
    if not asked.code:
        return
    if asked.code not in STATUSES:
        raise InvalidInput(f"no error of ours has the status {asked.code}")
    raise STATUSES[asked.code](asked.message, "the request asked for it")


@dataclass(frozen=True)
class Served:
    """Our server with the TestService, and what a client needs to call it."""

    server: Server
    service: TestService
    host: str
    port: int
    bundle: Path
    certificate: Path
    key: Path
    """PEM files: what verifies the server, and who the client is."""
    source: Source
    """Who the client is, for ours."""

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@contextmanager
def serving(
    authority: ThrowAwayAuthority, folder: Path, *more: Method
) -> Iterator[Served]:
    """Serve the TestService, and `more`."""
    service, svid = TestService(), authority.issue(CLI)
    files = {
        "bundle": pem(authority.bundle),
        "certificate": svid.chain_pem(),
        "key": svid.key_pem(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    server = Server(
        (*service.methods(), *more), source=authority.source(SERVER), limits=LIMITS
    )
    host, port = server.start("127.0.0.1")
    try:
        paths = [folder / name for name in files]
        yield Served(server, service, host, port, *paths, authority.source(CLI))
    finally:
        server.stop(1)
