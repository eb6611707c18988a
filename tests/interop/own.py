"""Our own client as a driver of the cases, blocking and awaited.

It sends exactly one request a call and then half-closes, by design; what cannot be had
so raises NotOffered.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Protocol, TypeAlias

import grpc

from tests.interop.drivers import DRIVERS, LONGEST_S, Conversation, End, Metadata, Shape
from tests.unit.transport.support import SERVER
from ztserve.errors import CallError, ZTServeError
from ztserve.identity import Source, SpiffeId
from ztserve.transport import protocol, status
from ztserve.transport.loop.call import AwaitedCall, BlockingCall, ClientCall
from ztserve.transport.loop.channel import Channel, Expected
from ztserve.transport.loop.thread import LoopThread
from ztserve.transport.retry import Attempts, Budget
from ztserve.transport.tls import Ends

ONE = "not offered: our client sends one request a call"
PLAIN = "not offered: our client does not compress"
ABSENT_HERE = {
    "client_compressed_unary": PLAIN,
    "client_compressed_streaming": PLAIN,
    "client_streaming": ONE,
    "ping_pong": ONE,
    "empty_stream": ONE,
    "cancel_after_begin": ONE,
    "cancel_after_first_response": ONE,
}
"""The cases that end in NotOffered, all of them, and why."""
GIVEN_UP = "this client ended the call"
_TOLD = re.compile(r"([A-Z_]+): (.*) \(spiffe://[^)]*\)", re.DOTALL)
"""How `status.translated` tells of a status that came without an error's name."""


class NotOffered(Exception):
    """Our client does not do this; the message says why."""


Begun: TypeAlias = tuple[ClientCall, Iterator[bytes]]
"""A call, and the messages of its answer."""


class Where(Protocol):
    """A server, and who we are to it."""

    source: Source

    @property
    def address(self) -> str: ...


class Own:
    """What both have in common: one channel, on a loop in a thread of its own."""

    def __init__(self, served: Where) -> None:
        self._address = served.address
        ends = Ends(served.source)
        self._expected = Expected(ends, SpiffeId.parse(SERVER), None)
        self.thread = LoopThread("interop")
        self.channel = self.wait(self._made())

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Have `work` done on the loop."""
        return self.thread.run(work).result(LONGEST_S + 5)

    async def _made(self) -> Channel:
        return Channel(self._address, self._expected)

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
        if compressed:
            raise NotOffered(PLAIN)
        if shape is Shape.CLIENT_STREAM:
            raise NotOffered(ONE)
        # As a client does each second: what a server may do so often counts anew.
        self.thread.post(lambda: self.channel.look(time.monotonic()))

        def begin(message: bytes) -> Begun:
            more: Any = {
                "attempts": Attempts(Budget(), timeout_s),
                "server": SERVER,
                "metadata": metadata,
                "most": protocol.MAX_MESSAGE_BYTES,
            }
            return self.begun(path, message, more, is_one=shape is Shape.UNARY)

        call = OneRequest(begin, shape, self.thread)
        if shape is not Shape.BIDI:
            call.send(request)
            call.half_close()
        return call

    def begun(self, path: str, message: bytes, more: Any, *, is_one: bool) -> Begun:
        """Begin a call; return it, and the messages of its answer."""
        raise NotImplementedError

    def reconnect(self) -> None:
        """Tear the connection down."""
        self.thread.post(self.channel.leave)
        self.channel = self.wait(self._made())

    def close(self) -> None:
        async def last() -> None:
            self.channel.leave()
            while not self.channel.is_closed:
                await asyncio.sleep(0.01)

        self.thread.close(last())
        self.thread.join(5)


class Blocking(Own):
    """`BlockingCall`, as `Client` uses it."""

    def begun(self, path: str, message: bytes, more: Any, *, is_one: bool) -> Begun:
        call = BlockingCall(path, message, post=self.thread.post, **more)
        self.thread.post(self.channel.begin, call)
        return call, _results(call) if is_one else iter(call)


def _results(call: BlockingCall) -> Iterator[bytes]:
    yield call.result()


class Awaited(Own):
    """`AwaitedCall`, as `AsyncClient` uses it."""

    def begun(self, path: str, message: bytes, more: Any, *, is_one: bool) -> Begun:
        async def begin() -> AwaitedCall:
            call = AwaitedCall(path, message, **more)
            self.channel.begin(call)
            return call

        call = self.wait(begin())
        return call, self._waited(_awaited(call) if is_one else aiter(call))

    def _waited(self, answer: AsyncIterator[bytes]) -> Iterator[bytes]:
        async def following() -> bytes | None:
            return await anext(answer, None)

        while (message := self.wait(following())) is not None:
            yield message


async def _awaited(call: AwaitedCall) -> AsyncIterator[bytes]:
    yield await call.result()


class OneRequest:
    """A call that begins when its one request is known."""

    def __init__(
        self, begin: Callable[[bytes], Begun], shape: Shape, thread: LoopThread
    ) -> None:
        self._begin, self._shape, self._thread = begin, shape, thread
        self._request: bytes | None = None
        self._begun: Begun | None = None
        self._end: End | None = None

    def send(self, message: bytes) -> None:
        if self._request is not None:
            raise NotOffered(ONE)
        self._request = message

    def half_close(self) -> None:
        if self._request is None:
            raise NotOffered(ONE)
        if self._begun is None:
            self._begun = self._begin(self._request)

    def receive(self) -> bytes | None:
        self.half_close()
        assert self._begun is not None
        if self._end is None:
            try:
                for message in self._begun[1]:
                    return message
                self._end = End(0, "")
            except ZTServeError as error:
                self._end = _end(error)
        return None

    def cancel(self) -> None:
        if self._shape is Shape.BIDI or self._begun is None:
            raise NotOffered(ONE)  # it may have ended: its request was whole at once
        self._thread.post(self._begun[0].let_go)

    def end(self) -> End:
        while self._end is None:
            self.receive()
        return self._end


def _end(error: ZTServeError) -> End:
    """Return the status that an error stands for."""
    told = _TOLD.fullmatch(str(error))
    if told is not None:
        with contextlib.suppress(KeyError):
            return End(grpc.StatusCode[told[1]].value[0], told[2])
    said = error.public if isinstance(error, CallError) else str(error)
    if said == GIVEN_UP:
        return End(grpc.StatusCode.CANCELLED.value[0], said)
    return End(status.status(error).code, said)


OWN = {"ztserve Client": Blocking, "ztserve AsyncClient": Awaited}
"""By the name that docs/interop.md has for each."""
EVERY: dict[str, Callable[..., Any]] = {**DRIVERS, **OWN}
