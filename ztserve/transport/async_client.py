"""The client for event loops."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Self, cast

from ztserve.errors import Unavailable, ZTServeError
from ztserve.identity import JwtSource, Quarantine, Source, SpiffeId
from ztserve.transport import protocol, values
from ztserve.transport.loop.call import AwaitedCall
from ztserve.transport.loop.channel import Channel
from ztserve.transport.protocol import NONE, Metadata
from ztserve.transport.retry import UNFIT, Attempts, Budget
from ztserve.transport.route import Route
from ztserve.transport.upkeep import Upkeep
from ztserve.types import Caller, Request, Tensor, Value


class AsyncClient:
    """As `Client`, for use on one event loop: the loop of its first call.

    It can be made anywhere, also where no loop runs yet.
    """

    def __init__(  # noqa: PLR0913 - who, whom, where and how long
        self,
        target: str,
        *,
        source: Source,
        server_id: str | None = None,
        directory: str | None = None,
        directory_id: str | None = None,
        model: str = "",
        timeout_s: float = protocol.TIMEOUT_S,
        quarantine: Quarantine | None = None,
        tokens: JwtSource | None = None,
    ) -> None:
        self._route = Route(
            target, source, server_id, directory, directory_id, quarantine
        )
        self._model = model
        self._timeout_s = timeout_s
        self._tokens = tokens
        self._budget = Budget()
        self._datatypes: Mapping[str, str] | None = None
        self._upkeep: Upkeep | None = None
        self._closed = False

    @property
    def server_id(self) -> SpiffeId:
        """The SPIFFE ID that the server must prove."""
        return self._route.server

    @property
    def model(self) -> str:
        """The model's name; empty where neither we nor the directory were told."""
        return self._model or self._route.model

    async def infer(
        self,
        inputs: Mapping[str, values.Given],
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        caller: Caller | None = None,
        datatypes: Mapping[str, str] = NONE,
    ) -> dict[str, Value]:
        """Return the model's outputs by name; see `Client.infer`."""
        request = await self._request(inputs, model, datatypes)
        answer = await self.send(request, timeout_s=timeout_s, caller=caller)
        return values.values(answer)

    async def stream(
        self,
        inputs: Mapping[str, values.Given],
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        caller: Caller | None = None,
        datatypes: Mapping[str, str] = NONE,
    ) -> AsyncIterator[dict[str, Value]]:
        """Yield the model's outputs piece by piece; see `Client.infer`."""
        request = await self._request(inputs, model, datatypes)
        pieces = self.send_stream(request, timeout_s=timeout_s, caller=caller)
        async for piece in pieces:
            yield values.values(piece)

    async def metadata(self, *, timeout_s: float | None = None) -> Metadata:
        """Return what the deployment tells of itself."""
        message = await self._unary(protocol.METADATA, protocol.ASK_METADATA, timeout_s)
        return protocol.metadata(message)

    async def ready(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the deployment says that it is ready."""
        message = await self._unary(protocol.READY, protocol.ASK_READY, timeout_s)
        return protocol.ready(message)

    async def example(self) -> dict[str, values.Given]:
        """Return an input of zeros, as the model declares its inputs."""
        return (await self.metadata()).example()

    async def send(
        self,
        request: Request,
        *,
        timeout_s: float | None = None,
        caller: Caller | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the answer to a request that is made already."""
        message = values.message(request)
        answer = await self._unary(protocol.INFER, message, timeout_s, caller)
        return protocol.answer(answer)

    async def send_stream(
        self,
        request: Request,
        *,
        timeout_s: float | None = None,
        caller: Caller | None = None,
    ) -> AsyncIterator[tuple[Tensor, ...]]:
        """Yield the answer to a request that is made already, piece by piece."""
        message = values.message(request)
        headers = await self._headers(caller, message)
        attempts = Attempts(self._budget, timeout_s or protocol.STREAM_TIMEOUT_S)
        while True:
            channel = await self._channel(attempts)
            error: Exception | None = None
            started, call = False, None
            try:
                call = self._begun(channel, protocol.STREAM, message, headers, attempts)
                async for one in call:
                    started = True
                    yield protocol.piece(one, self.server_id)
                self._budget.earn()
                return
            except ZTServeError as failed:
                error = failed
            finally:
                if call is not None:
                    call.let_go()
                self._give_back(channel, error)
            if started:
                raise protocol.midway(error)
            await asyncio.sleep(attempts.pause_s(error, channel.address))

    async def start(self) -> None:
        """Begin to follow source and directory; the first call does it otherwise."""
        if self._upkeep is None:
            self._upkeep = Upkeep(self._route)

    async def close(self) -> None:
        """Take no more calls; those that run may end. May be called again."""
        self._closed = True
        if self._upkeep is not None:
            await self._upkeep.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(protocol.CLOSE_S):
                    await self._upkeep.emptied()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _request(
        self,
        inputs: Mapping[str, values.Given],
        model: str | None,
        datatypes: Mapping[str, str],
    ) -> Request:
        if protocol.undeclared(inputs, datatypes):
            datatypes = {**await self._declared(), **datatypes}
        named = self.model if model is None else model
        return values.request(inputs, model=named, datatypes=datatypes)

    async def _declared(self) -> Mapping[str, str]:
        if self._datatypes is None:
            try:
                self._datatypes = (await self.metadata()).datatypes
            except protocol.MAY_NOT_ASK:
                self._datatypes = NONE
        return self._datatypes

    async def _headers(self, caller: Caller | None, message: bytes) -> protocol.Headers:
        server, tokens = self._route.server, self._tokens
        if tokens is None or tokens.is_held(server):
            return protocol.headers(caller, server, message, tokens)
        # The agent is asked, which takes a while.
        return await asyncio.to_thread(
            protocol.headers, caller, server, message, tokens
        )

    async def _unary(
        self,
        path: str,
        message: bytes,
        timeout_s: float | None,
        caller: Caller | None = None,
    ) -> bytes:
        headers = await self._headers(caller, message)
        attempts = Attempts(self._budget, timeout_s or self._timeout_s)
        while True:
            channel = await self._channel(attempts)
            error: Exception | None = None
            call = None
            try:
                call = self._begun(channel, path, message, headers, attempts)
                answer = await call.result()
                self._budget.earn()
                return answer
            except ZTServeError as failed:
                error = failed
            finally:
                if call is not None:
                    call.let_go()
                self._give_back(channel, error)
            await asyncio.sleep(attempts.pause_s(error, channel.address))

    async def _channel(self, attempts: Attempts) -> Channel:
        if self._closed:
            raise Unavailable("this client is closed")
        await self.start()
        upkeep = cast("Upkeep", self._upkeep)
        return upkeep.channel(attempts) or await upkeep.known(attempts)

    def _begun(
        self,
        channel: Channel,
        path: str,
        message: bytes,
        headers: protocol.Headers,
        attempts: Attempts,
    ) -> AwaitedCall:
        call = AwaitedCall(
            path,
            message,
            attempts=attempts,
            server=self.server_id,
            metadata=headers,
            most=protocol.MAX_MESSAGE_BYTES,
        )
        channel.begin(call)
        return call

    def _give_back(self, channel: Channel, error: Exception | None) -> None:
        self._route.replicas.give_back(channel, refused=isinstance(error, UNFIT))
