"""The gateway: an HTTPS edge on a thread and an event loop of its own."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Mapping

from ztserve.audit import Log
from ztserve.authorization import PolicySet
from ztserve.errors import ConfigError
from ztserve.gateway.connection import Connection
from ztserve.gateway.desk import Desk
from ztserve.gateway.limits import Limits
from ztserve.gateway.routes import Deployment, Routes
from ztserve.gateway.tls import Edge
from ztserve.identity import Quarantine, Source

_LOG = logging.getLogger(__name__)

_LOOK_S = 0.25
_TELL_S = 1.0
_BACKLOG = 256


class Gateway:
    """Takes HTTPS from verified clients and passes it on to deployments over mTLS.

    Args:
        source: our own identity and the bundles to judge clients by, followed live.
        policies: who may ask for what here; the deployments judge again.
        deployments: a `transport.AsyncClient` for each, by the deployment's name. From
            `start` on they are this gateway's, which closes them.
        log: where each call is recorded before its answer ends.
        address: host and port to listen on; port 0: any free one.
        limits: bounds on what the outside may send, hold and keep waiting.
        quarantine: who is refused although their SVID holds; None: nobody.

    Raises ConfigError without a deployment, IdentityError without an identity.

    """

    def __init__(
        self,
        *,
        source: Source,
        policies: PolicySet,
        deployments: Mapping[str, Deployment],
        log: Log,
        address: tuple[str, int] = ("127.0.0.1", 8443),
        limits: Limits = Limits(),  # noqa: B008 - frozen
        quarantine: Quarantine | None = None,
    ) -> None:
        self._edge = Edge(source)
        self._policies = policies
        self._routes = Routes(deployments)
        self._log = log
        self._address = address
        self._limits = limits
        self._quarantine = quarantine
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._ending = asyncio.Event()
        self._grace_s = 0.0

    def start(self) -> tuple[str, int]:
        """Listen; return host and port. ConfigError where that address is taken."""
        if self._thread is not None:
            raise ConfigError("this gateway has been started already")
        listening = _listen(*self._address)
        host, port = listening.getsockname()[:2]
        desk = Desk(
            edge=self._edge,
            policies=self._policies,
            routes=self._routes,
            log=self._log,
            limits=self._limits,
            port=port,
            quarantine=self._quarantine,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._run, args=(desk, listening), name="ztserve-gateway"
        )
        self._thread.start()
        return host, port

    def stop(self, grace_s: float = 5.0) -> None:
        """Take no more requests, let the running ones end, and close everything.

        May be called again.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._grace_s = grace_s
        self._loop.call_soon_threadsafe(self._ending.set)
        thread.join()

    def _run(self, desk: Desk, listening: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(desk, listening))

    async def _serve(self, desk: Desk, listening: socket.socket) -> None:
        server = await self._loop.create_server(
            lambda: Connection(desk), sock=listening, backlog=_BACKLOG
        )
        watch = self._loop.create_task(_watch(desk))
        try:
            # Where one cannot begin now, its first call says why.
            beginning = [one.start() for one in self._routes.all()]
            await asyncio.gather(*beginning, return_exceptions=True)
            await self._ending.wait()
        finally:
            server.close()
            await self._drain(desk)
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
            for deployment in self._routes.all():
                await deployment.close()
            desk.flush()

    async def _drain(self, desk: Desk) -> None:
        """Let what is being answered end, then close what is left."""
        open_ones = list(desk.connections)
        for connection in open_ones:
            connection.finish()
        left = {connection.closed for connection in open_ones}
        if left:
            _, left = await asyncio.wait(left, timeout=self._grace_s)
        for connection in desk.connections:
            connection.abort()
        if left:
            await asyncio.wait(left)


async def _watch(desk: Desk) -> None:
    """Keep time for all connections, and their identities and refusals in view."""
    told = time.monotonic()
    while True:
        await asyncio.sleep(_LOOK_S)
        now = time.monotonic()
        for connection in list(desk.connections):
            connection.look(now)
            connection.judge()
        if now - told >= _TELL_S:
            told = now
            desk.flush()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=_BACKLOG,
        )
    except OSError as error:
        raise ConfigError(
            f"the gateway cannot listen on {host}:{port}: {error.strerror}; choose "
            "another [gateway] port"
        ) from error
