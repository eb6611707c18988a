r"""The head of an HTTP/1.1 request, read strictly (RFC 9112).

Written here and not taken from a library because strictness is the point: a request
that two parsers could read differently is refused. There is one framing, a
Content-Length; no chunks, so nothing to smuggle with; no HTTP/1.0, no bare LF, no
folded lines, no bytes beyond ASCII.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ztserve.errors import InvalidInput

END = b"\r\n\r\n"
METHODS = ("GET", "POST")

_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([\x21-\x7e]{1,2048}) HTTP/([0-9]\.[0-9])")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,128}):([\t\x20-\x7e]*)")
_PATH = re.compile(r"(?:/[A-Za-z0-9._~@:-]+)+")
_LENGTH = re.compile(r"[0-9]{1,12}")
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9a-fA-F:.]{2,45}\])(?::[0-9]{1,5})?")

# Each of them says who somebody is or was; only this connection's certificate does.
_FORGEABLE = re.compile(
    r"zt-.*|x-zt-.*|x-forwarded-.*|forwarded|via|x-real-ip|x-client-.*|true-client-ip"
    r"|x-envoy-.*|x-original-.*|x-rewrite-.*|ssl-client-.*|authorization|cookie"
    r"|proxy-.*|x-http-method.*|x-method-override"
)
_ONCE = ("content-length", "content-type", "host", "expect")


class Malformed(InvalidInput):
    """A request that is not one. `status` is as in RFC 9110; the connection ends."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Head:
    """One request's method, path and header fields."""

    method: str
    path: str
    host: str
    headers: Mapping[str, str]
    """What policies may look at: lower-case names, repeats joined by a comma."""
    length: int
    """Bytes of the body that follows."""
    expects: bool
    """The client waits for `100 Continue` before it sends the body."""
    closes: bool
    """The client wants the connection closed after the answer."""
    dropped: tuple[str, ...]
    """The names of header fields that were not believed."""


def read_head(head: bytes, *, max_headers: int, max_body_bytes: int) -> Head:
    """Return the request whose head, without the empty line, is `head`.

    Raises Malformed: 400 for what is not HTTP/1.1 to the letter, 405, 411, 413, 415,
    417, 431, 501 and 505 as RFC 9110 has them.
    """
    line, *lines = head.split(b"\r\n")
    method, target = _request_line(line)
    if len(lines) > max_headers:
        raise Malformed(431, f"more than {max_headers} header fields")
    fields = _fields(lines)
    for name in _ONCE:
        if len(fields.get(name, ())) > 1:
            raise Malformed(400, f"the header field {name} is given twice")
    given = {name: ",".join(values) for name, values in fields.items()}
    if not _HOST.fullmatch(given.get("host", "")):
        raise Malformed(400, "exactly one Host field is needed")
    dropped = tuple(sorted(name for name in given if _FORGEABLE.fullmatch(name)))
    length = _length(method, given, max_body_bytes)
    headers = {name: given[name] for name in given if name not in dropped}
    return Head(
        method=method,
        path=target,
        host=given["host"],
        headers=MappingProxyType(headers),
        length=length,
        expects=_expects(given),
        closes="close" in given.get("connection", "").lower(),
        dropped=dropped,
    )


def _request_line(line: bytes) -> tuple[str, str]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise Malformed(400, "the request line is not METHOD PATH HTTP/1.1")
    method, target, version = (part.decode("ascii") for part in match.groups())
    if version != "1.1":
        raise Malformed(505, "only HTTP/1.1 is spoken here")
    if method not in METHODS:
        raise Malformed(405, f"only {' and '.join(METHODS)} are answered")
    # One spelling for each path: what a proxy might rewrite, we refuse.
    if not _PATH.fullmatch(target) or "/./" in f"{target}/" or "/../" in f"{target}/":
        raise Malformed(400, "a path has plain segments only: no query, no %, no //")
    return method, target


def _fields(lines: list[bytes]) -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise Malformed(400, "a header field is not NAME: VALUE in ASCII")
        name = match[1].decode("ascii").lower()
        fields.setdefault(name, []).append(match[2].decode("ascii").strip(" \t"))
    return fields


def _length(method: str, given: Mapping[str, str], max_body_bytes: int) -> int:
    text = given.get("content-length")
    if "transfer-encoding" in given:
        if text is not None:
            raise Malformed(400, "Transfer-Encoding beside Content-Length")
        raise Malformed(411, "send the body with Content-Length, not in chunks")
    if text is None:
        if method == "POST":
            raise Malformed(411, "send the body with Content-Length")
        return 0
    if not _LENGTH.fullmatch(text):
        raise Malformed(400, "Content-Length is not a number")
    length = int(text)
    if length > max_body_bytes:
        raise Malformed(413, f"the body is larger than {max_body_bytes} bytes")
    if method == "GET":
        if length:
            raise Malformed(400, "GET has no body here")
        return 0
    _check_content(given)
    return length


def _check_content(given: Mapping[str, str]) -> None:
    # A page in a browser that holds a certificate cannot send this type unasked.
    kind, _, parameters = given.get("content-type", "").lower().partition(";")
    charset = parameters.strip().replace('"', "")
    if kind.strip() != "application/json" or charset not in {"", "charset=utf-8"}:
        raise Malformed(415, "send Content-Type: application/json")
    if given.get("content-encoding", "identity").lower() != "identity":
        raise Malformed(415, "send the body without Content-Encoding")
    if "inference-header-content-length" in given:
        raise Malformed(415, "binary tensors are not taken over HTTP; use gRPC")


def _expects(given: Mapping[str, str]) -> bool:
    expected = given.get("expect", "").lower()
    if expected not in {"", "100-continue"}:
        raise Malformed(417, "only Expect: 100-continue is understood")
    if "upgrade" in given:
        raise Malformed(400, "no protocol to upgrade to")
    return bool(expected)
