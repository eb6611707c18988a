"""The agent's two sockets: every connection is attested before a byte of it is read.

That the kernel says who connected is a boundary between uids. Between processes of one
uid it is hygiene: they all may connect (`attestation`).

gRPC for Python does not tell a handler which process called. So the public socket is
ours: it asks the kernel who connected, opens a connection of its own to the gRPC server
from a source address that it has just made up, and copies bytes. The handler sees that
address (`ServicerContext.peer`) and looks the process up. Whoever dials the inner
socket has no such address and is nobody. The addresses are abstract ones, random and
held for as long as the connection lives: the kernel lets no second socket have one.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from ztserve.errors import IdentityError, ZTServeError
from ztserve.identity.agent.admin import (
    MAX_REQUEST_BYTES,
    REQUEST_TIMEOUT_S,
    read_object,
)
from ztserve.identity.agent.attestation import Process, attest

_LOG = logging.getLogger(__name__)

Answer: TypeAlias = Callable[[Process, dict[str, object]], dict[str, object]]
Refused: TypeAlias = Callable[[Process | None, str, ZTServeError], None]
"""Told what was refused to whom, and why; None: nobody that could be attested."""
_Handler: TypeAlias = Callable[
    [Process, asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]
]

_MAX_CONNECTIONS = 1024
_MAX_CONNECTIONS_OF_ONE = 32
_START_TIMEOUT_S = 10.0
_CLAIMS, _OTHERS = 16, 4
"""Admin requests in work: claims, which may ask Ray, and others."""
_OF_ONE = 2
"""Of either kind, of one process: it cannot keep all others waiting."""
_STOP_GRACE_S = 2.0
_CHUNK = 64 * 1024


class Front:
    """Listens on `public` and `admin`, and relays the first to gRPC on `inner`.

    `answer` replies to one admin request and raises a ZTServeError to refuse it; it may
    take its time. `refused` is told of that, and of connections that are turned away.
    Runs in a thread with an event loop of its own.
    """

    def __init__(
        self,
        public: Path,
        admin: Path,
        inner: Path,
        *,
        answer: Answer,
        refused: Refused = lambda _process, _what, _error: None,
    ) -> None:
        self._public, self._admin, self._inner = public, admin, inner
        self._answer = answer
        self._refused = refused
        self._callers: dict[str, Process] = {}
        self._open: Counter[Process] = Counter()
        self._in_work: Counter[tuple[Process, bool]] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._answering: set[asyncio.Task[None]] = set()
        self._claims = ThreadPoolExecutor(_CLAIMS, "ztserve-agent-claim")
        self._others = ThreadPoolExecutor(_OTHERS, "ztserve-agent-admin")
        self._listening: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._thread = threading.Thread(
            target=self._run, name="ztserve-agent", daemon=True
        )

    def start(self) -> None:
        """Return once both sockets accept connections. Raises OSError."""
        self._thread.start()
        self._listening.result(_START_TIMEOUT_S)

    def stop(self) -> None:
        """Close both sockets and all connections."""
        if self._loop is not None and self._ending is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._ending.set)
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        for threads in (self._claims, self._others):
            threads.shutdown(wait=False, cancel_futures=True)

    def caller(self, peer: str) -> Process | None:
        """Return the process behind the address that gRPC saw, if we made it up."""
        return self._callers.get(peer)

    # --- the loop's thread ------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as error:
            self._listening.set_exception(error)

    async def _serve(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        async with contextlib.AsyncExitStack() as servers:
            for path, handler in (
                (self._public, self._relay),
                (self._admin, self._admit),
            ):
                server = await asyncio.start_unix_server(
                    self._accepting(handler), path, limit=MAX_REQUEST_BYTES
                )
                servers.push_async_callback(server.wait_closed)
                servers.callback(server.close)
                path.chmod(0o600)
            self._listening.set_result(None)
            await self._ending.wait()
            if self._answering:  # also the request that has us stop
                await asyncio.wait(self._answering, timeout=_STOP_GRACE_S)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepting(
        self, handler: _Handler
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        # A plain function, and the task our own: asyncio's of Python 3.11 complains
        # aloud when it is cancelled.
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._guard(handler, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if handler == self._admit:
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)

        return accept

    async def _guard(
        self,
        handler: _Handler,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        process = None
        try:
            process = attest(writer.get_extra_info("socket"))
            with self._counted(process):
                await handler(process, reader, writer)
        except IdentityError as error:
            _LOG.warning("connection refused: %s", error)
            await asyncio.to_thread(self._refused, process, "connection", error)
        except (OSError, TimeoutError) as error:
            _LOG.debug("connection ended: %s", error)
        finally:
            writer.close()

    @contextlib.contextmanager
    def _counted(self, process: Process) -> Iterator[None]:
        if (
            self._open.total() >= _MAX_CONNECTIONS
            or self._open[process] >= _MAX_CONNECTIONS_OF_ONE
        ):
            raise IdentityError(f"process {process.pid}: too many connections")
        self._open[process] += 1
        try:
            yield
        finally:
            self._open[process] -= 1
            self._open += Counter()  # forget those at zero

    async def _relay(
        self,
        process: Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        name = f"ztserve-{secrets.token_hex(16)}"
        address = f"unix-abstract:{name}"
        with contextlib.ExitStack() as last:
            connection = last.enter_context(socket.socket(socket.AF_UNIX))
            connection.setblocking(False)  # noqa: FBT003
            connection.bind(f"\0{name}")
            # `_pump` closes its end some turns before this ends, and whoever took the
            # name then would be this process: it stays ours until it means nobody.
            last.enter_context(connection.dup())
            last.callback(self._callers.pop, address, None)
            self._callers[address] = process
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, str(self._inner))
            from_grpc, to_grpc = await asyncio.open_unix_connection(sock=connection)
            await asyncio.gather(_pump(reader, to_grpc), _pump(from_grpc, writer))

    async def _admit(
        self,
        process: Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            request = await self._request(reader)
            found = await self._answered(process, request)
            answer = {"ok": True, **found}
        except ZTServeError as error:
            answer = {"ok": False, "error": str(error)}
            _LOG.warning("admin request of process %d refused: %s", process.pid, error)
            await asyncio.to_thread(self._refused, process, "admin request", error)
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()

    async def _answered(
        self, process: Process, request: dict[str, object]
    ) -> dict[str, object]:
        """Have a request answered in a thread; claims, which may wait, in their own."""
        claim = request.get("op") == "register"
        if self._in_work[process, claim] >= _OF_ONE:
            raise IdentityError(
                f"process {process.pid} has {_OF_ONE} requests in work: wait for them"
            )
        self._in_work[process, claim] += 1
        try:
            threads = self._claims if claim else self._others
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(threads, self._answer, process, request)
        finally:
            self._in_work[process, claim] -= 1
            self._in_work += Counter()  # forget those at zero

    async def _request(self, reader: asyncio.StreamReader) -> dict[str, object]:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                return read_object(await reader.readline())
        except ValueError as error:
            raise IdentityError(
                f"expected one line of JSON, at most {MAX_REQUEST_BYTES} bytes"
            ) from error


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # either end went away: the other is closed as well
    finally:
        writer.close()
