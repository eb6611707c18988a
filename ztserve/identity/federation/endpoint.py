"""The bundle endpoint: our trust bundle for other trust domains to fetch.

Profile https_spiffe of the SPIFFE Federation standard (section 5.2.2.3): HTTPS with an
X.509-SVID of ours, and no authentication of the client on any layer. What is served is
public; what must hold is that nobody can change it, or keep us from serving it.
"""

import contextlib
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.authority.development import DEFAULT_TTL_S, Authority
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.svid import Svid

_LOG = logging.getLogger(__name__)

MAX_HEAD_BYTES = 8 * 1024
MAX_CONNECTIONS = 32
MAX_VISIT_S = 10.0
"""For a whole visit, from the handshake to the last byte of the answer."""
_END = b"\r\n\r\n"
_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([\x21-\x7e]{1,2048}) HTTP/1\.[01]")
_PATH = re.compile(r"/[A-Za-z0-9._~/-]{0,255}")
_PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


@dataclass(frozen=True, slots=True)
class _Context:
    svid: Svid
    tls: ssl.SSLContext


class BundleEndpoint:
    """Serves what `bundle` returns, as a JWK Set, at one path.

    Args:
        bundle: the newest trust bundle, asked for each request.
        svid: the SVID to serve with, asked for each connection; see `renewing`.
        path: of the URL, e.g. ``/bundle.json``.

    One request a connection, at most 32 connections at once and 10 s for each.
    Raises IdentityError for a path that is not plain.

    """

    def __init__(
        self,
        bundle: Callable[[], TrustBundle],
        svid: Callable[[], Svid],
        *,
        path: str = "/",
    ) -> None:
        if not _PATH.fullmatch(path):
            raise IdentityError(f"bundle endpoint: {path!r:.80} is not a plain path")
        self._bundle = bundle
        self._svid = svid
        self._path = path.encode()
        self._context: _Context | None = None
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._visits: dict[socket.socket, socket.socket] = {}
        """Those that are here, the oldest first, each with a twin of its socket."""
        self._listener: socket.socket | None = None
        self._closed = threading.Event()
        self._problem = ""

    def start(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listen; return host and port. Raises IdentityError, also without an SVID."""
        self._tls()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=64)
        except OSError as error:
            raise IdentityError(f"bundle endpoint {host}:{port}: {error}") from error
        self._listener = listener
        threading.Thread(
            target=self._accept, args=(listener,), name="ztserve-bundle", daemon=True
        ).start()
        name = listener.getsockname()
        return str(name[0]), int(name[1])

    def close(self) -> None:
        """Stop listening. May be called again."""
        self._closed.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):  # it wakes `accept`, on Linux
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = listener.accept()
                twin = connection.dup()  # `ssl` takes the first away
            except OSError:
                self._closed.wait(0.05)  # out of descriptors, perhaps; it may pass
                continue
            if not self._has_room():
                connection.close()
                twin.close()
                continue
            self._visits[connection] = twin
            try:
                threading.Thread(
                    target=self._receive, args=(connection,), daemon=True
                ).start()
            except RuntimeError:  # no thread now; it may pass
                connection.close()
                self._leave(connection)

    def _has_room(self) -> bool:
        """Take a place; where none is free, end the visit that has lasted longest."""
        if self._free.acquire(blocking=False):
            return True
        for oldest in list(self._visits.values())[:1]:
            with contextlib.suppress(OSError):  # it has just ended
                oldest.shutdown(socket.SHUT_RDWR)
        return self._free.acquire(timeout=0.2)

    def _leave(self, connection: socket.socket) -> None:
        self._visits.pop(connection).close()
        self._free.release()

    def _receive(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._visit(connection, time.monotonic() + MAX_VISIT_S)
        except OSError as error:  # also ssl.SSLError and timeouts: the visitor's affair
            _LOG.debug("bundle endpoint: a visit failed: %s", error)
        except IdentityError as error:
            self._note(str(error))
        finally:
            self._leave(connection)

    def _note(self, problem: str) -> None:
        if problem != self._problem:  # anybody can make us say it again
            _LOG.warning("bundle endpoint: %s", problem)
        self._problem = problem

    def _visit(self, connection: socket.socket, end: float) -> None:
        # Our answer and our goodbye go at once, and wait for no acknowledgement.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_left(end))
        # A timeout of `ssl` bounds a handshake as a whole, and each read and write.
        with self._tls().wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        ) as tls:
            tls.do_handshake()
            head = b""
            while _END not in head and len(head) <= MAX_HEAD_BYTES:
                tls.settimeout(_left(end))
                piece = tls.recv(MAX_HEAD_BYTES)
                if not piece:
                    return
                head += piece
            answer = self._answer(head)
            tls.settimeout(_left(end))
            tls.sendall(answer)
            tls.settimeout(min(_left(end), 1.0))  # a visitor owes us no goodbye
            tls.unwrap()

    def _answer(self, head: bytes) -> bytes:
        status = self._status(head)
        body = b"{}"
        if status == 200:
            try:
                body = self._bundle().jwks()
            except IdentityError as error:
                self._note(f"there is no bundle to serve: {error}")
                status = 503
        lines = (
            f"HTTP/1.1 {status} {_PHRASES[status]}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            # Whatever stands between must ask again: a key may have been withdrawn.
            "Cache-Control: no-cache",
            *(["Allow: GET"] if status == 405 else []),
            "Connection: close",
        )
        return "\r\n".join(lines).encode() + _END + body

    def _status(self, head: bytes) -> int:
        if _END not in head:
            return 431
        match = _REQUEST_LINE.fullmatch(head.partition(b"\r\n")[0])
        if match is None:
            return 400
        if match[2] != self._path:
            return 404
        return 200 if match[1] == b"GET" else 405

    def _tls(self) -> ssl.SSLContext:
        svid, held = self._svid(), self._context
        if held is None or held.svid is not svid:
            held = self._context = _Context(svid, _server_context(svid))
        return held.tls


def renewing(
    authority: Authority, spiffe_id: str, *, ttl_s: float = DEFAULT_TTL_S
) -> Callable[[], Svid]:
    """Return what gives an SVID of `authority`, issued anew at half of its life.

    Raises IdentityError as `Authority.issue` does.
    """
    held = [authority.issue(spiffe_id, ttl_s=ttl_s)]

    def current() -> Svid:
        if (held[0].not_after - types.now()).total_seconds() < ttl_s / 2:
            held[0] = authority.issue(spiffe_id, ttl_s=ttl_s)
        return held[0]

    return current


def _server_context(svid: Svid) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # no resumption: each visit is judged by today's SVID
    context.verify_mode = ssl.CERT_NONE  # no client is asked who it is (5.2.2.3)
    # `ssl` reads keys from a path only. This one is memory, and has no other name.
    memory = os.memfd_create("svid", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(svid.chain_pem() + svid.key_pem())
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    except (OSError, ValueError) as error:
        raise IdentityError(f"the SVID of {svid.id} cannot serve: {error}") from error
    finally:
        os.close(memory)
    return context


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the visit took too long")
    return left
