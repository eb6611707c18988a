"""One socket of the reactor: what a `Carrier` asks of asyncio's transports."""

import select
import socket
from collections.abc import Callable
from typing import Any

READ_BYTES = 64 * 1024


class Plug:
    """A connected, non-blocking socket and its protocol. For the thread that leads.

    What the socket does not take is held and sent when it does; over the limit, the
    protocol is told to pause.
    """

    __slots__ = (
        "_address",
        "_closing",
        "_epoll",
        "_fd",
        "_limit",
        "_mask",
        "_paused",
        "_plugs",
        "_protocol",
        "_socket",
        "_soon",
        "_unsent",
    )

    def __init__(
        self,
        raw: socket.socket,
        address: Any,
        epoll: select.epoll,
        plugs: "dict[int, Plug]",
        soon: Callable[..., object],
    ) -> None:
        raw.settimeout(0)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._address = raw, address
        self._fd = raw.fileno()
        self._epoll, self._plugs, self._soon = epoll, plugs, soon
        self._protocol: Any = None
        self._unsent = bytearray()
        self._limit = 64 * 1024
        self._mask = select.EPOLLIN
        self._paused = self._closing = False

    def begin(self, protocol: Any) -> None:
        """Take part in the loop."""
        self._protocol = protocol
        self._plugs[self._fd] = self
        self._epoll.register(self._fd, self._mask)
        protocol.connection_made(self)

    def heard(self, mask: int) -> None:
        """Do what the socket is ready for."""
        if mask & select.EPOLLOUT:
            self._send_more()
        if mask & ~select.EPOLLOUT and not self._closing:
            self._receive()
        elif mask & (select.EPOLLHUP | select.EPOLLERR):
            self._end(None)  # nobody is there to take what is left

    # --- what a Carrier asks ----------------------------------------------------

    def get_extra_info(self, name: str) -> Any:
        """Return the other end's address; it has no other facts."""
        return self._address if name == "peername" else None

    def set_write_buffer_limits(self, high: int) -> None:
        """Have the protocol pause where more than `high` bytes wait."""
        self._limit = high

    def is_closing(self) -> bool:
        """Return whether it is being closed, or is."""
        return self._closing

    def write(self, data: bytes) -> None:
        """Send, now as far as the socket takes it."""
        if self._closing or not data:
            return
        if not self._unsent:
            try:
                sent = self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._end(error)
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._want(select.EPOLLOUT, wanted=True)
        self._unsent += data
        if len(self._unsent) > self._limit and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def pause_reading(self) -> None:
        """Read no more for now."""
        self._want(select.EPOLLIN, wanted=False)

    def resume_reading(self) -> None:
        """Read again."""
        self._want(select.EPOLLIN, wanted=True)

    def close(self) -> None:
        """Close once all is sent."""
        if not self._closing:
            self._closing = True
            self._want(select.EPOLLIN, wanted=False)
            if not self._unsent:
                self._soon(self._finish, None)

    def abort(self) -> None:
        """Close now."""
        self._end(None)

    # --- its own ----------------------------------------------------------------

    def _receive(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        if data:
            self._protocol.data_received(data)
        else:
            self._protocol.eof_received()
            self.close()

    def _send_more(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error)
            return
        del self._unsent[:sent]
        if self._unsent:
            return
        self._want(select.EPOLLOUT, wanted=False)
        if self._paused:
            self._paused = False
            self._protocol.resume_writing()
        if self._closing:
            self._finish(None)

    def _want(self, what: int, *, wanted: bool) -> None:
        mask = self._mask | what if wanted else self._mask & ~what
        if mask != self._mask and self._fd in self._plugs:
            self._mask = mask
            self._epoll.modify(self._fd, mask)

    def _end(self, error: OSError | None) -> None:
        self._closing = True
        self._unsent.clear()
        self._soon(self._finish, error)

    def _finish(self, error: OSError | None) -> None:
        if self._plugs.get(self._fd) is not self:
            return  # it has been
        del self._plugs[self._fd]
        self._epoll.unregister(self._fd)
        self._socket.close()
        self._protocol.connection_lost(error)
