"""The one table between errors and status codes, in both directions.

A refused call carries the error's class name and the call's id in its trailing
metadata, so that the client raises the same typed error, with the public sentence.
The statuses are those of the gRPC core documentation ("Status codes and their use in
gRPC") and of RFC 9110 for the HTTP edge.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

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


class Code(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


@dataclass(frozen=True, slots=True)
class Status:
    """How one kind of error looks on the wire."""

    code: Code
    http: int


TABLE: Mapping[type[ZTServeError], Status] = MappingProxyType(
    {
        Unauthenticated: Status(Code.UNAUTHENTICATED, 401),
        Denied: Status(Code.PERMISSION_DENIED, 403),
        InvalidInput: Status(Code.INVALID_ARGUMENT, 400),
        NotFound: Status(Code.NOT_FOUND, 404),
        Overloaded: Status(Code.RESOURCE_EXHAUSTED, 429),
        DeadlineExceeded: Status(Code.DEADLINE_EXCEEDED, 504),
        Cancelled: Status(Code.CANCELLED, 499),
        Unavailable: Status(Code.UNAVAILABLE, 503),
        # Never UNAVAILABLE: stock clients would take it as leave to send it again.
        Interrupted: Status(Code.ABORTED, 502),
        Withheld: Status(Code.FAILED_PRECONDITION, 422),
        InferenceError: Status(Code.INTERNAL, 500),
    }
)
_INTERNAL = Status(Code.INTERNAL, 500)
_BY_NAME = {error.__name__: error for error in TABLE}
_BY_CODE: dict[int, type[ZTServeError]] = {
    row.code: error for error, row in TABLE.items()
}
_BY_CODE[Code.UNIMPLEMENTED] = NotFound
_NAMES: dict[int, str] = {code: code.name for code in Code}


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


def rebuilt(name: str, public: str, call_id: str, server: str) -> ZTServeError:
    """Return the error that a verified server names, to be raised by the client."""
    error = _BY_NAME.get(name, InferenceError)
    reason = f"{public} (call {call_id or 'unknown'}, answered by {server})"
    if issubclass(error, CallError):
        return error(public, reason)
    return InferenceError(reason)


def translated(
    code: int,
    details: str,
    metadata: Iterable[tuple[str, str | bytes]],
    server: str,
) -> ZTServeError:
    """Return the typed error of a call that the server ended in `code`, not 0.

    Only Overloaded and Unavailable mean that the call surely did not run.
    """
    known = dict(metadata)
    name = known.get(ERROR_KEY)
    if isinstance(name, str):
        return rebuilt(name, details, str(known.get(CALL_KEY, "")), server)
    error, words = _BY_CODE.get(code, InferenceError), _NAMES.get(code, f"code {code}")
    reason = f"{words}: {details} ({server})"
    if error in (Unavailable, Cancelled):  # of a server that is not ours
        return Interrupted("the server ended the call; it may have run", reason)
    if issubclass(error, CallError):
        return error(details or words, reason)
    return InferenceError(reason)
