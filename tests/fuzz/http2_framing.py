"""Differences in the framing, in settings and in windows (RFC 9113, 4 to 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz.http2_case import allowed_setting, declared_settings
from tests.fuzz.http2_classes import is_
from ztserve.transport.http2 import Code, frames

if TYPE_CHECKING:
    from tests.fuzz.http2_case import Case


@is_(
    "first frame",
    "connection error",
    "takes it",
    "3.4",
    "the preface is followed by SETTINGS",
)
def _first_frame(case: Case) -> bool:
    wrong = case.kind != frames.SETTINGS or bool(case.flags & frames.ACK)
    return (
        case.ours.fatal == Code.PROTOCOL_ERROR
        and case.watch.counts["frames"] == 1
        and wrong
    )


@is_(
    "frame too large",
    "refused by its header",
    "waits for the whole frame",
    "4.2",
    "nothing of it need be held",
)
def _too_large(case: Case) -> bool:
    return (
        case.ours.fatal == Code.FRAME_SIZE_ERROR
        and case.length > case.watch.bounds.max_frame_bytes
    )


@is_(
    "refused by its header",
    "waits for the whole frame",
    "connection error",
    "6",
    "it is refused when it is whole",
)
def _early(case: Case) -> bool:
    return (
        not case.whole
        and case.ours.fatal is None
        and case.theirs.fatal == Code.PROTOCOL_ERROR
        and case.misplaced
    )


@is_(
    "two faults in a frame of a wrong size",
    "FRAME_SIZE_ERROR or PROTOCOL_ERROR",
    "the other of them",
    "4.2, 6, 6.2",
    "either code is due",
)
def _two_faults(case: Case) -> bool:
    codes = {case.ours.fatal, case.theirs.fatal}
    elsewhere = case.misplaced or case.watch.block is not None
    both = frames.PADDED | frames.PRIORITIZED
    short = case.kind == frames.HEADERS and case.flags & both == both
    return codes == {Code.FRAME_SIZE_ERROR, Code.PROTOCOL_ERROR} and (
        (case.missized and elsewhere)
        or (case.is_idle and case.flags & frames.PADDED and not case.length)
        or (short and 0 < case.length < 6 and case.payload[0] >= case.length)
    )


@is_(
    "acknowledgement with a payload",
    "FRAME_SIZE_ERROR",
    "PROTOCOL_ERROR",
    "6.5",
    "the code that the section names",
)
def _acknowledgement(case: Case) -> bool:
    return (
        case.kind == frames.SETTINGS
        and bool(case.flags & frames.ACK)
        and case.length > 0
        and case.ours.fatal == Code.FRAME_SIZE_ERROR
        and case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "PRIORITY of a wrong size",
    "stream error",
    "connection error",
    "6.3",
    "the section asks for a stream error",
)
def _priority_size(case: Case) -> bool:
    return (
        case.kind == frames.PRIORITY
        and case.length != 5
        and case.our_error == case.theirs.fatal == Code.FRAME_SIZE_ERROR
    )


@is_(
    "priority on itself",
    "ignored",
    "connection error",
    "5.3.2",
    "priorities are deprecated and have no meaning to us",
)
def _on_itself(case: Case) -> bool:
    return (
        case.ours.fatal is None
        and case.our_error is None
        and case.theirs.fatal == Code.PROTOCOL_ERROR
        and case.depends_on() == case.stream
    )


@is_(
    "padding that fills its frame",
    "taken",
    "connection error",
    "6.2",
    "it is not larger than what is left for the block, which is empty",
)
def _padding(case: Case) -> bool:
    return (
        case.kind == frames.HEADERS
        and bool(case.flags & frames.PADDED)
        and case.payload[:1] == bytes((min(255, max(0, case.length - 1)),))
        and case.padding_refused
        and case.ours.fatal in (None, Code.COMPRESSION_ERROR)
    )


@is_(
    "padding into the priority",
    "PROTOCOL_ERROR",
    "taken",
    "6.2",
    "it is larger than what is left for the block",
)
def _padding_into_priority(case: Case) -> bool:
    both = frames.PADDED | frames.PRIORITIZED
    return (
        case.kind == frames.HEADERS
        and case.flags & both == both
        and case.length > 5
        and case.length - 6 < case.payload[0] < case.length
        and case.ours.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "CONTINUATION out of place, or missing",
    "PROTOCOL_ERROR",
    "another code for a second fault, or a closed stream",
    "4.3, 6.10",
    "the code that the section names",
)
def _continuation(case: Case) -> bool:
    block, refused = case.watch.block, case.ours.fatal == Code.PROTOCOL_ERROR
    if block is None:
        return refused and case.kind == frames.CONTINUATION and case.is_closed
    wrong = case.kind != frames.CONTINUATION or case.stream != block[1]
    return refused and wrong and case.whole and case.theirs.fatal is not None


@is_(
    "PUSH_PROMISE",
    "connection error PROTOCOL_ERROR",
    "another code, or later",
    "6.6, 8.4",
    "none was allowed, whatever is in it",
)
def _push(case: Case) -> bool:
    return (
        case.kind == frames.PUSH_PROMISE
        and case.whole
        and case.ours.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "ALTSVC",
    "ignored",
    "read, and refused where malformed",
    "5.5",
    "an extension that we do not know",
)
def _altsvc(case: Case) -> bool:
    return (
        case.kind == 10
        and case.whole
        and case.ours.fatal is None
        and not case.ours.told
        and case.theirs.fatal in (Code.PROTOCOL_ERROR, Code.FRAME_SIZE_ERROR)
    )


@is_(
    "ENABLE_CONNECT_PROTOCOL",
    "ignored",
    "refused over 1",
    "6.5.2",
    "a setting that we do not know",
)
def _connect_protocol(case: Case) -> bool:
    given, client = dict(declared_settings(case.payload)), case.watch.client
    wrong = [item for item in given.items() if not allowed_setting(*item, client)]
    code = Code.FLOW_CONTROL_ERROR if wrong else None
    return (
        case.kind == frames.SETTINGS
        and case.ours.fatal == code
        and case.theirs.fatal == Code.PROTOCOL_ERROR
        and given.get(8, 0) > 1
    )


@is_(
    "a setting given twice",
    "each is read, in order",
    "only the last is",
    "6.5.3",
    "they are processed in the order in which they appear",
)
def _twice(case: Case) -> bool:
    given, client = declared_settings(case.payload), case.watch.client
    wrong = [name for name, value in given if not allowed_setting(name, value, client)]
    if case.kind != frames.SETTINGS or len(dict(given)) == len(given) or not wrong:
        return False
    if wrong[0] == frames.INITIAL_WINDOW_SIZE:
        return case.ours.fatal == Code.FLOW_CONTROL_ERROR
    return case.ours.fatal == Code.PROTOCOL_ERROR


@is_(
    "an initial window given twice",
    "each is applied, in order",
    "only the last is",
    "6.5.3",
    "the first makes a widened window overflow, which the last undoes too late",
)
def _twice_widened(case: Case) -> bool:
    sizes = initial_windows(case)
    return (
        len(sizes) > 1
        and case.ours.fatal == Code.FLOW_CONTROL_ERROR
        and case.theirs.fatal is None
        and any(
            max(sizes) + seen.widened > frames.MOST_WINDOW
            for seen in case.watch.streams.values()
            if not seen.closed
        )
    )


@is_(
    "an initial window and a closed stream",
    "has no window any more",
    "a widened one overflows",
    "6.9.2",
    "it changes the windows of streams that are active",
)
def _closed_widened(case: Case) -> bool:
    streams = case.watch.streams.values()
    return (
        bool(initial_windows(case))
        and case.ours.fatal is None
        and case.theirs.fatal == Code.FLOW_CONTROL_ERROR
        and any(seen.widened for seen in streams if seen.closed)
        and not any(seen.widened for seen in streams if not seen.closed)
    )


def initial_windows(case: Case) -> list[int]:
    """Return each INITIAL_WINDOW_SIZE of a SETTINGS frame."""
    if case.kind != frames.SETTINGS:
        return []
    given = declared_settings(case.payload)
    return [value for name, value in given if name == frames.INITIAL_WINDOW_SIZE]


@is_(
    "WINDOW_UPDATE of a stream by 0",
    "stream error",
    "connection error",
    "6.9",
    "the section asks for a stream error",
)
def _by_zero(case: Case) -> bool:
    return (
        case.kind == frames.WINDOW_UPDATE
        and case.stream != 0
        and case.increment == 0
        and case.our_error == case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "WINDOW_UPDATE of a closed stream by 0",
    "ignored",
    "connection error",
    "5.1",
    "a late frame, which may be ignored",
)
def _late_by_zero(case: Case) -> bool:
    return (
        case.kind == frames.WINDOW_UPDATE
        and case.stream != 0
        and case.increment == 0
        and case.is_closed
        and case.ours.fatal is None
        and not case.ours.told
        and case.theirs.fatal == Code.PROTOCOL_ERROR
    )


@is_(
    "reserved bit",
    "ignored",
    "part of the number",
    "6.8, 6.9",
    "it is ignored on receipt",
)
def _reserved(case: Case) -> bool:
    if not case.payload or not case.payload[0] & 0x80:
        return False
    if case.kind == frames.WINDOW_UPDATE:
        return case.theirs.fatal == Code.PROTOCOL_ERROR
    plain = [
        (item[0], item[1] & 0x7FFFFFFF, *item[2:]) if item[0] == "goaway" else item
        for item in case.theirs.told
    ]
    ours = [item for item in case.ours.told if item[0] != "lost"]
    return case.kind == frames.GOAWAY and plain == ours and case.ours.fatal is None


@is_(
    "window of a stream",
    "stream error",
    "connection error",
    "6.9.1",
    "either may be; the other streams did nothing",
)
def _window(case: Case) -> bool:
    return (
        case.kind == frames.DATA
        and case.seen is not None
        and case.length > case.seen.room
        and case.our_error == case.theirs.fatal == Code.FLOW_CONTROL_ERROR
    )


@is_(
    "reset of an idle stream",
    "connection error",
    "ignored",
    "6.4",
    "the section asks for a connection error",
)
def _reset_idle(case: Case) -> bool:
    return (
        case.kind == frames.RST_STREAM
        and case.ours.fatal == Code.PROTOCOL_ERROR
        and case.theirs.fatal is None
        and case.is_idle
    )


@is_(
    "GOAWAY ends later streams",
    "told to the owner",
    "the owner's to find out",
    "6.8",
    "they have not run and may be tried elsewhere",
    on=True,
)
def _lost(case: Case) -> bool:
    told = [item for item in case.ours.told if item[0] != "lost"]
    return (
        case.kind == frames.GOAWAY
        and case.watch.client
        and len(told) < len(case.ours.told)
        and told == case.theirs.told
    )


@is_(
    "GOAWAY with a higher stream",
    "connection error",
    "taken",
    "6.8",
    "it must not be increased",
)
def _higher(case: Case) -> bool:
    last = int.from_bytes(case.payload[:4], "big") & 0x7FFFFFFF
    return (
        case.kind == frames.GOAWAY
        and case.ours.fatal == Code.PROTOCOL_ERROR
        and case.theirs.fatal is None
        and last > case.watch.goaway
    )
