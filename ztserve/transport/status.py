"""The one table between errors and status codes, in both directions.

A refused call carries the error's class name and the call's id in its trailing
metadata, so that the client raises the same typed error, with the public sentence.
The statuses are those of the gRPC core documentation ("Status codes and their use in
gRPC") and of RFC 9110 for the HTTP edge.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import grpc

from ztserve.errors import (
    CallError,
    Cancelled,
    DeadlineExceeded,
    Denied,
    InferenceError,
    Interrupted,
    InvalidInput,
    NotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
    Withheld,
    ZTServeError,
)

ERROR_KEY = "zt-error"
CALL_KEY = "zt-call-id"
MAX_SENTENCE = 1024
"""Longest public sentence that travels, in characters."""

_Code = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class Status:
    """How one kind of error looks on the wire."""

    code: grpc.StatusCode
    http: int


TABLE: Mapping[type[Exception], Status] = MappingProxyType(
    {
        Unauthenticated: Status(_Code.UNAUTHENTICATED, 401),
        Denied: Status(_Code.PERMISSION_DENIED, 403),
        InvalidInput: Status(_Code.INVALID_ARGUMENT, 400),
        NotFound: Status(_Code.NOT_FOUND, 404),
        Overloaded: Status(_Code.RESOURCE_EXHAUSTED, 429),
        DeadlineExceeded: Status(_Code.DEADLINE_EXCEEDED, 504),
        Cancelled: Status(_Code.CANCELLED, 499),
        Unavailable: Status(_Code.UNAVAILABLE, 503),
        # Never UNAVAILABLE: stock clients would take it as leave to send it again.
        Interrupted: Status(_Code.ABORTED, 502),
        Withheld: Status(_Code.FAILED_PRECONDITION, 422),
        InferenceError: Status(_Code.INTERNAL, 500),
    }
)
_INTERNAL = Status(_Code.INTERNAL, 500)
_BY_NAME = {error.__name__: error for error in TABLE}
_BY_CODE = {row.code: error for error, row in TABLE.items()}
_BY_CODE[_Code.UNIMPLEMENTED] = NotFound


def status(error: BaseException) -> Status:
    """Return the row of `error`; what is in no row is an internal error."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    return _INTERNAL


def http_status(error: BaseException) -> int:
    """Return the HTTP status by which the edge tells of `error`."""
    return status(error).http


def sentence(error: BaseException, call_id: str) -> str:
    """Return all that the caller is told of `error`."""
    if isinstance(error, CallError):
        return error.public[:MAX_SENTENCE]
    if isinstance(error, InferenceError):
        return f"the model failed on this request (call {call_id})"
    return f"internal error (call {call_id})"


def kind(error: BaseException) -> str:
    """Return the class name under which the client raises `error` again."""
    for one in type(error).__mro__:
        if one in TABLE:
            return one.__name__
    return InferenceError.__name__


def trailers(error: BaseException, call_id: str) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata of a call that ends in `error`."""
    return ((ERROR_KEY, kind(error)), (CALL_KEY, call_id))


# --- the client's half ----------------------------------------------------------

_LIKELY = (
    (
        "Hostname Verification Check failed",
        "the server's certificate is not for the expected SPIFFE ID {server}",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is not signed by the trust bundle of {server}'s "
        "trust domain, or is expired: is it of another trust domain or authority?",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "the server does not speak TLS at this address: is it the right port?",
    ),
    (
        "Connection refused",
        "nothing listens there: is the deployment running, and on this port?",
    ),
    (
        "TSI_DATA_CORRUPTED",  # what gRPC makes of an alert after its own Finished
        "the server refused this client in the handshake: probably it does not trust "
        "this client's SVID (another trust domain, expired, in quarantine, or an "
        "authority that its bundle does not hold)",
    ),
    (
        "Socket closed",
        "the server closed the connection during the handshake: probably it does not "
        "trust this client's SVID (another trust domain, expired, or an authority "
        "that its bundle does not hold)",
    ),
)
_REFUSED_STREAM = "RST_STREAM with error code 7"  # RFC 9113, 8.7: not processed
_NEVER_SENT = "failed to connect to all addresses"
_TOO_LARGE = "larger than max"


def rebuilt(name: str, public: str, call_id: str, server: str) -> ZTServeError:
    """Return the error that a verified server names, to be raised by the client."""
    error = _BY_NAME.get(name, InferenceError)
    reason = f"{public} (call {call_id or 'unknown'}, answered by {server})"
    if issubclass(error, CallError):
        return error(public, reason)
    return InferenceError(reason)


def translated(
    code: grpc.StatusCode,
    details: str,
    metadata: Iterable[tuple[str, str | bytes]],
    server: str,
) -> ZTServeError:
    """Return the typed error of a failed call.

    Only Overloaded and Unavailable mean that the call surely did not run.
    """
    known = dict(metadata)
    name = known.get(ERROR_KEY)
    if isinstance(name, str):
        return rebuilt(name, details, str(known.get(CALL_KEY, "")), server)
    if code is _Code.UNAVAILABLE:
        return _connection(details, server)
    if code is _Code.RESOURCE_EXHAUSTED and _TOO_LARGE in details:
        return _error(
            InvalidInput, "the message is larger than the receiver takes", details
        )
    if code is _Code.CANCELLED:
        return _error(Interrupted, "the server ended the call", details)
    error = _BY_CODE.get(code, InferenceError)
    if issubclass(error, CallError):
        return error(details or code.name, f"{code.name}: {details} ({server})")
    return InferenceError(f"{code.name}: {details} ({server})")


def _connection(details: str, server: str) -> CallError:
    if _REFUSED_STREAM in details:
        return _error(Overloaded, "the server takes no more calls now", details)
    if not details.startswith(_NEVER_SENT):
        broken = "the connection broke during the call; it may have run"
        return _error(Interrupted, broken, details)
    for symptom, cause in _LIKELY:
        if symptom in details:
            return _error(Unavailable, cause.format(server=server), details)
    return _error(Unavailable, f"no connection to {server}", details)


def _error(kind: type[CallError], public: str, details: str) -> CallError:
    return kind(public, f"{public} [{details}]")
