"""Reading from a server that is not trusted: GET only, bounded in bytes and time.

No answer is believed further than it is checked: its length is bounded before and
while it is read, it may not be compressed, and a redirect leads only to the registry
itself or to a host that the credentials file names. Whatever else happens is a
RegistryError that names the address.
"""

import base64
import math
import re
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from ztserve.artifacts.registry.address import Access, Origin, origin_of
from ztserve.artifacts.registry.connection import Connection, client_context
from ztserve.artifacts.statements.strict import Malformed, get, load_object
from ztserve.errors import ConfigError, RegistryError

ANSWER_S = 10.0
"""For an answer as a whole, redirects and tokens included; for a range, its head."""
LIST_S = 30.0
"""For all answers together that one list is made of: folders, or what refers to one."""
MAX_REDIRECTS = 3
MAX_LOCATION = 8192
MAX_IDLE = 8
MAX_TOKEN_BYTES = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_TARGET = re.compile(r"/[!-~]*\Z")
_PARAMETER = re.compile(r'(\w+)="([^"\\]{0,2000})"')


class MissingError(RegistryError):
    """The server has no such thing: it answered 404."""


class RejectedError(RegistryError):
    """The server does not take the question: it answered 400."""


class Body(NamedTuple):
    """An answer whose head was read and checked, and the connection it comes over."""

    connection: Connection
    response: HTTPResponse
    url: str


class HttpReader:
    """Reads from one server, over connections that are kept; threads may share it."""

    def __init__(self, origin: Origin, access: Access, *, scope: str = "") -> None:
        self._origin = origin
        self._access = access
        self._scope = scope
        """What a token is asked for; readers ask for no more than to pull."""
        try:
            self._context = client_context(access.roots)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the registry's roots are no certificates: {error}"
            ) from error
        self._idle: list[Connection] = []
        weakref.finalize(self, _close, self._idle)
        self._lock = threading.Lock()
        self._authorization = f"Bearer {access.token}" if access.token else ""

    def read(
        self,
        target: str,
        *,
        limit: int,
        accept: str = "application/json",
        until: float = math.inf,
    ) -> bytes:
        """Return the answer's body; MissingError on 404, RegistryError otherwise.

        `target` is path and query, quoted; `limit` in bytes; `until`, on
        `time.monotonic`'s clock, ends several that are asked for one thing.
        """
        end = min(until, time.monotonic() + ANSWER_S)
        body = self._ask(target, {"Accept": accept}, end)
        with self.faults(body.url), self._held(body):
            return _whole(body, limit)

    def ask(self, target: str, headers: Mapping[str, str]) -> Body:
        """Return an answer with its body unread; `release` it. Errors as `read`."""
        return self._ask(target, headers, time.monotonic() + ANSWER_S)

    def release(self, body: Body) -> None:
        """Keep the connection where its answer was read to the end, or close it."""
        with self._lock:
            if (
                body.response.isclosed()
                and not body.response.will_close
                and len(self._idle) < MAX_IDLE
            ):
                self._idle.append(body.connection)
                return
        body.connection.close()

    @contextmanager
    def faults(self, url: str) -> Iterator[None]:
        """Turn whatever a server can do wrong into a RegistryError naming `url`."""
        try:
            yield
        except TimeoutError as error:
            raise RegistryError(f"{url}: no whole answer in time") from error
        except HTTPException as error:  # it quotes the server, to any length
            raise RegistryError(f"{url}: no HTTP: {error!r:.300}") from error
        except (OSError, ValueError) as error:
            raise RegistryError(
                f"{url}: {str(error) or type(error).__name__}"
            ) from error

    @contextmanager
    def _held(self, body: Body) -> Iterator[None]:
        try:
            yield
        except BaseException:
            body.connection.close()
            raise
        self.release(body)

    # --- one question, with what it takes to have it answered -------------------

    def _ask(self, target: str, headers: Mapping[str, str], until: float) -> Body:
        """Return the answer of status 200 or 206, whoever gave it."""
        origin, asked, redirects = self._origin, False, 0
        while True:
            # Without the query: that of another host may hold a signature, a secret.
            path = target.partition("?")[0]
            url = f"{origin.scheme}://{origin.authority}{path}"
            more = dict(headers)
            if origin == self._origin and self._authorization:
                more["Authorization"] = self._authorization
            with self.faults(url):
                connection, response = self._send(origin, target, more, until)
            body = Body(connection, response, url)
            if response.status == 200 or (
                response.status == 206 and "Range" in headers
            ):
                _check_plain(body)
                return body
            connection.close()
            if response.status in _REDIRECTS and redirects < MAX_REDIRECTS:
                redirects += 1
                origin, target = self._redirected(url, response)
            elif response.status == 401 and origin == self._origin and not asked:
                asked = True
                challenge = response.getheader("WWW-Authenticate", "")
                self._authorization = self.authorize(challenge, url, until)
            else:
                raise _refusal(response.status, url)

    def _send(
        self, origin: Origin, target: str, headers: Mapping[str, str], until: float
    ) -> tuple[Connection, HTTPResponse]:
        if not _TARGET.match(target):
            raise RegistryError(f"{target[:100]!r} cannot be asked for: not a path")
        headers = {"Accept-Encoding": "identity", **headers}
        kept = self._kept(origin)
        if kept is not None:
            kept.until = until
            try:
                return kept, kept.get(target, headers)
            except (OSError, HTTPException):
                kept.close()  # the server may have closed it meanwhile: once more
        context = self._context if origin.scheme == "https" else None
        new = Connection(origin, context, until)
        try:
            return new, new.get(target, headers)
        except BaseException:
            new.close()
            raise

    def _kept(self, origin: Origin) -> Connection | None:
        with self._lock:
            for position, connection in enumerate(self._idle):
                if connection.origin == origin:
                    return self._idle.pop(position)
        return None

    def _redirected(self, url: str, response: HTTPResponse) -> tuple[Origin, str]:
        """Return where a redirect leads, if it may lead there."""
        location = response.getheader("Location", "")
        try:
            if len(location) > MAX_LOCATION:
                raise ValueError(f"is longer than {MAX_LOCATION} characters")
            parts = urlsplit(urljoin(url, location))
            origin = origin_of(parts)
        except ValueError as error:
            shown = location.partition("?")[0][:300]
            raise RegistryError(
                f"{url}: redirects to {shown!r}, which {error}"
            ) from error
        self._check_host(origin, f"{url}: redirects to")
        if url.startswith("https:") and origin.scheme != "https":
            raise RegistryError(f"{url}: redirects to plain http")
        return origin, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def _check_host(self, origin: Origin, what: str) -> None:
        if origin != self._origin and not self._access.allows(origin):
            raise RegistryError(
                f"{what} {origin.authority}, which is not the registry; if it is to "
                "be trusted with that, name it in `hosts` of the credentials file"
            )

    # --- credentials -------------------------------------------------------------

    def authorize(self, challenge: str, url: str, until: float) -> str:
        """Return the Authorization that a 401 asks for (RFC 7617, RFC 6750).

        `challenge`: its WWW-Authenticate. Raises RegistryError where we have none.
        """
        access = self._access
        scheme = challenge.split(" ", 1)[0].lower()
        if not access.username and scheme != "bearer":
            raise RegistryError(
                f"{url}: asks for credentials (401), or refuses those it got; put "
                "them into the file that [artifacts] registry_credentials names"
            )
        if scheme == "basic":
            return _basic(access)
        if scheme == "bearer" and not access.token:
            return f"Bearer {self._fetch_token(challenge, url, until)}"
        raise RegistryError(f"{url}: refuses the credentials (401, {scheme!r:.50})")

    def _fetch_token(self, challenge: str, url: str, until: float) -> str:
        """Get a token to pull with (CNCF distribution, "Token Authentication")."""
        asked = dict(_PARAMETER.findall(challenge[:8192]))
        try:
            parts = urlsplit(asked.get("realm", ""))
            origin = origin_of(parts)
        except ValueError as error:
            raise RegistryError(f"{url}: its token realm {error}") from error
        self._check_host(origin, f"{url}: sends us for a token to")
        query = f"service={quote(asked.get('service', ''), safe='')}"
        query += f"&scope={quote(self._scope, safe='')}"
        target = f"{parts.path or '/'}?{query}"
        headers = {"Accept": "application/json"}
        if self._access.username:
            headers["Authorization"] = _basic(self._access)
        where = f"{origin.scheme}://{origin.authority}{parts.path}"
        with self.faults(where):
            body = Body(*self._send(origin, target, headers, until), where)
            with self._held(body):
                if body.response.status != 200:
                    raise _refusal(body.response.status, where)
                _check_plain(body)
                return _token(_whole(body, MAX_TOKEN_BYTES), where)


def _close(idle: list[Connection]) -> None:
    for connection in idle:
        connection.close()


def _basic(access: Access) -> str:
    pair = f"{access.username}:{access.password}".encode("ascii")
    return "Basic " + base64.b64encode(pair).decode()


def _token(raw: bytes, where: str) -> str:
    try:
        tree = load_object(raw, limit=MAX_TOKEN_BYTES)
        token = get(tree, "token" if "token" in tree else "access_token", str)
    except Malformed as error:
        raise RegistryError(f"{where}: its token: {error}") from error
    if not re.fullmatch(r"[!-~]{1,16384}", token):
        raise RegistryError(f"{where}: its token cannot be sent in a header")
    return token


def _refusal(status: int, url: str) -> RegistryError:
    if status == 404:
        return MissingError(f"{url}: there is no such thing (404)")
    if status == 400:
        return RejectedError(f"{url}: answers 400: it does not take the question")
    means = {
        401: "the credentials do not count",
        403: "the credentials do not suffice",
        429: "too many requests",
    }.get(status, "expected 200")
    if status in _REDIRECTS:
        means = f"more than {MAX_REDIRECTS} redirects"
    return RegistryError(f"{url}: answers {status}: {means}")


def _check_plain(body: Body) -> None:
    encoding = body.response.getheader("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        body.connection.close()
        raise RegistryError(f"{body.url}: is sent as {encoding[:50]!r}, unasked")


def _whole(body: Body, limit: int) -> bytes:
    said = body.response.length
    if said is not None and said > limit:
        raise RegistryError(
            f"{body.url}: has {said} bytes, more than the {limit} allowed"
        )
    raw = body.response.read(limit + 1)
    if len(raw) > limit:
        raise RegistryError(f"{body.url}: sends more than the {limit} bytes allowed")
    if said is not None and len(raw) != said:
        raise RegistryError(f"{body.url}: ends after {len(raw)} of {said} bytes")
    return raw
