"""A server whose HTTP/2 is the test's to say, over our own TLS."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from ztserve.identity import Source
from ztserve.transport import heads, messages
from ztserve.transport.contexts import HandshakeRefused
from ztserve.transport.http2 import (
    Bounds,
    Connection,
    DataReceived,
    Ended,
    HeadersReceived,
    StreamReset,
)
from ztserve.transport.tls import Ends

Answer = Callable[[Connection, int], bytes | None]
"""Answers a request on a stream; bytes that it returns are sent as they are."""


class Scripted:
    """Takes connections one after the other, each on a thread of its own.

    `heads` and `resets` are what came; `silent` servers finish TLS and say nothing;
    `at_head` answers before the request is whole.
    """

    def __init__(
        self,
        source: Source,
        answer: Answer,
        *,
        bounds: Bounds = Bounds(),  # noqa: B008 - frozen
        silent: bool = False,
        at_head: Answer | None = None,
    ) -> None:
        self.heads: list[HeadersReceived] = []
        self.resets: list[StreamReset] = []
        self.ended: list[Ended] = []
        self.received = 0
        """Plain bytes."""
        self.connections = 0
        self._ends = Ends(source)
        self._answer, self._bounds, self._silent = answer, bounds, silent
        self._at_head = at_head
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Close all at once."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for one in self._threads:
            one.join(5)

    def cut(self) -> None:
        """Close the connections."""
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                self._open.add(raw)
                self.connections += 1
                thread = threading.Thread(target=self._serve, args=(raw,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, raw: socket.socket) -> None:
        session = self._ends.accept(lambda peer: None)
        http2 = Connection(client=False, bounds=self._bounds)
        with raw, contextlib.suppress(OSError, HandshakeRefused):
            while data := raw.recv(65536):
                session.receive(data)
                if not session.established:
                    raw.sendall(session.outgoing())
                    continue
                plain = session.read() or b""
                self.received += len(plain)
                if self._silent:
                    continue
                more = b"".join(self._heard(http2, plain))
                if out := http2.outgoing() + more:
                    raw.sendall(session.write(out))
        self._open.discard(raw)

    def _heard(self, http2: Connection, plain: bytes) -> Iterator[bytes]:
        for event in http2.receive(plain):
            match event:
                case HeadersReceived():
                    self.heads.append(event)
                    if self._at_head is not None:
                        yield self._at_head(http2, event.stream_id) or b""
                case StreamReset():
                    self.resets.append(event)
                case Ended():
                    self.ended.append(event)
                case DataReceived(stream_id, _, True):
                    yield self._answer(http2, stream_id) or b""


def answers(*bodies: bytes, trailers: bytes = heads.OK) -> Answer:
    """Answer with these messages, and then the trailers."""

    def answer(http2: Connection, stream_id: int) -> None:
        http2.headers(stream_id, heads.HEAD)
        for body in bodies:
            http2.data(stream_id, messages.framed(body))
        http2.headers(stream_id, trailers, end=True)

    return answer
