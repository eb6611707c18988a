"""One step, what each end made of it, and what had been seen before it.

What is kept here comes from the bytes and from what both ends agreed on, not from the
insides of either.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hpack import Decoder
from hpack.exceptions import HPACKError, OversizedHeaderListError
from hyperframe.exceptions import InvalidPaddingError

from tests.fuzz.http2_fields import Listed, why_malformed
from ztserve.transport.http2 import frames

if TYPE_CHECKING:
    from tests.fuzz.http2_ends import Outcome
    from ztserve.transport.http2 import Bounds


@dataclass
class Seen:
    """What is known of a stream that has begun."""

    has_head: bool = False
    ended: bool = False
    """Whether the peer has sent its last."""
    declared: int | None = None
    """The body's bytes by its content-length."""
    bodiless: bool = False
    """Whether it declared a body that a response of its status does not have."""
    received: int = 0
    room: int = 0
    """Bytes that the peer may still send."""
    widened: int = 0
    """By how much the peer let us send more on it."""
    reset: str = ""
    """Which end gave it up: "us", "peer"."""
    answered: bool = False
    """Whether the end under test has sent its last."""

    @property
    def closed(self) -> bool:
        return bool(self.reset) or (self.ended and self.answered)


@dataclass
class Watch:
    """What has been seen on a connection."""

    client: bool
    bounds: Bounds
    streams: dict[int, Seen] = field(default_factory=dict)
    highest: int = 0
    """The highest stream that was begun."""
    counts: Counter[str] = field(default_factory=Counter)
    blocks: list[bytes] = field(default_factory=list)
    block: tuple[int, int, bytes] | None = None
    """Flags, stream and what there is of a block that is not complete."""
    pieces: int = 0
    """CONTINUATION frames of it."""
    room: int = 0
    """Bytes that the peer may still send on all streams."""
    goaway: int = frames.MOST_STREAM_ID
    drained: bool = False
    """Whether the end under test went away for good."""
    depends: int = -1
    """On which stream the one of that block depends."""

    def begin(self, stream: int) -> Seen:
        seen = self.streams[stream] = Seen(room=self.bounds.stream_window)
        self.highest = max(self.highest, stream)
        return seen

    def count(self, step: bytes, ours: Outcome) -> None:
        """Count a frame, for the bounds of floods."""
        kind, flags, payload = step[3], step[4], step[9:]
        counts = self.counts
        counts["frames"] += 1
        counts["settings"] += kind == frames.SETTINGS
        counts["pings"] += kind == frames.PING
        counts["resets"] += kind == frames.RST_STREAM or bool(ours.errors())
        seen = self.streams.get(int.from_bytes(step[5:9], "big") & 0x7FFFFFFF)
        late = seen is not None and bool(seen.reset)
        counts["idle"] += (
            kind in (frames.PRIORITY, frames.GOAWAY)
            or kind > frames.CONTINUATION
            or (kind == frames.WINDOW_UPDATE and payload[:2] in (b"\0\0", b"\x80\0"))
            or (kind == frames.DATA and not flags & frames.END_STREAM)
            or (kind in (frames.DATA, frames.HEADERS, frames.CONTINUATION) and late)
            or (kind == frames.RST_STREAM and (seen is None or seen.closed))
            or (self.client and kind in (frames.HEADERS, frames.CONTINUATION))
        )
        self.pieces = self.pieces + 1 if kind == frames.CONTINUATION else 0

    def after(self, step: bytes, ours: Outcome) -> None:
        """Note what a step changed, on which both ends agree."""
        if len(step) < 9:
            return
        kind, flags = step[3], step[4]
        stream = int.from_bytes(step[5:9], "big") & 0x7FFFFFFF
        if kind == frames.DATA:
            self.room -= len(step) - 9
            if stream in self.streams:
                self.streams[stream].room -= len(step) - 9
        elif kind == frames.WINDOW_UPDATE and stream in self.streams:
            self.streams[stream].widened += int.from_bytes(step[9:13], "big")
        elif kind in (frames.HEADERS, frames.CONTINUATION):
            self._block_after(kind, flags, stream, step[9:])
        for item in ours.told:
            self._told(item)

    def _block_after(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.HEADERS:
            self.block = (flags, stream, stripped(flags, payload))
            at = 1 if flags & frames.PADDED else 0
            depends = int.from_bytes(payload[at : at + 4], "big") & 0x7FFFFFFF
            self.depends = depends if flags & frames.PRIORITIZED else -1
        elif self.block is not None:
            self.block = (*self.block[:2], self.block[2] + payload)
        if flags & frames.END_HEADERS and self.block is not None:
            self.blocks.append(self.block[2])
            self.block = None
            if stream % 2 and not self.client:
                self.highest = max(self.highest, stream)

    def _told(self, item: tuple[Any, ...]) -> None:
        what, stream = item[0], item[1]
        if what in ("request", "response"):
            seen = self.streams.get(stream) or self.begin(stream)
            seen.has_head, seen.ended = True, item[3]
            seen.declared = declared_length(item[2])
            bodiless = {(b":status", b"204"), (b":status", b"304")} & set(item[2])
            if bodiless and seen.declared is not None:
                seen.declared, seen.bodiless = 0, True
        elif what == "trailers":
            self.streams[stream].ended = True
        elif what == "data":
            self.streams[stream].received += len(item[2])
            self.streams[stream].ended = item[3]
        elif what in ("reset", "error", "lost"):
            seen = self.streams.get(stream) or self.begin(stream)
            seen.reset = "peer" if what == "reset" else "us"
        elif what == "goaway":
            self.goaway = stream

    def sent(self, made: list[tuple[int, int, int, bytes]]) -> None:
        """Note what the end under test sent."""
        for kind, flags, stream, payload in made:
            seen = self.streams.get(stream)
            if kind == frames.WINDOW_UPDATE and stream == 0:
                self.room += int.from_bytes(payload, "big")
            elif seen is None:
                continue
            elif kind == frames.WINDOW_UPDATE:
                seen.room += int.from_bytes(payload, "big")
            elif kind == frames.RST_STREAM:
                seen.reset = seen.reset or "us"
            elif kind in (frames.DATA, frames.HEADERS) and flags & frames.END_STREAM:
                seen.answered = True

    def is_idle(self, stream: int) -> bool:
        """Return whether nobody has begun a stream."""
        return stream % 2 == 0 or stream > self.highest

    def open(self) -> int:
        """Return how many streams are open."""
        return sum(not seen.closed for seen in self.streams.values())


@dataclass
class Case:
    """A step on which the ends may differ."""

    step: bytes
    watch: Watch
    ours: Outcome
    theirs: Outcome
    error: BaseException | None
    """What h2 raised."""

    def __post_init__(self) -> None:
        step = self.step
        self.length = int.from_bytes(step[:3], "big")
        self.kind, self.flags = step[3], step[4]
        self.stream = int.from_bytes(step[5:9], "big") & 0x7FFFFFFF
        self.payload = step[9:]
        self.seen = self.watch.streams.get(self.stream)

    @property
    def whole(self) -> bool:
        return len(self.payload) == self.length

    @property
    def our_error(self) -> int | None:
        """The code by which we end the stream of this frame."""
        return dict(self.ours.errors()).get(self.stream)

    @property
    def both_fatal(self) -> bool:
        return self.ours.fatal is not None and self.theirs.fatal is not None

    @property
    def only_ours(self) -> bool:
        """Whether we refuse what h2 takes."""
        return self.theirs.fatal is None and not self.theirs.errors()

    # --- what the frame says of itself ------------------------------------------

    @property
    def misplaced(self) -> bool:
        """Whether it is on a stream and should not be, or the other way round."""
        if self.kind in (frames.SETTINGS, frames.PING, frames.GOAWAY):
            return self.stream != 0
        known = self.kind <= frames.CONTINUATION and self.kind != frames.WINDOW_UPDATE
        return known and self.stream == 0

    @property
    def missized(self) -> bool:
        """Whether its size is none that its kind has."""
        sizes = {frames.RST_STREAM: 4, frames.PING: 8, frames.WINDOW_UPDATE: 4}
        if self.kind == frames.GOAWAY:
            return self.length < 8
        return self.length != sizes.get(self.kind, self.length)

    @property
    def increment(self) -> int:
        return int.from_bytes(self.payload[:4], "big") & 0x7FFFFFFF

    def depends_on(self) -> int:
        """Return the stream in its priority fields, -1 where it has none."""
        rest = self.payload
        if self.kind == frames.HEADERS and self.flags & frames.PADDED:
            rest = rest[1:]
        if self.kind == frames.CONTINUATION:
            return self.watch.depends
        if self.kind != frames.PRIORITY and not (
            self.kind == frames.HEADERS and self.flags & frames.PRIORITIZED
        ):
            return -1
        return int.from_bytes(rest[:4], "big") & 0x7FFFFFFF

    @property
    def is_idle(self) -> bool:
        """Whether nobody has begun its stream."""
        return self.watch.is_idle(self.stream)

    @property
    def is_closed(self) -> bool:
        """Whether its stream has ended, or was passed over."""
        if self.seen is not None:
            return self.seen.closed
        return not self.is_idle

    @property
    def padding_refused(self) -> bool:
        """Whether h2 refused the padding, by its own rule."""
        return isinstance(getattr(self.error, "__cause__", None), InvalidPaddingError)

    # --- header blocks ----------------------------------------------------------

    @cached_property
    def head(self) -> tuple[int, bytes] | None:
        """Flags and bytes of the header block that this frame completes."""
        if self.kind not in (frames.HEADERS, frames.CONTINUATION):
            return None
        if not self.whole or not self.flags & frames.END_HEADERS:
            return None
        if self.kind == frames.HEADERS:
            return self.flags, stripped(self.flags, self.payload)
        if self.watch.block is None or self.watch.block[1] != self.stream:
            return None
        return self.watch.block[0], self.watch.block[2] + self.payload

    @cached_property
    def _read(self) -> tuple[Listed | None, bool]:
        """The fields of that block, and whether they are too many to be read."""
        if self.head is None:
            return None, False
        decoder = Decoder(max_header_list_size=1 << 24)
        try:
            for block in self.watch.blocks:
                decoder.decode(block, raw=True)
            decoder.max_header_list_size = self.watch.bounds.max_header_bytes
            fields = decoder.decode(self.head[1], raw=True)
        except OversizedHeaderListError:
            return None, True
        except (HPACKError, IndexError, ValueError):
            return None, False
        return tuple((bytes(name), bytes(value)) for name, value in fields), False

    @property
    def listed(self) -> Listed | None:
        """The fields of that block; None: there is none, or it cannot be read."""
        return self._read[0]

    @property
    def list_is_large(self) -> bool:
        """Whether the fields, with 32 bytes for each, are beyond the bound (6.5.2)."""
        return self._read[1]

    @property
    def is_unreadable(self) -> bool:
        """Whether there is a block that breaks RFC 7541."""
        return self.head is not None and self._read == (None, False)

    @property
    def interim(self) -> bool:
        """Whether the block is a head with a status of 1xx."""
        listed = self.listed or ()
        return any(name == b":status" and value[:1] == b"1" for name, value in listed)

    @property
    def list_kind(self) -> str:
        if self.seen is None:
            return "request"
        if self.seen.has_head:
            return "trailers"
        return "response"

    @cached_property
    def malformed(self) -> frozenset[str]:
        """The rules of section 8 that this frame breaks."""
        if self.kind == frames.DATA:
            return self._by_length(self.payload_of_data(), self.flags)
        if self.listed is None or self.head is None:
            return frozenset()
        flags, kind = self.head[0], self.list_kind
        why = set(why_malformed(self.listed, kind))
        ends = bool(flags & frames.END_STREAM)
        status = dict(self.listed).get(b":status", b"")
        if kind == "trailers" and not ends:
            why.add("section 8")
        interim = kind == "response" and status[:1] == b"1"
        if interim and ends:
            why.add("section 8")
        if not why and ends and not interim:
            declared = self.seen.declared if self.seen else None
            received = self.seen.received if self.seen else 0
            if kind != "trailers":
                declared = declared_length(self.listed)
                if status in (b"204", b"304"):  # which have no content (RFC 9110)
                    declared = received
            if declared is not None and declared != received:
                why.add("a body shorter than its content-length, ended by HEADERS")
        return frozenset(why)

    def _by_length(self, size: int, flags: int) -> frozenset[str]:
        seen = self.seen
        if seen is None or seen.declared is None:
            return frozenset()
        total = seen.received + size
        short = flags & frames.END_STREAM and total < seen.declared
        if seen.bodiless and total > 0:
            return frozenset(("content in a 204 or 304",))
        return frozenset(("section 8",) if short or total > seen.declared else ())

    def payload_of_data(self) -> int:
        """Return the bytes of a body in a DATA frame."""
        size = len(self.payload)
        if self.flags & frames.PADDED and size and self.payload[0] < size:
            return size - 1 - self.payload[0]
        return size


def stripped(flags: int, payload: bytes) -> bytes:
    """Return a HEADERS payload without padding and priority."""
    if flags & frames.PADDED and payload:
        payload = payload[1 : max(1, len(payload) - payload[0])]
    return payload[5:] if flags & frames.PRIORITIZED else payload


def declared_length(listed: Listed) -> int | None:
    """Return the content-length that well-formed fields declare."""
    lengths = [value for name, value in listed if name == b"content-length"]
    return int(lengths[0]) if lengths and lengths[0].isdigit() else None


def declared_settings(payload: bytes) -> list[tuple[int, int]]:
    """Return the settings of a SETTINGS frame, in order."""
    return [
        (
            int.from_bytes(payload[at : at + 2], "big"),
            int.from_bytes(payload[at + 2 : at + 6], "big"),
        )
        for at in range(0, len(payload) - 5, 6)
    ]


def allowed_setting(name: int, value: int, client: bool) -> bool:
    """Return whether a peer may tell a client, or a server, of a setting (6.5.2)."""
    if name == frames.ENABLE_PUSH:
        return value <= (0 if client else 1)
    if name == frames.INITIAL_WINDOW_SIZE:
        return value <= frames.MOST_WINDOW
    if name == frames.MAX_FRAME_SIZE:
        return frames.LEAST_FRAME_BYTES <= value <= frames.MOST_FRAME_BYTES
    return True
