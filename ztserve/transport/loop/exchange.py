"""One call between the loop, which carries it, and the thread that answers it."""

import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ztserve.errors import InvalidInput, Overloaded, ZTServeError
from ztserve.transport import heads, messages, status
from ztserve.transport.http2 import Block, Request
from ztserve.transport.loop.carrier import NEVER

if TYPE_CHECKING:
    from ztserve.transport.loop.credentials import Visitor
    from ztserve.transport.loop.wire import Wire

MAX_UNSENT_BYTES = 256 * 1024
"""Of a stream's answer that its caller has not taken; then its thread waits."""
_FAULT = heads.Status(status.Code.INTERNAL, "", ())
"""How a call ends that nobody could answer, by a fault of ours."""


class Cut(Exception):
    """The call ended before its message was whole."""


class Exchange:
    """A call on its stream: its metadata, its messages, and how it ends.

    The loop gives it what arrives (`feed`, `end`, `cut`); the thread that answers takes
    messages (`receive`) and says how the call ends (`status`).
    """

    def __init__(
        self, wire: "Wire", stream_id: int, request: Request, most: int
    ) -> None:
        """Raise messages.Unreadable where the head is not gRPC's."""
        self.stream_id = stream_id
        self._wire = wire
        self.metadata = heads.metadata(request.fields)
        self._most = most
        self._body = messages.Reassembly(most, gzip=heads.is_gzip(request.fields))
        timeout = heads.timeout_s(request.fields)
        self.due = NEVER if timeout is None else time.monotonic() + timeout
        """The caller's deadline (`time.monotonic`)."""
        self._arrived: deque[bytes | ZTServeError | None] = deque()
        """Messages; the fault that ends them; None for the end."""
        self._ready = threading.Condition()
        self._waiting = False
        self._owed = 0
        self._held = 0
        """Bytes that arrived and are not with the thread, as `wire.hold` knows them."""
        self._cut = self._ended = False
        self._faulty = False
        """Whether what arrived cannot be taken; so nor can what follows."""
        self.over = False
        """Whether nobody waits for the answer any more."""
        self._given = self._taken = 0
        """Bytes of the answer: what its thread has given, what the loop has taken."""
        self._stuck = False
        """Whether that thread waits until more may be given."""
        self._full = False
        """Whether the caller has not taken most of what was sent."""
        self.has_head = False
        """Whether the head of the answer has been sent."""
        self.status = _FAULT
        """How the call ends."""

    # --- the loop's side --------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._owed += len(data)
        if self._faulty:
            return
        found: list[bytes | ZTServeError | None] = []
        try:
            self._hold(self._held + len(data))
            found.extend(self._body.feed(data))
        except Overloaded as error:
            found.append(error)
        except InvalidInput as error:
            found.append(error)
        except messages.Unreadable as error:
            found.append(_no_grpc(error))
        if found:
            self._faulty = isinstance(found[-1], ZTServeError)
            self._arrive(found)
        elif self._waiting:
            self._pay()

    def end(self) -> None:
        """Note that the caller sends no more."""
        self._ended = True
        whole = not self._body.held
        self._arrive([None if whole else InvalidInput("a message is cut short")])

    @property
    def is_whole(self) -> bool:
        """Whether all that the caller will send is here."""
        return bool(self._arrived) and self._ended

    def cut(self) -> None:
        """Note that the stream or its connection ended early."""
        with self._ready:
            self._cut = self.over = True
            self._ready.notify()
        self._let_go()

    def sent(self, size: int, unsent: int) -> None:
        """Note that `size` bytes went to the stream, of which `unsent` wait there."""
        self._taken += size
        self._full = unsent > MAX_UNSENT_BYTES
        self._unstick()

    def drained(self) -> None:
        """Note that nothing waits there any more."""
        self._full = False
        self._unstick()

    def _unstick(self) -> None:
        if self._stuck:
            with self._ready:
                self._ready.notify()

    def _arrive(self, found: Iterable[bytes | ZTServeError | None]) -> None:
        with self._ready:
            self._arrived.extend(found)
            self._ready.notify()

    def _pay(self) -> None:
        """Let the caller send as much as we have dealt with; on the loop."""
        if not self._arrived and not self.over:
            self._hold(self._body.held)
        owed, self._owed = self._owed, 0
        if owed:
            self._wire.consumed(self.stream_id, owed)

    def _hold(self, count: int) -> None:
        """Have so many bytes. Raises Overloaded where all calls have too many."""
        self._wire.hold(count - self._held)
        self._held = count

    def _let_go(self) -> None:
        self._wire.hold(-self._held)
        self._held = 0
        self._pay()

    # --- the answering thread's side --------------------------------------------

    @property
    def visitor(self) -> "Visitor":
        """Who is at the other end of the connection, for the credentials to judge."""
        return self._wire.visitor

    @property
    def source(self) -> tuple[str, int]:
        """Address and port of the other end."""
        return self._wire.source

    def cancel(self) -> None:
        """End the call; from any thread."""
        self._wire.post(self._wire.cancel, self)

    def receive(self) -> bytes | None:
        """Wait for the caller's next message; None: it has sent its last.

        Raises Cut, or the CallError that makes it impossible to read on.
        """
        with self._ready:
            if not self._arrived and not self._cut:
                self._waiting = True
                self._wire.post(self._pay)
                self._ready.wait_for(lambda: self._arrived or self._cut)
                self._waiting = False
            if self._cut:
                raise Cut
            item = self._arrived[0]
            if isinstance(item, bytes):  # all else is the last, and stays so
                self._arrived.popleft()
        if isinstance(item, ZTServeError):
            raise item
        return None if item is None else self._expanded(item)

    def _expanded(self, message: bytes) -> bytes:
        # Here and one by one: on the loop, few bytes would hold up all others, and
        # what nobody has asked for yet would be held many times over.
        if not isinstance(message, messages.Compressed):
            return message
        try:
            return messages.expanded(message, self._most)
        except messages.Unreadable as error:
            raise _no_grpc(error) from error

    def trailers(self) -> Block:
        """Return the end of a call that is not answered well."""
        make = heads.trailers if self.has_head else heads.trailers_only
        return make(self.status)

    def reserve(self, size: int) -> bool:
        """Wait until `size` bytes more may be sent; return whether anybody waits."""
        if not self._has_room():  # no lock for each piece
            with self._ready:
                self._stuck = True  # first: whoever makes room from now on tells us
                self._ready.wait_for(self._has_room)
                self._stuck = False
        self._given += size
        return not self.over

    def _has_room(self) -> bool:
        waiting = self._given - self._taken
        return self.over or (waiting < MAX_UNSENT_BYTES and not self._full)

    def finish(self) -> None:
        """Let go of the call: it has ended; on the loop.

        What it still owes is the connection's: unpaid, later calls would wait for it.
        """
        self.over = True
        self._let_go()


def _no_grpc(error: messages.Unreadable) -> InvalidInput:
    return InvalidInput(f"the request is not gRPC: {error.reason}")
