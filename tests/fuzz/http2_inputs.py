"""Bytes that an HTTP/2 client or server might send, and those that none should."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpack import Encoder

from tests.fuzz import http2_fields as lists
from ztserve.transport.http2 import Bounds, frames
from ztserve.transport.http2.fields import written as encode

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

BOUNDS = (
    Bounds(),
    Bounds(stream_window=1 << 16, connection_window=80_000, max_frame_bytes=1 << 14),
    Bounds(
        max_streams=2,
        max_header_bytes=600,
        max_continuations=2,
        max_frame_bytes=1 << 14,
        settings=3,
        pings=2,
        resets=2,
        idle_frames=4,
    ),
)
_WORDS = (0, 1, 2, 100, 1024, 65_535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_BLOCKS = (
    *(b"", b"\x80", b"\xff\x80\x80\x01", b"\xbf", b"\x3f\xe1\x1f", b"\x3f\xe2\x1f"),
    *(b"\x20", b"\x20" * 9, b"\x82\x20", b"\x7f", b"\xff" * 20, b"\x00\x85\xff"),
    *(b"\x00\x81\xff\x01a", b"\x00\x01a\x84\xff\xff\xff\xff", b"\x40\x01a\x7f\x81\x1f"),
    *(b"\xbe", b"\x00\x00\x00", b"\x0f", b"\x10\x01a\x01b", b"\x00\x81\x18\x01a"),
)
"""Blocks at the edges of RFC 7541: indices, table sizes, integers, Huffman codes."""


_HEAVY = (
    b"\x20" * 15_900,
    b"\x00\x01a\x00" * 4000,
    b"\x82" * 16_000,
    b"\x00\x01a\xff\x80\x7c" + b"\x1c" * 15_999,
    b"\x40\x01a\x01b" * 500,
    b"\x00\x01a\x7f" + b"\x80" * 9,
)
"""Blocks that cost much to read."""

_MANY = tuple(b"\0\4\0\0\xff\xff\0\4\0\1\0\0" * count for count in (20, 1365, 21_800))
"""Settings that each change the windows of all streams."""


@dataclass
class Frame:
    """One frame, which may be broken before it is written."""

    kind: int
    flags: int
    stream: int
    payload: bytes
    length: int | None = None
    """What its header says, where that is not the truth."""

    def wire(self) -> bytes:
        length = len(self.payload) if self.length is None else self.length
        head = frames.head(self.kind, self.flags, 0, length & 0xFFFFFF)
        return head[:5] + self.stream.to_bytes(4, "big") + self.payload


@dataclass
class Input:
    """What one end is given, and what it did before."""

    client: bool
    """Whether the end under test is a client's."""
    bounds: Bounds
    requests: list[tuple[lists.Listed, bool]]
    steps: list[bytes]
    """The bytes, cut after the preface and each frame."""
    seed: int
    """Of what is sent in between, and of the sizes of the pieces."""
    done: list[tuple[int, str, tuple[Any, Any]]] = field(default_factory=list)
    """What was sent in between: after which step, by which method, with what."""

    def __repr__(self) -> str:
        wire = [step.hex() for step in self.steps]
        return (
            f"client={self.client}, bounds={BOUNDS.index(self.bounds)}, "
            f"seed={self.seed}, requests={self.requests}, done={self.done}, wire={wire}"
        )


def cut(wire: bytes, *, preface: bool) -> list[bytes]:
    """Cut bytes after the preface and each frame; the last may not be whole."""
    at = len(frames.PREFACE) if preface else 0
    steps = [wire[:at]] if at else []
    while at < len(wire):
        end = at + 9 + int.from_bytes(wire[at : at + 3], "big")
        steps.append(wire[at:end])
        at = end
    return steps


class Inputs:
    """Makes conversations, and breaks most of them in one to three places."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self._encode: Callable[[lists.Listed], bytes] = encode
        self._alike = False
        """Whether the heads are alike, and blocks that are mean now this, now that."""
        self._bad = 0.0
        """How many of the header lists are broken."""

    def make(self) -> Input:
        """Return one input."""
        random = self.random
        client = random.random() < 0.25
        (bounds,) = random.choices(BOUNDS, (40, 30, 30))
        encoder = Encoder()
        self._encode = lambda fields: encoder.encode(
            fields, huffman=bounds is BOUNDS[1]
        )
        if random.random() < 0.3:
            self._encode = encode
        self._bad = random.choice((0.0, 0.0, 0.0, 0.3))
        streams = random.choice((1, 1, 2, 2, 3, 4))
        if random.random() < 0.02:
            streams = 12
        self._alike = random.random() < 0.05
        if self._alike:
            streams, self._encode = 7, encoder.encode
        requests: list[tuple[lists.Listed, bool]] = []
        if client:
            requests = [
                (random.choice(lists.REQUESTS[:2]), random.random() < 0.5)
                for _ in range(streams)
            ]
        made = [self._settings(first=True)]
        made += self._talk([1 + 2 * at for at in range(streams)], client=client)
        if random.random() < 0.85:
            for _ in range(random.choice((1, 1, 1, 2, 3))):
                self._break(made)
        wire = b"" if client else frames.PREFACE
        wire += b"".join(frame.wire() for frame in made)
        if random.random() < 0.15:
            wire = self._flip(wire)
        if random.random() < 0.1:
            wire = wire[: random.randrange(len(wire))]
        steps = cut(wire, preface=not client)
        return Input(client, bounds, requests, steps, random.getrandbits(64))

    # --- conversations ----------------------------------------------------------

    def _talk(self, ids: list[int], *, client: bool) -> list[Frame]:
        """Return what is said on the streams `ids`, one turn after another."""
        random = self.random
        ids = [stream + 2 * (random.random() < 0.05) for stream in ids]
        left = {stream: self._turns(client=client) for stream in ids}
        made: list[Frame] = []
        began = 0
        while left:
            stream = random.choice(list(left))
            if not client and stream > began:  # a client begins them in order
                stream = min(other for other in left if other > began)
                began = stream
            turn = left[stream].pop(0)
            if not left[stream]:
                del left[stream]
            made += self._turn(turn, stream, end=stream not in left)
            if random.random() < 0.25:
                made += self._aside(ids)
        return made

    def _turns(self, *, client: bool) -> list[str]:
        random = self.random
        turns = ["response" if client else "request"]
        if client and random.random() < 0.15:
            turns.insert(0, "interim")
        turns += ["data"] * random.choice((0, 0, 1, 1, 2, 3))
        if random.random() < 0.35:
            turns.append("trailers")
        return turns

    def _turn(self, turn: str, stream: int, *, end: bool) -> list[Frame]:
        random = self.random
        if random.random() < 0.04:
            end = not end
        ends = frames.END_STREAM if end else 0
        if turn == "data":
            sizes = (0, 1, 5, 5, 5, 40, 40, 40, 40, 40, 40, 5000, 16_384)
            return [
                self._padded(frames.DATA, ends, stream, bytes(random.choice(sizes)))
            ]
        if turn == "interim":
            fields: lists.Listed = ((b":status", random.choice((b"100", b"103"))),)
        else:
            fields = random.choice(
                {
                    "request": lists.REQUESTS,
                    "response": lists.RESPONSES,
                    "trailers": lists.TRAILERS,
                }[turn]
            )
        if self._alike and turn in ("request", "response"):
            fields = lists.STATIC[turn]
            fields += ((b"x-n", random.choice((b"1", b"2", b"3"))),)
        if random.random() < self._bad:
            fields = lists.broken(random, fields, turn)
        if random.random() < 0.02:
            fields += ((b"x-much", b"v" * random.choice((300, 700, 17_000))),)
        block = self._encode(fields)
        if random.random() < 0.002:
            block = random.choice(_HEAVY) + block
        return self._head(block, ends, stream)

    def _head(self, block: bytes, flags: int, stream: int) -> list[Frame]:
        random = self.random
        pieces = []
        while block and random.random() < (0.5 if len(block) > 600 else 0.12):
            at = random.randrange(len(block) + 1)
            pieces.append(block[:at])
            block = block[at:]
        pieces.append(block)
        first, *more = pieces
        if random.random() < 0.1:
            flags |= frames.PRIORITIZED
            first = random.choice((bytes(5), bytes((0x80, 0, 0, 3, 9)))) + first
        if not more:
            flags |= frames.END_HEADERS
        made = [self._padded(frames.HEADERS, flags, stream, first)]
        made += [Frame(frames.CONTINUATION, 0, stream, piece) for piece in more]
        made[-1].flags |= frames.END_HEADERS
        return made

    def _padded(self, kind: int, flags: int, stream: int, payload: bytes) -> Frame:
        if self.random.random() < 0.1:
            count = self.random.choice((0, 1, 20, 255))
            flags |= frames.PADDED
            payload = bytes((count,)) + payload + bytes(count)
        return Frame(kind, flags, stream, payload)

    def _settings(self, *, first: bool = False) -> Frame:
        random = self.random
        if not first and random.random() < 0.3:
            return Frame(frames.SETTINGS, frames.ACK, 0, b"")
        payload = b""
        if not first and random.random() < 0.005:
            return Frame(frames.SETTINGS, 0, 0, random.choice(_MANY))
        while random.random() < 0.5:
            name = random.choice((1, 2, 3, 4, 4, 5, 5, 6, 6, random.randrange(256)))
            value = random.choice((*_WORDS, 16_384, 16_384, 4096, 70_000))
            payload += name.to_bytes(2, "big") + value.to_bytes(4, "big")
            if random.random() < 0.7:
                break
        return Frame(frames.SETTINGS, 0, 0, payload)

    def _aside(self, ids: list[int]) -> list[Frame]:
        """Return a frame that belongs to no turn, now and then many of them."""
        random = self.random
        stream = random.choice((0, *ids, *ids, max(ids) + 2, 2))
        word = random.choice(_WORDS).to_bytes(4, "big")
        made: Frame
        way = random.randrange(11)
        if way == 0:
            made = Frame(frames.PING, random.choice((0, 0, 1)), 0, b"12345678")
        elif way in (1, 2):
            made = Frame(frames.WINDOW_UPDATE, 0, stream, word)
        elif way in (3, 4):
            made = Frame(frames.PRIORITY, 0, stream or 1, bytes(4) + b"\x10")
        elif way == 5:
            made = Frame(random.choice((11, 16, 200, 255)), 0, stream, b"x")
        elif way == 6:
            made = self._settings()
        elif way in (7, 8):
            made = Frame(frames.RST_STREAM, 0, stream or 1, word)
        elif way == 9:
            last = random.choice((0, 1, 3, (1 << 31) - 1, 1 << 31))
            payload = last.to_bytes(4, "big") + word + random.choice((b"", b"why"))
            made = Frame(frames.GOAWAY, 0, 0, payload)
        elif random.random() < 0.3:
            made = Frame(frames.HEADERS, 5, 2, self._encode(lists.REQUESTS[1]))
        elif random.random() < 0.4:  # more than the window of a stream
            return [Frame(frames.DATA, 0, stream or 1, bytes(16_384))] * 6
        else:
            block = self._encode(lists.REQUESTS[1])
            payload = (2).to_bytes(4, "big") + block
            made = Frame(frames.PUSH_PROMISE, frames.END_HEADERS, stream or 1, payload)
        return [made] * (random.randrange(2, 20) if random.random() < 0.04 else 1)

    # --- what breaks them -------------------------------------------------------

    def _break(self, made: list[Frame]) -> None:
        """Break frames in one place."""
        random = self.random
        at = random.randrange(len(made))
        chosen = made[at]
        made[at] = frame = Frame(**vars(chosen))
        way = random.randrange(13)
        if way == 0:
            frame.payload = self._flip(frame.payload)
        elif way == 1:
            real = len(frame.payload)
            wrong = (0, 1, real + 1, max(0, real - 1), 16_385, 262_145, (1 << 24) - 1)
            frame.length = random.choice(wrong)
        elif way in (2, 3):
            frame.flags ^= 1 << random.choice((0, 0, 2, 3, 5, random.randrange(8)))
        elif way == 4:
            others = (
                0,
                1,
                2,
                3,
                5,
                7,
                99,
                (1 << 31) - 1,
                1 << 31,
                frame.stream | 1 << 31,
            )
            frame.stream = random.choice(others)
        elif way == 5:
            del made[at]
            if not made:
                made.append(frame)
        elif way == 6:
            made.insert(random.randrange(len(made) + 1), frame)
        elif way == 7:
            other = random.randrange(len(made))
            made[at], made[other] = made[other], made[at]
        elif way == 8:
            ids = sorted({frame.stream for frame in made if frame.stream}) or [1]
            made[at:at] = self._aside(ids)
        elif way == 9:
            frame.payload = frame.payload[: random.randrange(len(frame.payload) + 1)]
        elif way == 10:
            more = random.choice((b"\x00", b"abcdef", bytes(300), b"\x20" * 600))
            frame.payload += more
        elif way == 11:
            frame.kind = random.randrange(11)
        else:
            self._break_block(made, at)

    def _break_block(self, made: list[Frame], at: int) -> None:
        random = self.random
        heads = [
            spot for spot, frame in enumerate(made) if frame.kind == frames.HEADERS
        ]
        if not heads:
            made.insert(at, Frame(frames.HEADERS, 5, 1, random.choice(_BLOCKS)))
            return
        spot = random.choice(heads)
        made[spot] = frame = Frame(**vars(made[spot]))
        if random.random() < 0.5:
            frame.payload = random.choice((b"", frame.payload)) + random.choice(_BLOCKS)
        else:
            frame.payload = self._flip(frame.payload)

    def _flip(self, octets: bytes) -> bytes:
        """Return `octets` with one to three bits turned."""
        if not octets:
            return octets
        turned = bytearray(octets)
        for _ in range(self.random.choice((1, 1, 2, 3))):
            turned[self.random.randrange(len(turned))] ^= 1 << self.random.randrange(8)
        return bytes(turned)
