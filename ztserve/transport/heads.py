"""What the heads and trailers of gRPC calls say, in both directions, without I/O.

"gRPC over HTTP2" of the gRPC project (PROTOCOL-HTTP2.md) is the standard; names of its
grammar are in capitals here. What stands between them is in `messages`.
"""

import base64
import math
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import ztserve
from ztserve.transport.http2 import Block, Fields, Request, Response, encode
from ztserve.transport.messages import Unreadable
from ztserve.transport.status import Code

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
"""Names in lower case; the values of names in ``-bin`` are bytes."""

ENCODINGS = "identity,gzip"
"""What we read (grpc-accept-encoding)."""
MAX_VALUES = 64
"""Of one binary field (Binary-Header: a comma stands between two)."""
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_CONTENT_TYPE = re.compile(rb"application/grpc(?:[+;].*)?")
_ASCII_VALUE = re.compile(rb"[\x20-\x7e]*")
_RESERVED = frozenset(
    (b"te", b"content-type", b"user-agent", b"host", b"content-length")
)
_SPACE = 0x20
_PLAIN = frozenset(range(0x20, 0x7F)) - {ord("%")}


class Status(NamedTuple):
    """How a call ends: gRPC's code, the sentence, and the trailing metadata."""

    code: int
    message: str
    metadata: Metadata


GOOD = Status(Code.OK, "", ())


def timeout_s(fields: Fields) -> float | None:
    """Return the seconds of ``grpc-timeout``; None: there is none.

    Raises Unreadable for one that is malformed.
    """
    for name, value in fields:
        if name == b"grpc-timeout":
            found = _TIMEOUT.fullmatch(value)
            if found is None:
                raise Unreadable(Code.INTERNAL, f"grpc-timeout {value[:80]!r}")
            return int(found[1]) * _UNIT_S[found[2]]
    return None


def is_gzip(fields: Fields) -> bool:
    """Return whether messages come compressed. Raises Unreadable for another way."""
    for name, value in fields:
        if name == b"grpc-encoding" and value != b"identity":
            if value != b"gzip":
                raise Unreadable(Code.UNIMPLEMENTED, f"grpc-encoding {value[:80]!r}")
            return True
    return False


def is_grpc(request: Request) -> bool:
    """Return whether `request` is a call of gRPC's, by method and content type."""
    for name, value in request.fields:
        if name == b"content-type":
            known = _CONTENT_TYPE.fullmatch(value) is not None
            return known and request.method == b"POST"
    return False


def metadata(fields: Fields) -> Metadata:
    """Return a call's Custom-Metadata; what is gRPC's or HTTP's own is left out.

    Raises Unreadable where the value of a binary name is not base64, or that of
    another holds what is not printable ASCII.
    """
    found: list[tuple[str, str | bytes]] = []
    for name, value in fields:
        if name in _RESERVED or name.startswith(b"grpc-"):
            continue
        if name.endswith(b"-bin"):
            found.extend((name.decode(), one) for one in _binary(name, value))
        elif _ASCII_VALUE.fullmatch(value):
            found.append((name.decode(), value.decode()))
        else:
            raise Unreadable(Code.INTERNAL, f"the metadata {name[:80]!r} is not ASCII")
    return tuple(found)


def _binary(name: bytes, value: bytes) -> Iterator[bytes]:
    # A comma is a byte for the caller, and a value for us.
    if value.count(b",") >= MAX_VALUES:
        reason = f"{name[:80]!r} has over {MAX_VALUES} values"
        raise Unreadable(Code.INTERNAL, reason)
    for one in value.split(b","):
        try:
            yield base64.b64decode(one + b"=" * (-len(one) % 4), validate=True)
        except ValueError as error:
            raise Unreadable(Code.INTERNAL, f"{name[:80]!r} is not base64") from error


def fields_of(given: Iterable[tuple[str, str | bytes]]) -> Fields:
    """Return metadata as fields."""
    return tuple(
        (
            name.encode(),
            base64.b64encode(value).rstrip(b"=")
            if isinstance(value, bytes)
            else value.encode(),
        )
        for name, value in given
    )


def percent_encoded(text: str) -> bytes:
    """Return a status message as grpc-message bears it (Percent-Encoded).

    A space at either end too, which no field value may have (RFC 9110, 5.5).
    """
    raw = text.encode(errors="replace")
    last = len(raw) - 1
    return b"".join(
        bytes((one,))
        if one in _PLAIN and (one != _SPACE or 0 < at < last)
        else b"%%%02X" % one
        for at, one in enumerate(raw)
    )


def percent_decoded(value: bytes) -> str:
    """Return what `percent_encoded` was given; what is malformed stands as it is."""
    raw = re.sub(
        rb"%([0-9A-Fa-f]{2})", lambda found: bytes((int(found[1], 16),)), value
    )
    return raw.decode(errors="replace")


# --- a server's heads and trailers --------------------------------------------------

_HEAD = ((b":status", b"200"), (b"content-type", b"application/grpc"))
HEAD: Block = encode(_HEAD)
"""Of each answer that has a message."""
_GOOD = ((b"grpc-status", b"0"),)
OK: Block = encode(_GOOD)
"""The trailers of a call that went well."""
NOT_GRPC: Block = encode(((b":status", b"415"),))


def trailers(status: Status) -> Block:
    """Return the trailers of a call that had a head."""
    return OK if status is GOOD else encode(_ended(status))


def trailers_only(status: Status) -> Block:
    """Return the whole answer of a call without a message (Trailers-Only)."""
    return encode((*_HEAD, *_ended(status)))


def _ended(status: Status) -> Fields:
    return (
        (b"grpc-status", b"%d" % status.code),
        (b"grpc-message", percent_encoded(status.message)),
        *fields_of(status.metadata),
    )


# --- a client's heads, and what comes back ------------------------------------------

USER_AGENT = f"grpc-python-ztserve/{ztserve.__version__}".encode()
_MOST_OF_A_UNIT = 99_999_999  # TimeoutValue: eight digits
_CODES_OF_HTTP = {
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    **dict.fromkeys((429, 502, 503, 504), Code.UNAVAILABLE),
}


@lru_cache(maxsize=256)
def request_head(path: str, authority: str) -> Block:
    """Return the head of a call without its timeout and metadata (Request-Headers)."""
    return encode(
        (
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", path.encode()),
            (b":authority", authority.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", USER_AGENT),
        )
    )


def timeout(left_s: float) -> Block:
    """Return the field that tells how long a caller waits.

    Rounded up to tenths of a second, where it is more than one: a server then sees
    equal heads of equal calls.
    """
    left_s = min(left_s, _MOST_OF_A_UNIT)  # also of one that waits for ever
    step_ms = 100 if left_s > 1 else 1
    return _timeout(max(math.ceil(left_s * 1000 / step_ms), 1) * step_ms)


@lru_cache(maxsize=256)
def _timeout(milliseconds: int) -> Block:
    if milliseconds <= _MOST_OF_A_UNIT:
        return encode(((b"grpc-timeout", b"%dm" % milliseconds),))
    seconds = min(milliseconds // 1000, _MOST_OF_A_UNIT)
    return encode(((b"grpc-timeout", b"%dS" % seconds),))


def answered(head: Response) -> Status | None:
    """Return how a call ended whose answer begins with `head`; None: gRPC tells it.

    "HTTP to gRPC Status Code Mapping" of the gRPC project.
    """
    if head.status != 200:
        code = _CODES_OF_HTTP.get(head.status, Code.UNKNOWN)
        return Status(code, f"HTTP status {head.status}", ())
    for name, value in head.fields:
        if name == b"content-type" and _CONTENT_TYPE.fullmatch(value):
            return None
    return Status(Code.UNKNOWN, "the answer is not gRPC", ())


def status(trailers: Fields) -> Status:
    """Return what the trailers of a call say. Raises Unreadable where that is none."""
    if trailers == _GOOD:
        return GOOD
    code: int | None = None
    text = ""
    for name, value in trailers:
        if name == b"grpc-status" and value.isdigit() and len(value) < 4:
            code = int(value)
        elif name == b"grpc-message":
            text = percent_decoded(value)
    if code is None:
        raise Unreadable(Code.UNKNOWN, "the answer ends without a grpc-status")
    return Status(code, text, metadata(trailers))
