"""One call of a client, between the loop that carries it and whoever waits for it."""

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from ztserve.errors import (
    InferenceError,
    Interrupted,
    InvalidInput,
    ZTServeError,
)
from ztserve.transport import heads, messages, status
from ztserve.transport.http2 import Fields, Response, encode
from ztserve.transport.loop.carrier import guarded
from ztserve.transport.retry import Attempts

if TYPE_CHECKING:
    from ztserve.transport.loop.link import Link

PAY_BYTES = 64 * 1024
"""Of an answer: what was dealt with is told to the server in steps of at least so
much, which is a small part of a stream's window."""


class ClientCall(ABC):
    """A call: made by whoever waits, then carried by the loop, which alone changes it.

    `post` has something done on that loop. The server's answer may have messages of
    at most `most` bytes.
    """

    def __init__(
        self,
        path: str,
        message: bytes,
        *,
        attempts: Attempts,
        server: str,
        post: Callable[..., object],
        metadata: tuple[tuple[str, str | bytes], ...] = (),
        most: int,
    ) -> None:
        self.path = path
        self.body = messages.body(message)
        self.metadata = encode(heads.fields_of(metadata)) if metadata else b""
        self.server = server
        self._attempts = attempts
        self.stream_id = 0
        self.link: Link | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.over = False
        self.error: ZTServeError | None = None
        """Why it failed, once it is over."""
        self._post = post
        self._arrived: deque[bytes] = deque()
        self._body = messages.Reassembly(most)
        self._unpaid = 0
        """Bytes of the answer that the server has not been told of."""
        self._came = self._taken = 0
        """Bytes of whole messages: counted by the loop, and by whoever waits."""
        self._waiting = False

    # --- the loop's side --------------------------------------------------------

    @abstractmethod
    def _tell(self) -> None:
        """Wake whoever waits."""

    def left_s(self) -> float:
        """Return the seconds until its deadline."""
        return self._attempts.deadline - time.monotonic()

    def expire(self) -> None:
        """End the call at its deadline."""
        self.cancel(self._attempts.late())

    def finish(self, error: ZTServeError | None) -> None:
        """Note how the call ended; what is told later changes nothing."""
        if self.over:
            return
        self._pay(self._unpaid)  # or the window of the whole connection would shrink
        self.over, self.error, self.link = True, error, None
        if self.timer is not None:
            self.timer.cancel()
        self._tell()

    def head(self, head: Response | Fields, *, ended: bool) -> None:
        """Take the head of the answer, or its trailers."""
        if isinstance(head, Response):
            refused = heads.answered(head)
            if refused is not None:
                self._end(refused)
                return
            if ended:
                self._read_end(head.fields)
        elif self._body.held:
            self._broken("the answer ends within a message")
        else:
            self._read_end(head)

    def feed(self, data: bytes, *, ended: bool) -> None:
        """Take a piece of the answer."""
        self._unpaid += len(data)
        try:
            for message in self._body.feed(data):
                self._came += len(message) + messages.PREFIX_BYTES
                self._arrived.append(message)
        except InvalidInput as error:
            public = "the answer is larger than this client takes"
            self.cancel(InvalidInput(public, f"{public}: {error.reason}"))
            return
        except messages.Unreadable as error:
            self._broken(error.reason)
            return
        if self._owed() >= PAY_BYTES:
            self.pay()
        if ended:
            self._broken("the answer ends without a grpc-status")
        elif self._waiting and self._arrived:
            self._tell()

    def pay(self) -> None:
        """Let the server send as much as was dealt with."""
        self._pay(self._owed())

    def _pay(self, count: int) -> None:
        if count > 0 and self.link is not None:
            self._unpaid -= count
            self.link.consumed(self.stream_id, count)

    def _owed(self) -> int:
        """Return how much was dealt with.

        That is not what lies in messages which nobody has taken: a slow reader would
        have us hold ever more of them. It is what came of a message that is not whole,
        which may be larger than any window.
        """
        return self._unpaid - (self._came - self._taken)

    def cancel(self, error: ZTServeError) -> None:
        """End the call from our side, before its time."""
        link = self.link
        if link is not None:
            link.cancel(self)
        self.finish(error)

    def _read_end(self, trailers: Fields) -> None:
        try:
            self._end(heads.status(trailers))
        except messages.Unreadable as error:
            self._broken(error.reason)

    def _end(self, found: heads.Status) -> None:
        if found.code == 0:
            self.finish(None)
            return
        self.finish(
            status.translated(found.code, found.message, found.metadata, self.server)
        )

    def _broken(self, reason: str) -> None:
        public = f"{self.server} answered what cannot be read; the call may have run"
        self.cancel(Interrupted(public, f"{public}: {reason}"))

    # --- the waiting side -------------------------------------------------------

    def let_go(self) -> None:
        """Have the call end, if it has not."""
        if not self.over:
            self._post(self.cancel, Interrupted("this client ended the call"))

    def _only(self) -> bytes:
        """Return the one message of a call that is over."""
        if self.error is not None:
            raise self.error
        if len(self._arrived) != 1:
            raise InferenceError(
                f"{self.server} answered {len(self._arrived)} messages, not one"
            )
        return self._arrived[0]

    def _next(self) -> bytes | None:
        """Return a message, None at the end. Raises the error that ended the call."""
        if not self._arrived:
            if self.error is not None:
                raise self.error
            return None
        message = self._arrived.popleft()
        self._taken += len(message) + messages.PREFIX_BYTES
        if self._owed() >= PAY_BYTES:
            self._post(self.pay)
        return message


class BlockingCall(ClientCall):
    """A call that a thread waits for, not the loop's own."""

    def __init__(self, path: str, message: bytes, **given: Any) -> None:
        super().__init__(path, message, **given)
        # A binary semaphore: the loop alone releases it, the waiting thread takes it.
        self._news = threading.Lock()
        self._news.acquire()

    def result(self) -> bytes:
        """Wait for the answer of a unary call; return it or raise its error."""
        while not self.over:
            self._news.acquire()
        return self._only()

    def __iter__(self) -> Iterator[bytes]:
        """Yield the messages of the answer; raises the error that it ends in."""
        while True:
            self._waiting = True
            while not self._arrived and not self.over:
                self._news.acquire()
            self._waiting = False
            message = self._next()
            if message is None:
                return
            yield message

    def _tell(self) -> None:
        if self._news.locked():
            self._news.release()


class AwaitedCall(ClientCall):
    """A call that a task of the same loop waits for."""

    def __init__(self, path: str, message: bytes, **given: Any) -> None:
        super().__init__(path, message, post=guarded, **given)
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[None] | None = None

    async def result(self) -> bytes:
        """As `BlockingCall.result`."""
        while not self.over:
            await self._wait()
        return self._only()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """As `BlockingCall.__iter__`."""
        while True:
            while not self._arrived and not self.over:
                await self._wait()
            message = self._next()
            if message is None:
                return
            yield message

    async def _wait(self) -> None:
        self._news = self._loop.create_future()
        self._waiting = True
        try:
            await self._news
        finally:
            self._waiting = False

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
