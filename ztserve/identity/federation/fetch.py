"""One fetch of a foreign trust bundle over HTTPS (SPIFFE Federation, 5.2).

The whole answer is read first, within a limit of bytes and one of time, and only then
understood. Nothing is asked before the server is authenticated, again at each redirect.
"""

import io
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPResponse
from typing import Any, NamedTuple, cast
from urllib.parse import SplitResult, urljoin

from ztserve import types
from ztserve.errors import ConfigError, IdentityError, Unauthenticated
from ztserve.identity.bundle import MAX_JWKS_BYTES, TrustBundle
from ztserve.identity.federation.relationship import Relationship, checked_url
from ztserve.identity.peer import verify_peer

FETCH_S = 10.0
"""For a fetch as a whole, redirects included."""
MAX_ANSWER_BYTES = MAX_JWKS_BYTES + 32 * 1024
MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)

Roots = Mapping[str, Sequence[bytes]]


class Fetcher:
    """Fetches bundles; `web_roots` (PEM) vouch for https_web, else the system's do."""

    def __init__(self, web_roots: str | None = None) -> None:
        self._web_roots = web_roots

    def fetch(self, relationship: Relationship, roots: Sequence[bytes]) -> TrustBundle:
        """Return the bundle at the relationship's endpoint.

        `roots` are the authorities (DER) that we hold of the endpoint's own trust
        domain now; for https_web they do not matter. Raises IdentityError.
        """
        end = time.monotonic() + FETCH_S
        where = f"federation with {relationship.trust_domain}"
        url, location = relationship.url, ""
        for _ in range(MAX_REDIRECTS + 1):
            try:
                url = urljoin(url, location)
                parts = checked_url(url, where)
                raw = self._get(parts, relationship, roots, end)
            except ConfigError as error:  # a URL that we were redirected to
                raise IdentityError(str(error)) from error
            except TimeoutError as error:
                raise IdentityError(
                    f"{where}: {url}: no whole answer within {FETCH_S:g} s"
                ) from error
            except (OSError, ValueError) as error:  # ValueError: no URL, or no host
                raise IdentityError(f"{where}: {url}: {error}") from error
            answer = read_answer(raw, f"{where}: {url}")
            if answer.status == 200:
                return TrustBundle.parse(answer.body, relationship.trust_domain)
            if answer.status not in _REDIRECTS:
                raise IdentityError(
                    f"{where}: {url} answers {answer.status}, expected 200"
                )
            location = answer.location
        raise IdentityError(f"{where}: more than {MAX_REDIRECTS} redirects")

    def _get(
        self,
        url: SplitResult,
        relationship: Relationship,
        roots: Sequence[bytes],
        end: float,
    ) -> bytes:
        host = url.hostname or ""
        context = (
            self._web_context()
            if relationship.profile == "https_web"
            else _spiffe_context()
        )
        with socket.create_connection((host, url.port or 443), _left(end)) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.settimeout(_left(end))
            with context.wrap_socket(plain, server_hostname=host) as tls:
                if relationship.profile == "https_spiffe":
                    _check_endpoint(peer_chain(tls), relationship, roots)
                tls.settimeout(_left(end))
                tls.sendall(_request(url))
                return _read(tls, end)

    def _web_context(self) -> ssl.SSLContext:
        # It demands a certificate, and that it names the host (RFC 6125).
        context = ssl.create_default_context(cadata=self._web_roots)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.hostname_checks_common_name = False
        return context


class Answer(NamedTuple):
    """An HTTP answer, as far as it matters here."""

    status: int
    location: str
    body: bytes


class _Wire:
    """What was read, as the socket that `HTTPResponse` wants."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._raw)


def read_answer(raw: bytes, where: str) -> Answer:
    """Return the HTTP answer in `raw`; IdentityError, whatever the bytes are."""
    response = HTTPResponse(cast("Any", _Wire(raw)), method="GET")
    try:
        response.begin()
        location = response.getheader("Location", "")
        return Answer(response.status, location, response.read())
    except Exception as error:
        # Parsers raise many kinds of error on hostile bytes; each means the same.
        raise IdentityError(f"{where}: not an HTTP answer: {error!r:.200}") from error


def peer_chain(tls: ssl.SSLSocket) -> tuple[bytes, ...]:
    """Return the certificates that the other end sent (DER, leaf first)."""
    public: Callable[[], Sequence[bytes]] | None = getattr(
        tls, "get_unverified_chain", None
    )
    if public is not None:  # since Python 3.13
        return tuple(public())
    chain = cast("Any", tls)._sslobj.get_unverified_chain()  # noqa: SLF001
    return tuple(ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in chain or ())


def _spiffe_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # OpenSSL proves that the endpoint has its certificate's key. Who it is, is judged
    # by `verify_peer` alone, which knows SPIFFE's rules and says what is wrong.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _check_endpoint(
    chain: Sequence[bytes], relationship: Relationship, roots: Sequence[bytes]
) -> None:
    """Section 5.2.2.4: a valid SVID, of exactly the ID that is configured."""
    where = f"federation with {relationship.trust_domain}"
    bundles: Roots = {relationship.endpoint_domain: roots} if roots else {}
    try:
        peer = verify_peer(chain, bundles, now=types.now())
    except Unauthenticated as error:
        raise IdentityError(f"{where}: the endpoint: {error.reason}") from error
    if peer.id != relationship.spiffe_id:
        raise IdentityError(
            f"{where}: the endpoint is {peer.id}, expected {relationship.spiffe_id}"
        )


def _request(url: SplitResult) -> bytes:
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    return (
        f"GET {target} HTTP/1.1\r\nHost: {url.netloc}\r\n"
        "Accept: application/json\r\nAccept-Encoding: identity\r\n"
        "Connection: close\r\n\r\n"
    ).encode("ascii")


def _read(tls: ssl.SSLSocket, end: float) -> bytes:
    raw = bytearray()
    while True:
        tls.settimeout(_left(end))
        piece = tls.recv(64 * 1024)
        if not piece:
            return bytes(raw)
        raw += piece
        if len(raw) > MAX_ANSWER_BYTES:
            raise IdentityError(
                f"the bundle endpoint sends over {MAX_ANSWER_BYTES} bytes"
            )


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
