"""One request of a client, from who asks to the answer, in one straight line.

::

    Head ─▶ Peer ─▶ Call ─▶ authorization ─▶ body ─▶ deployment ─▶ answer
                    └────────── one audit record around it ─────────┘
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from ztserve.errors import Denied, InvalidInput, NotFound, Unauthenticated
from ztserve.gateway import payload, response
from ztserve.gateway.routes import asked, operation
from ztserve.identity import SpiffeId
from ztserve.types import Call, Caller, Operation, Peer, Request, Tensor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from typing import Literal

    from ztserve.audit import Record
    from ztserve.gateway.connection import Connection
    from ztserve.gateway.desk import Desk
    from ztserve.gateway.head import Head
    from ztserve.gateway.routes import Deployment

_LOG = logging.getLogger(__name__)

_INLINE_BYTES = 64 * 1024
"""What is larger is turned on a thread, so that others need not wait for it."""
_READY_S = 2.0


class Visit:
    """One request of one connection; `id` names it in the audit and to the client."""

    __slots__ = ("_connection", "_desk", "_head", "_wanted", "id")

    def __init__(
        self, desk: Desk, connection: Connection, head: Head, call_id: str
    ) -> None:
        self._desk = desk
        self._connection = connection
        self._head = head
        self._wanted = asked(head)
        self.id = call_id

    async def walk(self) -> None:
        """Answer the request. The record is written before the answer ends.

        Raises Malformed, CallError, InferenceError, AuditError.
        """
        desk = self._desk
        call = self._call(self._peer())
        with desk.log.record(call) as record, desk.places.request(call.peer.id):
            desk.check(call.peer)
            self._authorize(call, record)
            if not self._wanted.method:
                raise NotFound("there is no such path here")
            if self._wanted.method == "ServerReady":
                status, answer = await self._ready()
            else:
                with desk.places.body(self._head.length):
                    status, answer = 200, await self._forward(call, record)
            record.described()
        if answer:
            await self._connection.out.reply(status, answer, self.id)
        else:
            await self._connection.out.last_event(self.id)

    # --- who, and may they --------------------------------------------------------

    def _peer(self) -> Peer:
        """Return who asks, as judged at this moment. Raises Unauthenticated."""
        chain = self._connection.chain
        if not chain:
            self._desk.refused("no client certificate", self._connection.address)
            raise Unauthenticated(
                "show a client certificate: an SVID of a trust domain that is "
                "known here"
            )
        try:
            return self._desk.edge.peer(chain)
        except Unauthenticated as error:
            self._desk.refused("client certificate refused", self._connection.address)
            _LOG.info("from %s: %s", self._connection.address, error)
            raise

    def _call(self, peer: Peer) -> Call:
        head, connection = self._head, self._connection
        return Call(
            id=self.id,
            peer=peer,
            caller=None,
            operation=self._operation(),
            deadline=time.monotonic() + self._desk.limits.max_call_s,
            headers=head.headers,
            host=head.host,
            port=self._desk.port,
            source_ip=connection.address,
            source_port=connection.port,
            notes=(f"dropped {', '.join(head.dropped)}",) if head.dropped else (),
            cancelled=lambda: connection.gone,
        )

    def _operation(self) -> Operation:
        """Return what is asked for, under the names that are known without a body."""
        method, model = self._wanted
        if not method:
            verb = cast("Literal['GET', 'POST']", self._head.method)
            return Operation(verb, frozenset((self._head.path,)), self._head.path)
        sole = self._desk.routes.sole
        return operation(method, model or (sole.model if sole else ""))

    def _authorize(self, call: Call, record: Record) -> None:
        decision = self._desk.policies.authorize(call)
        record.rule, record.shadow = decision.rule, decision.shadow
        record.stage("authorization")

    # --- what for -------------------------------------------------------------------

    async def _receive(self, call: Call, record: Record) -> tuple[Request, Deployment]:
        """Read the body, and find whom it is for.

        Where the body tells more of the operation's names, all are judged again.
        """
        body = await self._connection.body()
        request = await _read(body)
        record.received(request)
        in_path = self._wanted.model
        if in_path and request.model not in ("", in_path):
            raise InvalidInput("model_name is another one than the path has")
        deployment = await self._desk.routes.known(in_path or request.model)
        # By its own name, whatever name it was called by.
        model = deployment.model or in_path or request.model
        known = operation(self._wanted.method, model)
        if known.names != call.operation.names:
            self._authorize(replace(call, operation=known), record)
        record.model = model
        return replace(request, model=model), deployment

    async def _forward(self, call: Call, record: Record) -> bytes:
        """Return what the deployment answers, or b"" once it has been streamed."""
        request, deployment = await self._receive(call, record)
        limits, peer = self._desk.limits, call.peer.id
        domain = SpiffeId.parse(peer).trust_domain
        caller = Caller(domain, str(peer), proof="x509-svid")
        if self._wanted.method == "ModelInfer":
            outputs = await deployment.send(
                request, timeout_s=limits.max_call_s, caller=caller
            )
            record.stage("forwarding")
            answer = await _written(request, outputs)
            record.bytes_out = len(answer)
            return answer
        pieces = deployment.send_stream(
            request, timeout_s=limits.max_stream_s, caller=caller
        )
        async with aclosing(cast("AsyncGenerator[tuple[Tensor, ...]]", pieces)):
            async for outputs in pieces:
                piece = await _written(request, outputs)
                # Before the first piece leaves, the audit knows of it.
                record.released(None, last=False)
                record.bytes_out += len(piece)
                await self._connection.out.event(response.event(piece), self.id)
        record.stage("forwarding")
        return b""

    async def _ready(self) -> tuple[int, bytes]:
        """Tell whether every deployment answers, and is ready."""
        asked_all = [one.ready(timeout_s=_READY_S) for one in self._desk.routes.all()]
        answers = await asyncio.gather(*asked_all, return_exceptions=True)
        # One that may not tell us so has at least answered.
        ready = all(one is True or isinstance(one, Denied) for one in answers)
        return (200, b'{"ready": true}') if ready else (503, b'{"ready": false}')


async def _read(body: bytes) -> Request:
    if len(body) > _INLINE_BYTES:
        return await asyncio.to_thread(payload.read_request, body)
    return payload.read_request(body)


async def _written(request: Request, outputs: tuple[Tensor, ...]) -> bytes:
    if sum(len(one.data) for one in outputs) > _INLINE_BYTES:
        return await asyncio.to_thread(payload.write_reply, request, outputs)
    return payload.write_reply(request, outputs)
