"""One stream of another agent's, followed through outages."""

import logging
import random
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

import grpc

from ztserve.errors import IdentityError

_LOG = logging.getLogger(__name__)
_Message_co = TypeVar("_Message_co", covariant=True)
_Message = TypeVar("_Message")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_LEAST_S = 0.02
"""Between two answers: what floods us is read no faster than that."""
_jitter = random.SystemRandom().uniform


class Stream(Protocol[_Message_co]):
    """What we use of a gRPC stream of responses."""

    def __iter__(self) -> Iterator[_Message_co]: ...

    def cancel(self) -> object:
        """End it."""


class Feed(Generic[_Message]):
    """What `connect` streams, given to `take` by a daemon thread: `start` to `close`.

    What `take` refuses with IdentityError is logged, and what was taken before stays.
    `denied` is called when the other side says PERMISSION_DENIED. A stream that ends
    is opened anew after 0.1 s, then ever less often, after 2 s at most.
    """

    def __init__(
        self,
        connect: Callable[[], Stream[_Message]],
        *,
        take: Callable[[_Message], None],
        denied: Callable[[str], None],
        name: str,
    ) -> None:
        self._connect, self._take, self._denied = connect, take, denied
        self.problem = "it has not answered in time"
        """What last went wrong."""
        self.heard = threading.Event()
        """Set once something was taken or denied."""
        self._stream: Stream[_Message] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=name, daemon=True)

    def start(self) -> None:
        """Begin. Raises RuntimeError where there can be no more threads."""
        self._thread.start()

    def close(self) -> None:
        """Follow no more; returns at once. May be called again."""
        self._closed.set()
        if (stream := self._stream) is not None:
            stream.cancel()

    def _follow(self) -> None:
        pause = _FIRST_PAUSE_S
        while not self._closed.is_set():
            try:
                for message in self._opened():
                    self._try(message)
                    pause = _FIRST_PAUSE_S
                    self._closed.wait(_LEAST_S)
                self._note("it ended the stream")
            except grpc.RpcError as error:
                code = error.code()
                self._note(f"{code.name}: {str(error.details())[:300]}")
                if code is grpc.StatusCode.PERMISSION_DENIED:
                    self._denied(self.problem)
                    self.heard.set()
            except Exception as error:  # noqa: BLE001
                # Whatever it is, a withdrawal may still be to come. Of a channel that
                # was closed, and we with it, nobody need hear.
                self._note(repr(error)[:300])
            self._closed.wait(_jitter(pause / 2, pause))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _opened(self) -> Iterator[_Message]:
        self._stream = stream = self._connect()
        try:
            if not self._closed.is_set():
                yield from stream
        finally:
            stream.cancel()

    def _try(self, message: _Message) -> None:
        try:
            self._take(message)
        except IdentityError as error:
            self._note(str(error))
        else:
            self.problem = ""
            self.heard.set()

    def _note(self, problem: str) -> None:
        if problem != self.problem and not self._closed.is_set():
            _LOG.warning("%s: %s", self._thread.name, problem)
        self.problem = problem
