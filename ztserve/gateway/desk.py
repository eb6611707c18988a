"""What all connections of one gateway share, and how a refusal is told."""

import logging
import os

from ztserve.audit import Log
from ztserve.authorization import PolicySet
from ztserve.errors import (
    CallError,
    InferenceError,
    Unauthenticated,
    ZTServeError,
)
from ztserve.gateway import response
from ztserve.gateway.connection import Connection
from ztserve.gateway.head import Head, Malformed
from ztserve.gateway.limits import Limits
from ztserve.gateway.outbox import Outbox
from ztserve.gateway.places import Places
from ztserve.gateway.routes import LIVE, Routes
from ztserve.gateway.tls import Edge
from ztserve.gateway.visit import Visit
from ztserve.identity import Quarantine
from ztserve.transport import RefusedHandshakes, http_status
from ztserve.types import Peer

_LOG = logging.getLogger(__name__)


class Desk:
    """Answers the requests of all connections. For one event loop."""

    def __init__(
        self,
        *,
        edge: Edge,
        policies: PolicySet,
        routes: Routes,
        log: Log,
        limits: Limits,
        port: int,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.edge = edge
        self.policies = policies
        self.routes = routes
        self.log = log
        self.limits = limits
        self.port = port
        self._quarantine = quarantine
        self.places = Places(limits)
        self.connections: set[Connection] = set()
        refusals = RefusedHandshakes(log.refused_handshakes)
        self.refused = refusals.add
        self.flush = refusals.tell

    async def answer(self, connection: Connection, head: Head) -> None:
        """Answer one request, whatever happens."""
        if (head.method, head.path) == ("GET", LIVE):
            # Who shows no certificate has nothing else to ask for here.
            connection.out.closes |= not connection.chain
            await connection.out.reply(200, b'{"live": true}')
            return
        visit = Visit(self, connection, head, os.urandom(16).hex())
        try:
            await visit.walk()
        except Exception as error:  # noqa: BLE001 - told to the client and the log
            await self._tell(connection.out, error, visit.id)

    def check(self, peer: Peer) -> None:
        """Raise CallError if `peer` is in quarantine, or no list can be used."""
        if self._quarantine is not None:
            self._quarantine.check(peer)

    async def _tell(self, out: Outbox, error: Exception, call_id: str) -> None:
        if isinstance(error, CallError):
            sentence = error.public
        else:
            model = isinstance(error, InferenceError)
            sentence = "the model failed on this request" if model else "internal error"
            unexpected = None if isinstance(error, ZTServeError) else error
            _LOG.error("call %s failed: %s", call_id, error, exc_info=unexpected)
        body = response.told(sentence, call_id)
        if out.streaming:
            await out.event(response.event(body, "error"), call_id)
            await out.last_event(call_id)
            return
        status = error.status if isinstance(error, Malformed) else http_status(error)
        out.closes |= isinstance(error, Malformed | Unauthenticated)
        await out.reply(status, body, call_id)
