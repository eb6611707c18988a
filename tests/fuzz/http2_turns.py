"""What an end of ours says in between, as its owner would."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from tests.fuzz import http2_fields as lists
from ztserve.transport.http2 import Code, Connection
from ztserve.transport.http2.fields import written as encode

if TYPE_CHECKING:
    from tests.fuzz.http2_case import Watch
    from tests.fuzz.http2_inputs import Input

_ANSWERS = [encode(fields) for fields in lists.RESPONSES]
_TRAILERS = [encode(fields) for fields in lists.TRAILERS[:2]]
_BODIES = (b"", b"x", bytes(50), bytes(50), bytes(20_000), bytes(70_000))
_OFTEN = 0.3


class Turns:
    """Speaks on the streams that are open, and notes what it said."""

    def __init__(self, given: Input, connection: Connection, watch: Watch) -> None:
        self._given, self._connection, self._watch = given, connection, watch
        self._random = Random(given.seed + 1)
        self._said: dict[int, str] = {}
        """What was last said on a stream: "head", or "end"."""
        self._consumed: dict[int, int] = {}

    def begin(self) -> None:
        """Send the requests."""
        for fields, end in self._given.requests:
            self._do(-1, "request", encode(fields), end=end)
            stream = self._watch.highest + (2 if self._watch.highest else 1)
            self._watch.begin(stream)
            self._said[stream] = "end" if end else "head"

    def act(self, index: int) -> bool:
        """Say something after step `index`, or not; return whether."""
        random, streams = self._random, self._watch.streams
        if not streams or random.random() > _OFTEN:
            return False
        stream = random.choice(list(streams))
        if not self._given.client and random.random() < 0.01:
            final = random.random() < 0.5
            self._watch.drained = self._watch.drained or final
            self._do(index, "drain", final=final)
            return True
        owed = streams[stream].received - self._consumed.get(stream, 0)
        way = random.random()
        if owed > 0 and way < 0.4:
            part = random.choice((owed, random.randint(1, owed)))
            self._consumed[stream] = owed - part
            self._do(index, "consumed", stream, part)
        elif way > 0.94:
            self._said[stream] = "end"
            code = random.choice((Code.CANCEL, Code.INTERNAL_ERROR))
            self._do(index, "reset", stream, code)
        elif self._said.get(stream) == "end":
            return False
        elif stream not in self._said:
            end = random.random() < 0.2
            self._said[stream] = "end" if end else "head"
            self._do(index, "headers", stream, random.choice(_ANSWERS), end=end)
        elif way < 0.8:
            end = random.random() < 0.3
            self._said[stream] = "end" if end else "head"
            self._do(index, "data", stream, random.choice(_BODIES), end=end)
        else:
            self._said[stream] = "end"
            self._do(index, "headers", stream, random.choice(_TRAILERS), end=True)
        return True

    def _do(self, index: int, name: str, *values: Any, **named: Any) -> None:
        self._given.done.append((index, name, (values, named)))
        getattr(self._connection, name)(*values, **named)
