"""What goes to a registry, and for how long its answer is waited for."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from ztserve.artifacts.registry.files import FileReader

PIECE = 1 << 20
"""Bytes that are sent at once."""


class Upload:
    """The bytes of a blob for a PUT: as many as were promised, whatever lies there now.

    What came behind them would be taken for another request of ours.
    """

    def __init__(self, reader: FileReader) -> None:
        self._reader = reader
        self._at = 0

    def read(self, count: int = PIECE, /) -> bytes:
        """Return at most `count` further bytes; ValueError where they end too early."""
        content = bytearray(min(count, self._reader.size - self._at))
        read = self._reader.read_into(memoryview(content), self._at) if content else 0
        if read < len(content):
            raise ValueError("a blob was cut short while it was uploaded")
        self._at += read
        return bytes(content)

    def rewind(self) -> None:
        """Begin anew."""
        self._at = 0

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.__exit__(kind, error, trace)


@contextmanager
def no_later_than(connected: socket.socket, seconds: float) -> Iterator[None]:
    """End a connection from which an answer comes too slowly; raises TimeoutError.

    The socket's own timeout is for each byte: it has no end where one comes in time.
    """
    late = threading.Event()
    twin = socket.socket(fileno=os.dup(connected.fileno()))

    def end() -> None:
        late.set()
        with suppress(OSError):  # it has just ended by itself
            twin.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        twin.close()
        if late.is_set():
            raise TimeoutError(f"no whole answer within {seconds:g} s")
