"""Differences in header blocks and messages (RFC 9113, 8; RFC 7541; RFC 9110)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz.http2_classes import is_
from tests.fuzz.http2_fields import updates, why_malformed
from ztserve.transport.http2 import Code, frames

if TYPE_CHECKING:
    from tests.fuzz.http2_case import Case

_HEADS = (frames.HEADERS, frames.CONTINUATION)


@is_(
    "cookies",
    "as they came",
    "joined, and last",
    "8.2.3",
    "they are to be joined only where they leave HTTP/2",
    on=True,
)
def _cookies(case: Case) -> bool:
    if not (len(case.ours.told) == len(case.theirs.told) == 1):
        return False
    ours, theirs = case.ours.told[0], case.theirs.told[0]
    if ours[0] not in ("request", "response", "trailers") or ours[1] != theirs[1]:
        return False
    rest = [field for field in ours[2] if field[0] != b"cookie"]
    crumbs = [value for name, value in ours[2] if name == b"cookie"]
    joined = (*rest, (b"cookie", b"; ".join(crumbs)))
    return bool(crumbs) and (ours[0], joined, ours[3]) == (theirs[0], *theirs[2:])


@is_(
    "a block that cannot be read",
    "COMPRESSION_ERROR",
    "PROTOCOL_ERROR",
    "4.3",
    "the code that the section names",
)
def _compression(case: Case) -> bool:
    return (
        case.is_unreadable
        and case.ours.fatal == Code.COMPRESSION_ERROR
        and case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "a head that is too large",
    "stream error",
    "connection error",
    "8.1.1, 10.5.1",
    "it was read whole, and the table is in step; the other streams did nothing",
)
def _large(case: Case) -> bool:
    return (
        case.ours.fatal is None
        and case.our_error == Code.ENHANCE_YOUR_CALM
        and case.theirs.fatal == Code.ENHANCE_YOUR_CALM
        and case.list_is_large
    )


@is_(
    "a large head that is read further",
    "dropped, STREAM_CLOSED or COMPRESSION_ERROR",
    "connection error by its size",
    "10.5.1",
    "up to twice the bound is read, to keep the table; what else is wrong counts then",
)
def _further(case: Case) -> bool:
    ours = case.ours
    late = ours.fatal is None and not ours.told
    too_many = ours.fatal is not None and case.theirs.fatal == Code.PROTOCOL_ERROR
    return (
        (case.theirs.fatal == Code.ENHANCE_YOUR_CALM or too_many)
        and case.list_is_large
        and (
            late
            or ours.fatal == Code.COMPRESSION_ERROR
            or case.our_error == Code.STREAM_CLOSED
        )
    )


@is_(
    "te in a response",
    "stream error",
    "takes it",
    "8.2.2",
    "it is a field of requests; connection-specific fields are malformed",
)
def _te(case: Case) -> bool:
    fields = case.listed or ()
    return (
        case.our_error == Code.PROTOCOL_ERROR
        and (b"te", b"trailers") in fields
        and any(name == b":status" for name, _ in fields)
    )


@is_(
    ":path of *",
    "stream error",
    "takes it",
    "8.3.1",
    "it is that of OPTIONS alone",
)
def _asterisk(case: Case) -> bool:
    fields = dict(case.listed or ())
    return (
        case.our_error == Code.PROTOCOL_ERROR
        and fields.get(b":path") == b"*"
        and fields.get(b":method") != b"OPTIONS"
    )


@is_(
    "more than two updates of the table",
    "COMPRESSION_ERROR",
    "taken",
    "RFC 7541, 4.2",
    "an encoder has two at most; thousands cost much to read",
)
def _updates(case: Case) -> bool:
    return (
        case.head is not None
        and updates(case.head[1]) > 2
        and case.ours.fatal == Code.COMPRESSION_ERROR
    )


@is_(
    "malformed",
    "stream error",
    "connection error",
    "8.1.1",
    "malformed messages are stream errors; the other streams did nothing",
)
def _malformed(case: Case) -> bool:
    return (
        case.kind in (frames.DATA, *_HEADS)
        and bool(case.malformed)
        and case.our_error == case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "content-length of a 204 or 304",
    "need not be the body's",
    "connection error",
    "8.1.1",
    "it says what the content would have been",
)
def _bodiless(case: Case) -> bool:
    return (
        case.kind == frames.DATA
        and case.seen is not None
        and case.seen.bodiless
        and case.payload_of_data() == 0
        and case.ours.fatal is None
        and case.our_error is None
        and case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "content-length in trailers",
    "taken as any field",
    "connection error where it is no number",
    "RFC 9110, 6.5.1",
    "it says nothing of the body there",
)
def _length_in_trailers(case: Case) -> bool:
    return (
        case.listed is not None
        and case.list_kind == "trailers"
        and b"content-length" in dict(case.listed)
        and [item[0] for item in case.ours.told] == ["trailers"]
        and case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "no authority",
    "taken",
    "connection error",
    "8.3.1",
    "it is left out where there is none to convey",
)
def _no_authority(case: Case) -> bool:
    listed = case.listed
    return (
        listed is not None
        and case.list_kind == "request"
        and not case.malformed
        and not {b":authority", b"host"} & dict(listed).keys()
        and [item[0] for item in case.ours.told] == ["request"]
        and case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "an empty authority",
    "as if there were none",
    "compared with host",
    "8.3.1",
    "an empty one names nothing that host could differ from",
)
def _empty_authority(case: Case) -> bool:
    values = dict(case.listed or ())
    return (
        not case.malformed
        and values.get(b":authority") == b""
        and bool(values.get(b"host"))
        and [item[0] for item in case.ours.told] == ["request"]
        and case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "a cookie before a pseudo-header field",
    "stream error",
    "taken: cookies were moved before it looked",
    "8.3",
    "pseudo-header fields come first",
)
def _cookie_first(case: Case) -> bool:
    listed = case.listed or ()
    rest = tuple(field for field in listed if field[0] != b"cookie")
    return (
        "section 8" in case.malformed
        and len(rest) < len(listed)
        and "section 8" not in why_malformed(rest, case.list_kind)
        and case.our_error == Code.PROTOCOL_ERROR
        and case.only_ours
    )


def _stricter(name: str, section: str, why: str) -> None:
    """Add a class of messages that break `name` alone, and that h2 takes."""

    def broken(case: Case) -> bool:
        return (
            case.kind in (frames.DATA, *_HEADS)
            and name in case.malformed
            and "section 8" not in case.malformed
            and case.our_error == Code.PROTOCOL_ERROR
            and case.only_ours
        )

    is_(name, "stream error", "taken", section, why)(broken)


_stricter(
    "a name or method that is no token", "8.2.1; RFC 9110, 5.1, 9.1", "both are tokens"
)
_stricter(
    "a control character in a value", "8.2.1; RFC 9110, 5.5", "no field may have one"
)
_stricter(
    "te in capitals", "8.2.2", "stricter than need be: its one value, as it is written"
)
_stricter(
    "a scheme or path that is none",
    "8.3.1; RFC 3986, 3.3",
    "http and https are served; a path begins with /, or is *",
)
_stricter(
    "a status that is none", "8.3.2, 8.6; RFC 9110, 15", "three digits, 1xx to 5xx"
)
_stricter("an authority that is none", "8.3.1", "a host and a port, and no user")
_stricter("content in a 204 or 304", "8.1.1; RFC 9110, 6.4.1", "they have none")
_stricter("CONNECT", "8.5", "we are no proxy")
_stricter("a length over 15 digits", "RFC 9110, 8.6", "no such body is taken")
_stricter(
    "a body shorter than its content-length, ended by HEADERS",
    "8.1.1",
    "the sum of the DATA frames must be equal to it",
)
