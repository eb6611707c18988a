"""The client for threads."""

import time
from collections.abc import Iterator, Mapping
from typing import Self

from ztserve.errors import Unavailable, ZTServeError
from ztserve.identity import JwtSource, Quarantine, Source, SpiffeId
from ztserve.transport import protocol, values
from ztserve.transport.loop.call import BlockingCall
from ztserve.transport.loop.channel import Channel
from ztserve.transport.loop.thread import LoopThread
from ztserve.transport.protocol import NONE, Metadata
from ztserve.transport.retry import UNFIT, Attempts, Budget
from ztserve.transport.route import Route
from ztserve.transport.upkeep import Upkeep
from ztserve.types import Caller, Request, Tensor, Value


class Client:
    """Calls one deployment over mutual TLS, its exact SPIFFE ID verified.

    Args:
        target: ``host:port``, or ``namespace/service`` to find the replicas, now and
            at each change, in the directory.
        source: our own identity, followed live.
        server_id: the SPIFFE ID that the server must prove. Needed with ``host:port``;
            else by default that of namespace and service in our own trust domain.
        directory: ``host:port`` of the directory door.
        directory_id: its SPIFFE ID, by default ``ns/ztserve/sa/directory``.
        model: the model's name; by default whatever the deployment serves.
        timeout_s: for calls that are given none.
        quarantine: servers that are not called although their SVID holds, by SPIFFE ID;
            None: no such.
        tokens: what gives each call a JWT-SVID of ours; None: it bears none.

    Thread-safe. Each error of `ztserve.errors` that the server raised is raised here
    again. A call that surely did not run is tried again, on another replica if there
    is one, a few times within its timeout; `Interrupted` means that it may have run.

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
        self._closed = False
        self._thread = LoopThread("ztserve-client")
        self._upkeep = self._thread.run(_upkeep(self._route)).result()

    @property
    def server_id(self) -> SpiffeId:
        """The SPIFFE ID that the server must prove."""
        return self._route.server

    @property
    def model(self) -> str:
        """The model's name; empty where neither we nor the directory were told."""
        return self._model or self._route.model

    def infer(
        self,
        inputs: Mapping[str, values.Given],
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        caller: Caller | None = None,
        datatypes: Mapping[str, str] = NONE,
    ) -> dict[str, Value]:
        """Return the model's outputs by name: arrays, and texts as `str`.

        `inputs` are arrays, texts or (nested) lists by name; a list takes the datatype
        that the model declares, `datatypes` overrides by name. `caller` is the end
        user on whose behalf we call; the server believes it of its delegates only.
        Raises CallError, InferenceError or IdentityError.
        """
        request = self._request(inputs, model, datatypes)
        return values.values(self.send(request, timeout_s=timeout_s, caller=caller))

    def stream(
        self,
        inputs: Mapping[str, values.Given],
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        caller: Caller | None = None,
        datatypes: Mapping[str, str] = NONE,
    ) -> Iterator[dict[str, Value]]:
        """Yield the model's outputs piece by piece; see `infer`."""
        request = self._request(inputs, model, datatypes)
        for piece in self.send_stream(request, timeout_s=timeout_s, caller=caller):
            yield values.values(piece)

    def metadata(self, *, timeout_s: float | None = None) -> Metadata:
        """Return what the deployment tells of itself."""
        message = self._unary(protocol.METADATA, protocol.ASK_METADATA, timeout_s)
        return protocol.metadata(message)

    def ready(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the deployment says that it is ready."""
        message = self._unary(protocol.READY, protocol.ASK_READY, timeout_s)
        return protocol.ready(message)

    def example(self) -> dict[str, values.Given]:
        """Return an input of zeros, as the model declares its inputs."""
        return self.metadata().example()

    def call(
        self,
        path: str,
        message: bytes,
        *,
        timeout_s: float | None = None,
        metadata: protocol.Headers = (),
        max_bytes: int | None = None,
    ) -> bytes:
        """Return the answer to one unary call of another service than inference.

        `path` is ``/package.Service/Method``; message and answer (of at most
        `max_bytes`, by default 64 MiB) are protobuf's bytes. Raises as `infer`.
        """
        return self._unary(
            path, message, timeout_s, metadata=metadata, max_bytes=max_bytes
        )

    def send(
        self,
        request: Request,
        *,
        timeout_s: float | None = None,
        caller: Caller | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the answer to a request that is made already."""
        message = values.message(request)
        answer = self._unary(protocol.INFER, message, timeout_s, caller)
        return protocol.answer(answer)

    def send_stream(
        self,
        request: Request,
        *,
        timeout_s: float | None = None,
        caller: Caller | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the answer to a request that is made already, piece by piece."""
        message = values.message(request)
        headers = protocol.headers(caller, self.server_id, message, self._tokens)
        attempts = Attempts(self._budget, timeout_s or protocol.STREAM_TIMEOUT_S)
        while True:
            channel = self._channel(attempts)
            error: Exception | None = None
            started, call = False, None
            try:
                call = self._begun(channel, protocol.STREAM, message, headers, attempts)
                for one in call:
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
            time.sleep(attempts.pause_s(error, channel.address))

    def close(self) -> None:
        """Take no more calls; those that run may end. May be called again."""
        if not self._closed:
            self._closed = True
            self._thread.run(self._upkeep.close()).result()
            self._thread.close(self._upkeep.emptied())
        if not self._route.replicas.in_flight:
            self._thread.join(protocol.CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(
        self,
        inputs: Mapping[str, values.Given],
        model: str | None,
        datatypes: Mapping[str, str],
    ) -> Request:
        if protocol.undeclared(inputs, datatypes):
            datatypes = {**self._declared(), **datatypes}
        named = self.model if model is None else model
        return values.request(inputs, model=named, datatypes=datatypes)

    def _declared(self) -> Mapping[str, str]:
        if self._datatypes is None:
            try:
                self._datatypes = self.metadata().datatypes
            except protocol.MAY_NOT_ASK:
                self._datatypes = NONE
        return self._datatypes

    def _unary(
        self,
        path: str,
        message: bytes,
        timeout_s: float | None,
        caller: Caller | None = None,
        *,
        metadata: protocol.Headers = (),
        max_bytes: int | None = None,
    ) -> bytes:
        headers = protocol.headers(caller, self.server_id, message, self._tokens)
        headers += metadata
        attempts = Attempts(self._budget, timeout_s or self._timeout_s)
        while True:
            channel = self._channel(attempts)
            error: Exception | None = None
            call = None
            try:
                call = self._begun(channel, path, message, headers, attempts, max_bytes)
                answer = call.result()
                self._budget.earn()
                return answer
            except ZTServeError as failed:
                error = failed
            finally:
                if call is not None:
                    call.let_go()
                self._give_back(channel, error)
            time.sleep(attempts.pause_s(error, channel.address))

    def _channel(self, attempts: Attempts) -> Channel:
        if self._closed:
            raise Unavailable("this client is closed")
        found = self._upkeep.channel(attempts)
        if found is None:
            found = self._thread.run(self._upkeep.known(attempts)).result()
        return found

    def _begun(
        self,
        channel: Channel,
        path: str,
        message: bytes,
        headers: protocol.Headers,
        attempts: Attempts,
        max_bytes: int | None = None,
    ) -> BlockingCall:
        call = BlockingCall(
            path,
            message,
            attempts=attempts,
            server=self.server_id,
            post=self._thread.post,
            metadata=headers,
            most=max_bytes or protocol.MAX_MESSAGE_BYTES,
        )
        self._thread.post(channel.begin, call)
        return call

    def _give_back(self, channel: Channel, error: Exception | None) -> None:
        self._route.replicas.give_back(channel, refused=isinstance(error, UNFIT))


async def _upkeep(route: Route) -> Upkeep:
    return Upkeep(route)
