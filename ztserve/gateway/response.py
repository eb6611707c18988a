"""HTTP/1.1 responses as bytes."""

import json
from http import HTTPStatus

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
JSON = "application/json"
EVENTS = "text/event-stream"
_LATER = (429, 503)
_REASONS = {499: "Client Closed Request"}


def head(
    status: int, kind: str, *, length: int | None, closes: bool, call_id: str = ""
) -> bytes:
    """Return the head of a response; `length` None: chunks follow."""
    reason = _REASONS.get(status) or HTTPStatus(status).phrase
    framing = (
        "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    )
    lines = [
        f"HTTP/1.1 {status} {reason}",
        f"content-type: {kind}",
        framing,
        "cache-control: no-store",
        "x-content-type-options: nosniff",
    ]
    if call_id:
        lines.append(f"x-call-id: {call_id}")
    if status in _LATER:
        lines.append("retry-after: 1")
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("allow: GET, POST")
    if closes:
        lines.append("connection: close")
    return "\r\n".join((*lines, "", "")).encode("ascii")


def whole(
    status: int, body: bytes, *, closes: bool, call_id: str = "", kind: str = JSON
) -> bytes:
    """Return a response whose body is known."""
    length = len(body)
    return head(status, kind, length=length, closes=closes, call_id=call_id) + body


def told(error: str, call_id: str = "") -> bytes:
    """Return the body that tells of an error."""
    said = {"error": error, "call_id": call_id} if call_id else {"error": error}
    return json.dumps(said).encode()


def chunk(data: bytes) -> bytes:
    """Return one chunk of a body (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(data: bytes, name: str = "") -> bytes:
    """Return one server-sent event (WHATWG HTML, 9.2); `data` has no line break."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"
