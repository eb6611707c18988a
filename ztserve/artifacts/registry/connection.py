"""One HTTP/1.1 connection that can send GET and nothing else (RFC 9110, 9112).

Each wait, for a byte of a head as for one of a body, ends at `Connection.until`: a
server that drips cannot hold us longer. Python's parser bounds a head to 100 lines of
64 KiB.
"""

import io
import socket
import ssl
import time
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any, cast

from ztserve.artifacts.registry.address import Origin

if TYPE_CHECKING:
    from typing_extensions import Buffer


def client_context(roots: str) -> ssl.SSLContext:
    """Return TLS settings that demand a certificate for the host (RFC 9110, 4.3.4).

    `roots`: PEM certificates that vouch for it; empty: the system's. Raises
    ssl.SSLError where they are none.
    """
    context = ssl.create_default_context(cadata=roots or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class Connection:
    """A connection to `origin`; raises OSError, TimeoutError at `until`."""

    def __init__(
        self, origin: Origin, context: ssl.SSLContext | None, until: float
    ) -> None:
        self.origin = origin
        self.until = until
        """On `time.monotonic`'s clock; whoever goes on using it sets it anew."""
        plain = self._connected()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = plain
        if context is not None:
            try:
                plain.settimeout(self.left())
                self._socket = context.wrap_socket(plain, server_hostname=origin.host)
            except BaseException:
                plain.close()
                raise

    def _connected(self) -> socket.socket:
        """Try each address in turn, all within the one time."""
        last: OSError = ConnectionError(f"{self.origin.host} has no address")
        found = socket.getaddrinfo(
            self.origin.host, self.origin.port, type=socket.SOCK_STREAM
        )
        for family, kind, protocol, _, address in found:
            plain = socket.socket(family, kind, protocol)
            try:
                plain.settimeout(self.left())
                plain.connect(address)
            except OSError as error:
                plain.close()
                last = error
            else:
                return plain
        raise last

    def left(self) -> float:
        """Return the seconds left; TimeoutError if there are none."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no whole answer in time")
        return left

    def get(self, target: str, headers: Mapping[str, str]) -> HTTPResponse:
        """Send a GET; return the answer when its head is there, the body unread.

        Raises also HTTPException, where the head is not HTTP.
        """
        lines = [f"GET {target} HTTP/1.1", f"Host: {self.origin.authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._socket.settimeout(self.left())
        self._socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("ascii"))
        response = HTTPResponse(cast("Any", self), method="GET")
        response.begin()
        return response

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return what `HTTPResponse` reads from; closing it leaves us open."""
        return io.BufferedReader(_Timed(self), 64 << 10)

    def receive(self, view: "Buffer") -> int:
        """Read into `view`, until `until` at most; 0 at the end."""
        self._socket.settimeout(self.left())
        return self._socket.recv_into(view)

    def close(self) -> None:
        """Close it; may be called again."""
        self._socket.close()


class _Timed(io.RawIOBase):
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, view: "Buffer") -> int:
        return self._connection.receive(view)
