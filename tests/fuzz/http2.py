"""Differential fuzz of the HTTP/2 state machine, the `h2` library being the other one.

    python -m tests.fuzz.http2 [--count N] [--seed N] [--json FILE] [--table FILE]

Conversations are made, most of them broken in one to three places, and given frame by
frame to an end of ours and to one of h2. Where these differ, the difference must be of
a class in `tests.fuzz.http2_classes`, each with the section by which ours is right. The
same bytes are then given to a new end of ours in pieces of any size, which must mean
and send the same, within 50 ms (of CPU: the machine may be shared) and the bounds. A
finding is printed with all its bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rich.progress import MofNCompleteColumn, Progress

from tests.fuzz import http2_framing, http2_messages, http2_streams
from tests.fuzz.http2_case import Case, Watch
from tests.fuzz.http2_classes import CLASSES, name_of, table
from tests.fuzz.http2_ends import Ours, Theirs, in_order
from tests.fuzz.http2_fields import why_malformed
from tests.fuzz.http2_inputs import Input, Inputs
from tests.fuzz.http2_turns import Turns
from ztserve.transport.http2 import Code, Connection, Ended, frames
from ztserve.transport.http2.bounds import HARD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.fuzz.http2_ends import Outcome
    from ztserve.transport.http2.events import Event

DIFFERENCES = (http2_framing, http2_streams, http2_messages)
"""The modules whose classes are known once they are imported."""
LIMIT_S = 0.05
MAX_FINDINGS = 20
MAX_TABLE_BYTES = 4096
"""The dynamic table that a peer may fill: we never announce a larger one."""


@dataclass
class Tally:
    """What a run has seen."""

    seed: int
    inputs: Counter[str] = field(default_factory=Counter)
    """By the role of the end under test."""
    steps: int = 0
    compared: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    """How our connections ended, by code."""
    classes: Counter[str] = field(default_factory=Counter)
    slowest_ms: float = 0.0
    slowest: str = ""
    findings: list[dict[str, str]] = field(default_factory=list)


class Fuzz:
    """Both ends, what they are given, and what must hold of what they make of it."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.inputs = Inputs(self.random)
        self.tally = Tally(seed)

    def step(self) -> None:
        """Make one input, give it to both ends, judge what they tell."""
        given = self.inputs.make()
        self.tally.inputs["client" if given.client else "server"] += 1
        self.judge(given)

    def judge(self, given: Input) -> None:
        """Give one input to both ends, then to ours alone in pieces."""
        try:
            ours = self._compared(given)
        except Exception as error:
            self._found(f"raised {error!r}", given)
            return
        self._in_pieces(given, ours)

    # --- both ends, frame by frame ----------------------------------------------

    def _compared(self, given: Input) -> Ours:
        ours, theirs = Ours(given), Theirs(given)
        watch = Watch(given.client, given.bounds, room=frames.DEFAULT_WINDOW)
        turns = Turns(given, ours.connection, watch)
        made = ours.flush()
        turns.begin()
        made += ours.flush()
        alike = self._send(theirs, made, set(), watch, given)
        for index, step in enumerate(given.steps):
            self.tally.steps += 1
            outcome, made = ours.take(step)
            if alike:
                self._resets(step, made, watch, given)
            if alike and (index or given.client):
                self.tally.compared += 1
                alike = self._alike(step, outcome, theirs, watch, given)
            elif alike:
                alike = self._preface(step, outcome, theirs, given)
            if ours.connection.over:
                break
            if alike and (index or given.client):
                watch.after(step, outcome)
            skip = {item[1] for item in outcome.told if item[0] == "error"}
            alike = alike and self._send(theirs, made, skip, watch, given)
            for item in outcome.told:
                if alike and item[0] == "lost":
                    theirs.forget(item[1])
            if turns.act(index):
                made = ours.flush()
                alike = alike and self._send(theirs, made, set(), watch, given)
        return ours

    def _resets(
        self,
        step: bytes,
        made: list[tuple[int, int, int, bytes]],
        watch: Watch,
        given: Input,
    ) -> None:
        """Look for resets of streams that nobody has begun (section 6.4)."""
        begins = step[3:4] in (b"\1", b"\x09")  # HEADERS, CONTINUATION
        for kind, _, stream, _ in made:
            if kind == frames.RST_STREAM and watch.is_idle(stream) and not begins:
                self._found(f"resets the idle stream {stream} at {step.hex()}", given)

    def _preface(
        self, step: bytes, ours: Outcome, theirs: Theirs, given: Input
    ) -> bool:
        if theirs.take(step).fatal != ours.fatal:
            self._found("the preface", given)
        return ours.fatal is None

    def _alike(
        self, step: bytes, ours: Outcome, theirs: Theirs, watch: Watch, given: Input
    ) -> bool:
        """Compare what a step meant; return whether the next one can be compared."""
        if len(step) >= 9:
            watch.count(step, ours)
        other = theirs.take(step)
        for item in ours.told:
            if item[0] in ("request", "response", "trailers"):
                self._well_formed(item, given)
        told = [_ordered(item) for item in ours.told]
        if (
            ours.fatal == other.fatal
            and told == other.told
            and ours.answered == other.answered
            and not other.resent
        ):
            return ours.fatal is None
        name = ""
        if len(step) >= 9:
            ours.told = told
            name = name_of(Case(step, watch, ours, other, theirs.error))
        if not name:
            self._found(f"at {step.hex()}\n  ours: {ours}\n  h2: {other}", given)
            return False
        self.tally.classes[name] += 1
        return CLASSES[name].goes_on and ours.fatal is None and other.fatal is None

    def _well_formed(self, item: tuple[Any, ...], given: Input) -> None:
        """Ask the third opinion about what ours took, whatever h2 makes of it."""
        why = why_malformed(item[2], item[0])
        if why:
            self._found(f"ours took {item}: {sorted(why)}", given)

    def _send(
        self,
        theirs: Theirs,
        made: list[tuple[int, int, int, bytes]],
        skip: set[int],
        watch: Watch,
        given: Input,
    ) -> bool:
        """Have h2 send what ours sent; return whether it may be sent."""
        watch.sent(made)
        try:
            theirs.send(made, skip)
        except Exception as error:
            self._found(f"ours sent what h2 may not: {error!r}, {made}", given)
            return False
        return True

    # --- ours alone, in pieces --------------------------------------------------

    def _in_pieces(self, given: Input, ours: Ours) -> None:
        took, events, sent, broken = self._timed(given)
        if took * 1e3 > self.tally.slowest_ms:
            # Once more: a collection of garbage may have been due.
            took = min(took, self._timed(given)[0])
        if took > LIMIT_S:
            self._found(f"took {took * 1e3:.0f} ms", given)
        if took * 1e3 > self.tally.slowest_ms:
            self.tally.slowest_ms = round(took * 1e3, 2)
            self.tally.slowest = repr(given)[:2000]
        if broken:
            self._found(broken, given)
        elif events != ours.events or sent != ours.sent:
            self._found(f"in pieces: {events}, not {ours.events}", given)
        last = ours.events[-1] if ours.events else None
        code = Code(last.code).name if isinstance(last, Ended) else "not"
        self.tally.ended[code] += 1

    def _timed(self, given: Input) -> tuple[float, list[Event], bytes, str]:
        """Return the CPU time, what was told and sent, and what does not hold."""
        random, wire = Random(given.seed), b"".join(given.steps)
        most = random.choice((1, 7, 40, 1000, 1 << 20)) if len(wire) < 2000 else 1 << 20
        ends = [0]
        for step in given.steps:
            ends.append(ends[-1] + len(step))
        plan = [(ends[index + 1], name, with_) for index, name, with_ in given.done]
        events: list[Event] = []
        at, sent, broken = 0, b"", ""
        begun = time.thread_time()
        try:
            connection = Connection(client=given.client, bounds=given.bounds)
            for until, name, with_ in (*plan, (len(wire), "", ())):
                while at < until:
                    piece = wire[at : min(until, at + random.randint(1, most))]
                    at += len(piece)
                    events += connection.receive(piece)
                    broken = broken or unbounded(connection, given)
                if name:
                    getattr(connection, name)(*with_[0], **with_[1])
            sent = connection.outgoing()
        except Exception as error:
            broken = f"raised {error!r}"
        return time.thread_time() - begun, events, sent, broken

    def _found(self, why: str, given: Input) -> None:
        self.tally.findings.append({"why": why, "input": repr(given)})


def unbounded(connection: Connection, given: Input) -> str:
    """Return what a connection holds beyond its bounds."""
    if connection.over:
        return ""
    bounds, intake = given.bounds, connection._intake
    streams, reader = connection._streams, connection._reader
    held = {
        "buffer": (len(intake._rest), bounds.max_frame_bytes + frames.HEADER_BYTES),
        "block": (
            len(intake._block[2]) if intake._block else 0,
            HARD * bounds.max_header_bytes,
        ),
        "dropped": (len(streams._dropped), 1024),
        "known": (reader._heads.size + reader._trailers.size, 128 * 1024),
        "table": (reader._table._current_size, MAX_TABLE_BYTES),
    }
    if not given.client:
        held["streams"] = (len(streams), bounds.max_streams)
    over = [f"{name}: {size}" for name, (size, most) in held.items() if size > most]
    return f"holds {', '.join(over)}" if over else ""


def _ordered(item: tuple[Any, ...]) -> tuple[Any, ...]:
    if item[0] in ("request", "response", "trailers"):
        return (item[0], item[1], in_order(item[2]), item[3])
    return item


def run(
    count: int,
    seed: int,
    progress: Progress | None = None,
    *,
    findings: int = MAX_FINDINGS,
) -> Tally:
    """Try `count` inputs, or until `findings`; the same `seed` makes the same ones."""
    fuzz = Fuzz(seed)
    task = progress.add_task("inputs", total=count) if progress else None
    for number in range(1, count + 1):
        fuzz.step()
        if progress and task is not None and (number % 500 == 0 or number == count):
            progress.update(
                task,
                completed=number,
                description=f"inputs, {len(fuzz.tally.findings)} findings",
            )
        if len(fuzz.tally.findings) >= findings:
            break
    return fuzz.tally


def main(given: Sequence[str] | None = None) -> int:
    """Run the fuzz; return 1 where it found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.http2")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the tally there")
    parser.add_argument("--table", metavar="FILE", help="write the differences there")
    arguments = parser.parse_args(given)
    begun = time.monotonic()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns) as progress:
        tally = run(arguments.count, arguments.seed, progress)
    total, took = sum(tally.inputs.values()), time.monotonic() - begun
    print(f"{total:,} inputs in {took:.0f} s, {total / took:,.0f}/s, seed {tally.seed}")
    print(f"  roles: {dict(tally.inputs)}")
    print(f"  {tally.steps:,} frames, {tally.compared:,} of them compared with h2")
    print(f"  ended: {dict(tally.ended.most_common())}")
    print(f"  slowest {tally.slowest_ms} ms: {tally.slowest}")
    for name, number in tally.classes.most_common():
        print(f"    {number:,} {name}")
    for finding in tally.findings:
        print(f"FOUND {finding['why']}\n  {finding['input']}")
    if arguments.json:
        figures = vars(tally) | {"total": total, "seconds": took}
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.table:
        Path(arguments.table).write_text(table(tally.classes, total))
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
