"""Other people's servers with the TestService, for our own client.

Each says by `told` what it saw, as pairs of a word and a text.
"""

import asyncio
import json
import queue
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc

from tests.interop.service import MESSAGES, SERVICE, zeros
from tests.unit.transport.support import CLI, SERVER, pem
from ztserve.identity import Source
from ztserve.testing import ThrowAwayAuthority

STREAMS = 32
"""At once on a connection: fewer than `concurrent_large_unary` begins."""
OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_concurrent_streams", STREAMS),
    ("grpc.so_reuseport", 0),
    # Else it refuses streams while Python has not yet let go of half as many calls that
    # are over. `Client` tries those anew; what is run here is a single attempt.
    ("grpc.http.overload_protection", 0),
)
INITIAL, TRAILING = "x-grpc-test-echo-initial", "x-grpc-test-echo-trailing-bin"
OF_OURS = ("custom_metadata",)
"""Cases that look into our own server; for others', test_others.py has its own."""
COMPRESS = "x-compress"
"""Asks the server to compress its answers (grpcio only)."""


@dataclass
class Told:
    """What a server saw."""

    said: list[tuple[str, str]] = field(default_factory=list)

    def has(self, word: str, text: str, within_s: float = 5.0) -> bool:
        """Return whether it was told, or is soon."""
        end = time.monotonic() + within_s
        while (word, text) not in self.said:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True


class Other(Protocol):
    """A server that takes only clients with a certificate of our authority."""

    address: str
    source: Source
    told: Told

    def stop(self) -> None:
        """Go away, but let what runs end."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Files:
    """The server's certificate and key, and the roots of its clients', as PEM."""

    chain: bytes
    key: bytes
    roots: bytes


def files(authority: ThrowAwayAuthority) -> Files:
    svid = authority.issue(SERVER)
    return Files(svid.chain_pem(), svid.key_pem(), pem(authority.bundle))


def _credentials(authority: ThrowAwayAuthority) -> grpc.ServerCredentials:
    given = files(authority)
    pairs = [(given.key, given.chain)]
    return grpc.ssl_server_credentials(pairs, given.roots, require_client_auth=True)


def _asked(message: bytes) -> Any:
    return MESSAGES["StreamingOutputCallRequest"].FromString(message)


def _simple(size: int) -> bytes:
    return MESSAGES["SimpleResponse"](payload=zeros(size)).SerializeToString()


def _piece(size: int) -> bytes:
    kind = MESSAGES["StreamingOutputCallResponse"]
    return kind(payload=zeros(size)).SerializeToString()


def _noted(context: Any, told: Told) -> tuple[tuple[str, Any], ...]:
    """Note what came; return the metadata to begin the answer with."""
    came = dict(context.invocation_metadata())
    if COMPRESS in came:
        context.set_compression(grpc.Compression.Gzip)
    if TRAILING in came:
        context.set_trailing_metadata(((TRAILING, came[TRAILING]),))
        told.said.append(("trailing", came[TRAILING].hex()))
    if INITIAL in came:
        told.said.append(("initial", came[INITIAL]))
        return ((INITIAL, came[INITIAL]),)
    return ()


class _Sync(grpc.GenericRpcHandler):
    def __init__(self, told: Told) -> None:
        self._told = told

    def service(self, details: Any) -> grpc.RpcMethodHandler | None:
        path = details.method
        match path.removeprefix(SERVICE):
            case "EmptyCall":
                return grpc.unary_unary_rpc_method_handler(lambda one, context: b"")
            case "UnaryCall":
                return grpc.unary_unary_rpc_method_handler(self._unary)
            case "StreamingOutputCall":
                return grpc.unary_stream_rpc_method_handler(self._give)
            case "FullDuplexCall":
                return grpc.stream_stream_rpc_method_handler(self._converse)
        return None

    def _unary(self, message: bytes, context: Any) -> bytes:
        asked = MESSAGES["SimpleRequest"].FromString(message)
        _end_as(context, asked.response_status)  # without a head: Trailers-Only
        context.send_initial_metadata(_noted(context, self._told))
        return _simple(asked.response_size)

    def _give(self, message: bytes, context: Any) -> Iterator[bytes]:
        return self._converse(iter([message]), context)

    def _converse(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        context.add_callback(lambda: self._told.said.append(("ended", "")))
        context.send_initial_metadata(_noted(context, self._told))
        for message in messages:
            asked = _asked(message)
            _end_as(context, asked.response_status)
            for each in asked.response_parameters:
                yield _piece(each.size)
                time.sleep(each.interval_us / 1e6)


def _end_as(context: Any, status: Any) -> None:
    if status.code:
        context.abort(_code(status.code), status.message)


def _code(number: int) -> grpc.StatusCode:
    return next(one for one in grpc.StatusCode if one.value[0] == number)


class Sync:
    """grpcio's server with its synchronous API."""

    def __init__(self, authority: ThrowAwayAuthority, folder: Path) -> None:
        self.told, self.source = Told(), authority.source(CLI)
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, [_Sync(self.told)], options=OPTIONS)
        port = self._server.add_secure_port("127.0.0.1:0", _credentials(authority))
        self._server.start()
        self.address = f"127.0.0.1:{port}"

    def stop(self) -> None:
        self._server.stop(5)

    def close(self) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown()


class _Aio(grpc.GenericRpcHandler):
    def __init__(self, told: Told) -> None:
        self._told = told

    def service(self, details: Any) -> grpc.RpcMethodHandler | None:
        match details.method.removeprefix(SERVICE):
            case "EmptyCall":
                return grpc.unary_unary_rpc_method_handler(self._empty)
            case "UnaryCall":
                return grpc.unary_unary_rpc_method_handler(self._unary)
            case "StreamingOutputCall":
                return grpc.unary_stream_rpc_method_handler(self._give)
            case "FullDuplexCall":
                return grpc.stream_stream_rpc_method_handler(self._converse)
        return None

    async def _empty(self, message: bytes, context: Any) -> bytes:
        return b""

    async def _unary(self, message: bytes, context: Any) -> bytes:
        asked = MESSAGES["SimpleRequest"].FromString(message)
        await self._end_as(context, asked.response_status)
        await context.send_initial_metadata(_noted(context, self._told))
        return _simple(asked.response_size)

    async def _give(self, message: bytes, context: Any) -> AsyncIterator[bytes]:
        async def one() -> AsyncIterator[bytes]:
            yield message

        async for answer in self._converse(one(), context):
            yield answer

    async def _converse(self, messages: Any, context: Any) -> AsyncIterator[bytes]:
        context.add_done_callback(lambda _: self._told.said.append(("ended", "")))
        await context.send_initial_metadata(_noted(context, self._told))
        async for message in messages:
            asked = _asked(message)
            await self._end_as(context, asked.response_status)
            for each in asked.response_parameters:
                yield _piece(each.size)
                await asyncio.sleep(each.interval_us / 1e6)

    async def _end_as(self, context: Any, status: Any) -> None:
        if status.code:
            await context.abort(_code(status.code), status.message)


class Aio:
    """grpcio's server with its asynchronous API, on a loop in a thread of its own."""

    def __init__(self, authority: ThrowAwayAuthority, folder: Path) -> None:
        self.told, self.source = Told(), authority.source(CLI)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        port = self._wait(self._start(_credentials(authority)))
        self.address = f"127.0.0.1:{port}"

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self, credentials: grpc.ServerCredentials) -> int:
        self._server = grpc.aio.server(handlers=[_Aio(self.told)], options=OPTIONS)
        port = self._server.add_secure_port("127.0.0.1:0", credentials)
        await self._server.start()
        return port

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(5), self._loop)

    def close(self) -> None:
        self._wait(self._server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Node:
    """@grpc/grpc-js in a process of its own, which tells what it saw on stdout."""

    def __init__(self, authority: ThrowAwayAuthority, folder: Path) -> None:
        self.told, self.source = Told(), authority.source(CLI)
        given = files(authority)
        for name in ("chain", "key", "roots"):
            (folder / name).write_bytes(getattr(given, name))
        here = Path(__file__).parent
        command = ["node", here / "node" / "server.js", here / "test.proto", folder]
        self._process = subprocess.Popen(
            [*command, str(STREAMS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        ports: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, args=(ports,))
        self._listener.start()
        self.address = f"127.0.0.1:{ports.get(timeout=20)}"

    def _listen(self, ports: "queue.SimpleQueue[str]") -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, text = json.loads(line)
            if word == "port":
                ports.put(text)
            self.told.said.append((word, text))

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"stop\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(5)
        self._listener.join()
        self._process.stdout.close()


OTHERS: dict[str, Callable[[ThrowAwayAuthority, Path], Other]] = {
    "grpcio server": Sync,
    "grpcio aio server": Aio,
    "grpc-js server": Node,
}
"""By the name that docs/interop.md has for each."""
