"""Differences in what becomes of streams, and in the bounds (RFC 9113, 5 and 10.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h2.exceptions import TooManyStreamsError

from tests.fuzz.http2_classes import is_
from ztserve.transport.http2 import Code, frames

if TYPE_CHECKING:
    from tests.fuzz.http2_case import Case

MAX_SETTINGS = 32
"""Settings that a peer can mean in one frame: there are fewer than ten."""
_HEADS = (frames.HEADERS, frames.CONTINUATION)


@is_(
    "late frame",
    "ignored",
    "RST_STREAM once more",
    "5.1",
    "what was sent before our reset arrived is discarded",
    on=True,
)
def _late(case: Case) -> bool:
    return (
        case.seen is not None
        and case.seen.reset == "us"
        and case.kind in (frames.DATA, *_HEADS)
        and case.ours.fatal is None
        and not case.ours.told
        and case.theirs.fatal is None
        and not case.theirs.told
        and case.theirs.resent == [case.stream]
    )


@is_(
    "frame on a stream that was passed over",
    "connection error PROTOCOL_ERROR",
    "RST_STREAM",
    "5.1.1",
    "its number is lower than that of one begun before, and it never was",
)
def _passed_over(case: Case) -> bool:
    return (
        case.ours.fatal == Code.PROTOCOL_ERROR
        and "passed over" in case.ours.reason
        and case.kind in (frames.DATA, *_HEADS)
        and case.is_closed
        and case.seen is None
    )


@is_(
    "frame on a closed stream",
    "connection error STREAM_CLOSED",
    "RST_STREAM",
    "5.1",
    "the peer had ended it, so it is not late",
)
def _closed(case: Case) -> bool:
    return (
        case.ours.fatal == Code.STREAM_CLOSED
        and case.kind in (frames.DATA, *_HEADS)
        and case.is_closed
        and case.theirs.fatal is None
        and case.theirs.resent == [case.stream]
    )


@is_(
    "a late interim head",
    "ignored",
    "connection error",
    "5.1",
    "what was sent before our reset arrived is discarded",
)
def _late_interim(case: Case) -> bool:
    return (
        case.seen is not None
        and case.seen.reset == "us"
        and case.interim
        and case.ours.fatal is None
        and not case.ours.told
        and case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "a second fault on a closed stream",
    "STREAM_CLOSED",
    "PROTOCOL_ERROR",
    "4.3, 5.1",
    "its block is not read any more; either code is due",
)
def _second_fault(case: Case) -> bool:
    seen = case.seen
    codes = (Code.PROTOCOL_ERROR, Code.ENHANCE_YOUR_CALM)
    if case.kind not in _HEADS or case.theirs.fatal not in codes:
        return False
    if seen is not None and seen.ended and case.our_error == Code.STREAM_CLOSED:
        return case.interim
    unread = case.is_unreadable or case.list_is_large or case.padding_refused
    refused = case.ours.fatal == Code.STREAM_CLOSED and case.is_closed
    return refused and (unread or case.interim)


@is_(
    "too large a block on no stream",
    "PROTOCOL_ERROR",
    "ENHANCE_YOUR_CALM",
    "5.1.1, 10.5.1",
    "its block is not read any more; either code is due",
)
def _large_on_none(case: Case) -> bool:
    return (
        case.is_idle
        and (case.watch.client or case.stream % 2 == 0)
        and case.list_is_large
        and case.ours.fatal == Code.PROTOCOL_ERROR
        and case.theirs.fatal == Code.ENHANCE_YOUR_CALM
    )


@is_(
    "false padding on a closed stream",
    "ignored where late, else STREAM_CLOSED",
    "its padding is refused",
    "5.1",
    "such a frame is counted and discarded, not read",
)
def _late_padding(case: Case) -> bool:
    return (
        case.kind == frames.DATA
        and bool(case.flags & frames.PADDED)
        and case.payload_of_data() == case.length
        and case.is_closed
        and case.ours.fatal in (None, Code.STREAM_CLOSED)
        and not case.ours.told
        and case.theirs.fatal in (Code.PROTOCOL_ERROR, Code.FRAME_SIZE_ERROR)
    )


@is_(
    "HEADERS on a stream passed over",
    "STREAM_CLOSED",
    "PROTOCOL_ERROR",
    "5.1, 5.1.1",
    "a higher stream closed it; either code is due",
)
def _passed_over(case: Case) -> bool:
    return (
        case.kind in _HEADS
        and case.ours.fatal == Code.STREAM_CLOSED
        and case.theirs.fatal == Code.PROTOCOL_ERROR
        and case.seen is None
        and case.stream <= case.watch.highest
    )


@is_(
    "a stream begun by a server",
    "connection error",
    "taken as a request",
    "8.4",
    "a server begins streams by PUSH_PROMISE alone",
)
def _by_server(case: Case) -> bool:
    return (
        case.kind in _HEADS
        and case.watch.client
        and case.stream % 2 == 0
        and case.ours.fatal == Code.PROTOCOL_ERROR
        and case.theirs.fatal is None
    )


@is_(
    "too many streams",
    "REFUSED_STREAM",
    "connection error",
    "5.1.2",
    "a stream error, and safe to try again",
)
def _too_many(case: Case) -> bool:
    return (
        case.kind in _HEADS
        and case.our_error == Code.REFUSED_STREAM
        and case.theirs.fatal == Code.PROTOCOL_ERROR
        and case.watch.open() >= case.watch.bounds.max_streams
    )


@is_(
    "after our GOAWAY",
    "ignored",
    "taken",
    "6.8",
    "what begins after it is not run",
)
def _after_goaway(case: Case) -> bool:
    return (
        case.kind in _HEADS
        and case.watch.drained
        and case.stream > case.watch.highest
        and case.ours.fatal is None
        and not case.ours.told
        and [item[0] for item in case.theirs.told] in (["request"], [])
    )


@is_(
    "too many streams, and no new one",
    "late, closed, or not to be read",
    "connection error before it looks",
    "5.1, 5.1.2",
    "the limit is one of new streams",
)
def _too_many_else(case: Case) -> bool:
    late = case.seen is not None and case.seen.reset == "us"
    return isinstance(case.error, TooManyStreamsError) and (
        (case.ours.fatal is None and late and not case.ours.told)
        or (case.ours.fatal == Code.STREAM_CLOSED and case.is_closed)
        or (case.ours.fatal == Code.COMPRESSION_ERROR and case.is_unreadable)
        or (case.ours.fatal == Code.ENHANCE_YOUR_CALM and case.list_is_large)
    )


@is_(
    "DATA before a head",
    "stream error",
    "connection error",
    "8.1, 8.1.1",
    "a malformed message is a stream error",
)
def _headless(case: Case) -> bool:
    return (
        case.kind == frames.DATA
        and case.seen is not None
        and not case.seen.has_head
        and case.our_error == case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "flood",
    "ENHANCE_YOUR_CALM",
    "taken, or refused for another fault",
    "10.5",
    "each costs us more than it costs the peer",
)
def _flood(case: Case) -> bool:
    counts, bounds = case.watch.counts, case.watch.bounds
    over = (
        (case.kind == frames.SETTINGS and counts["settings"] > bounds.settings)
        or (case.kind == frames.SETTINGS and case.length > 6 * MAX_SETTINGS)
        or (case.kind == frames.PING and counts["pings"] > bounds.pings)
        or counts["resets"] + _costs_a_stream(case) > bounds.resets
        or counts["idle"] > bounds.idle_frames
    )
    return case.ours.fatal == Code.ENHANCE_YOUR_CALM and over


def _costs_a_stream(case: Case) -> bool:
    """Return whether a frame that we refused as one too many is an offence."""
    others = case.theirs.fatal is not None or bool(case.theirs.errors())
    return case.kind != frames.RST_STREAM and (others or bool(case.malformed))


@is_(
    "a header block too large",
    "ENHANCE_YOUR_CALM",
    "taken, up to 64 CONTINUATION frames",
    "10.5.1",
    "a block is held whole before it is read",
)
def _large_block(case: Case) -> bool:
    bounds = case.watch.bounds
    held = len(case.watch.block[2]) if case.watch.block else 0
    return (
        case.kind in _HEADS
        and case.ours.fatal == Code.ENHANCE_YOUR_CALM
        and (
            case.watch.pieces > bounds.max_continuations
            or held + case.length > bounds.max_header_bytes
        )
    )
