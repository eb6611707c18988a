"""The clients that the cases are run with: each a `Driver` of the same few verbs."""

import asyncio
import base64
import contextlib
import json
import queue
import subprocess
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Protocol

import grpc

from tests.interop.service import Served
from tests.unit.transport.support import SERVER
from ztserve.identity import dns_name

LONGEST_S = 20.0
Metadata = tuple[tuple[str, str | bytes], ...]


class Shape(StrEnum):
    """How many messages either side sends."""

    UNARY = "unary"
    CLIENT_STREAM = "client_stream"
    SERVER_STREAM = "server_stream"
    BIDI = "bidi"


@dataclass(frozen=True)
class End:
    """How a call ended, as the client tells it."""

    code: int
    details: str


class Conversation(Protocol):
    """One call. `send` and `half_close` are for shapes in which the client streams."""

    def send(self, message: bytes) -> None: ...

    def half_close(self) -> None: ...

    def receive(self) -> bytes | None:
        """Wait for the next message; None where the call ended instead."""

    def cancel(self) -> None: ...

    def end(self) -> End:
        """Wait for the end."""


class Driver(Protocol):
    """A client with one connection to one server."""

    def call(
        self,
        shape: Shape,
        path: str,
        request: bytes = b"",
        *,
        timeout_s: float = LONGEST_S,
        metadata: Metadata = (),
        compressed: bool = False,
    ) -> Conversation:
        """Begin a call. `request` is the one message of a client that streams not."""

    def reconnect(self) -> None:
        """Tear the connection down; the next call makes a new one."""

    def close(self) -> None: ...


def _options() -> list[tuple[str, str]]:
    return [("grpc.ssl_target_name_override", dns_name(SERVER))]


def _credentials(served: Served) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        served.bundle.read_bytes(),
        served.key.read_bytes(),
        served.certificate.read_bytes(),
    )


# --- grpcio ---------------------------------------------------------------------------


class Sync:
    """grpcio with its synchronous API."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._plain, self._compressed = self._connected()

    def _connected(self) -> tuple[grpc.Channel, grpc.Channel]:
        address, credentials = self._served.address, _credentials(self._served)
        # A channel for each: `stream_unary.future` does not heed its own `compression`.
        plain = grpc.secure_channel(address, credentials, _options())
        gzip = grpc.Compression.Gzip
        return plain, grpc.secure_channel(address, credentials, _options(), gzip)

    def call(
        self,
        shape: Shape,
        path: str,
        request: bytes = b"",
        *,
        timeout_s: float = LONGEST_S,
        metadata: Metadata = (),
        compressed: bool = False,
    ) -> Conversation:
        more: Any = {"timeout": timeout_s, "metadata": metadata}
        sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        given: Iterator[bytes] = iter(sent.get, None)
        channel = self._compressed if compressed else self._plain
        match shape:
            case Shape.UNARY:
                call = channel.unary_unary(path).future(request, **more)
            case Shape.CLIENT_STREAM:
                call = channel.stream_unary(path).future(given, **more)
            case Shape.SERVER_STREAM:
                call = channel.unary_stream(path)(request, **more)
            case Shape.BIDI:
                call = channel.stream_stream(path)(given, **more)
        return _SyncConversation(call, sent, shape)

    def reconnect(self) -> None:
        self.close()
        self._plain, self._compressed = self._connected()

    def close(self) -> None:
        self._plain.close()
        self._compressed.close()


class _SyncConversation:
    def __init__(
        self, call: Any, sent: "queue.SimpleQueue[bytes | None]", shape: Shape
    ) -> None:
        self._call, self._sent = call, sent
        self._one = shape in (Shape.UNARY, Shape.CLIENT_STREAM)
        self._received = False

    def send(self, message: bytes) -> None:
        self._sent.put(message)

    def half_close(self) -> None:
        self._sent.put(None)

    def receive(self) -> bytes | None:
        try:
            if not self._one:
                return next(self._call, None)
            if self._received:
                return None
            self._received = True
            return self._call.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            return None

    def cancel(self) -> None:
        self._call.cancel()

    def end(self) -> End:
        code = self._call.code()
        self._sent.put(None)  # ends the thread that would go on waiting for more
        return End(code.value[0], self._call.details())


class Aio:
    """grpcio with its asynchronous API, on a loop in a thread of its own."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._channel = self.wait(self._connected())

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Have `work` done on the loop."""
        done = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(LONGEST_S + 5)

    async def _connected(self) -> grpc.aio.Channel:
        credentials = _credentials(self._served)
        return grpc.aio.secure_channel(self._served.address, credentials, _options())

    def call(
        self,
        shape: Shape,
        path: str,
        request: bytes = b"",
        *,
        timeout_s: float = LONGEST_S,
        metadata: Metadata = (),
        compressed: bool = False,
    ) -> Conversation:
        more: Any = {
            "timeout": timeout_s,
            "metadata": metadata,
            "compression": grpc.Compression.Gzip if compressed else None,
        }

        async def begin() -> Any:
            channel = self._channel
            match shape:
                case Shape.UNARY:
                    return channel.unary_unary(path)(request, **more)
                case Shape.CLIENT_STREAM:
                    return channel.stream_unary(path)(**more)
                case Shape.SERVER_STREAM:
                    return channel.unary_stream(path)(request, **more)
                case Shape.BIDI:
                    return channel.stream_stream(path)(**more)

        return _AioConversation(self, self.wait(begin()), shape)

    def reconnect(self) -> None:
        self.wait(self._channel.close())
        self._channel = self.wait(self._connected())

    def close(self) -> None:
        self.wait(self._channel.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _AioConversation:
    def __init__(self, driver: Aio, call: Any, shape: Shape) -> None:
        self._driver, self._call = driver, call
        self._one = shape in (Shape.UNARY, Shape.CLIENT_STREAM)
        self._received = False

    def send(self, message: bytes) -> None:
        self._driver.wait(self._unless_over(self._call.write(message)))

    def half_close(self) -> None:
        self._driver.wait(self._unless_over(self._call.done_writing()))

    async def _unless_over(self, work: Awaitable[None]) -> None:
        # A call that has ended meanwhile says why by `end`.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await work

    def receive(self) -> bytes | None:
        return self._driver.wait(self._next())

    async def _next(self) -> bytes | None:
        try:
            if self._one and self._received:
                return None
            self._received = True
            message = await (self._call if self._one else self._call.read())
        except (grpc.RpcError, asyncio.CancelledError):
            return None
        return None if message is grpc.aio.EOF else message

    def cancel(self) -> None:
        async def cancelled() -> None:
            self._call.cancel()

        self._driver.wait(cancelled())

    def end(self) -> End:
        async def ended() -> End:
            code, details = await self._call.code(), await self._call.details()
            return End(code.value[0], details)

        return self._driver.wait(ended())


# --- grpc-js --------------------------------------------------------------------------


class Node:
    """@grpc/grpc-js in a process that does as it is told over its pipes.

    Both ways each message is one of JSON and one of bytes, with their lengths before.
    """

    def __init__(self, served: Served) -> None:
        program = Path(__file__).parent / "node" / "driver.js"
        self._process = subprocess.Popen(
            ["node", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._said: dict[int, queue.SimpleQueue[tuple[dict[str, Any], bytes]]] = {}
        self._where = {
            "address": served.address,
            "name": dns_name(SERVER),
            "bundle": str(served.bundle),
            "certificate": str(served.certificate),
            "key": str(served.key),
        }
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.tell({"verb": "connect", **self._where})

    def tell(self, what: Mapping[str, object], body: bytes = b"") -> None:
        head = json.dumps(what).encode()
        lengths = len(head).to_bytes(4, "big") + len(body).to_bytes(4, "big")
        pipe = _pipe(self._process.stdin)
        pipe.write(lengths + head + body)
        pipe.flush()

    def _listen(self) -> None:
        pipe = _pipe(self._process.stdout)
        while lengths := pipe.read(8):
            head = json.loads(pipe.read(int.from_bytes(lengths[:4], "big")))
            body = pipe.read(int.from_bytes(lengths[4:], "big"))
            self._said[head["id"]].put((head, body))

    def call(
        self,
        shape: Shape,
        path: str,
        request: bytes = b"",
        *,
        timeout_s: float = LONGEST_S,
        metadata: Metadata = (),
        compressed: bool = False,
    ) -> Conversation:
        number = len(self._said)
        said = self._said[number] = queue.SimpleQueue()
        what = {
            "verb": "call",
            "id": number,
            "shape": shape,
            "path": path,
            "timeout_s": timeout_s,
            "compressed": compressed,
            "metadata": [
                (name, base64.b64encode(value).decode())
                if isinstance(value, bytes)
                else (name, value)
                for name, value in metadata
            ],
        }
        self.tell(what, request)
        return _NodeConversation(self, number, said)

    def reconnect(self) -> None:
        self.tell({"verb": "connect", **self._where})

    def close(self) -> None:
        _pipe(self._process.stdin).close()
        self._process.wait(5)
        self._listener.join()
        _pipe(self._process.stdout).close()


class _NodeConversation:
    def __init__(
        self,
        driver: Node,
        number: int,
        said: "queue.SimpleQueue[tuple[dict[str, Any], bytes]]",
    ) -> None:
        self._driver, self._number, self._said = driver, number, said
        self._end: End | None = None

    def send(self, message: bytes) -> None:
        self._driver.tell({"verb": "send", "id": self._number}, message)

    def half_close(self) -> None:
        self._driver.tell({"verb": "half_close", "id": self._number})

    def receive(self) -> bytes | None:
        if self._end is not None:
            return None
        head, body = self._said.get(timeout=LONGEST_S + 5)
        if head["kind"] == "message":
            return body
        self._end = End(head["code"], head["details"])
        return None

    def cancel(self) -> None:
        self._driver.tell({"verb": "cancel", "id": self._number})

    def end(self) -> End:
        while self._end is None:
            self.receive()
        return self._end


def _pipe(one: IO[bytes] | None) -> IO[bytes]:
    if one is None:
        raise RuntimeError("there is no pipe")
    return one


DRIVERS: dict[str, Callable[[Served], Driver]] = {
    "grpcio": Sync,
    "grpcio aio": Aio,
    "grpc-js": Node,
}
"""By the name that docs/interop.md has for each."""
