"""What became of the calls of one run: answered, cut by design, or failed.

Pure: records in, figures out. All times are those of `time.monotonic`, which the
processes of one machine share.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SETTLED_S = 1.0
"""The restart window ends so long after the first answer of the new server."""
WINDOW_S = 10.0
"""From when the new server is there; no restart excuses more than that."""
LANE_S = 2.0
"""A call may begin with the SVID before, for so long after a renewal."""
CUT_S = 3.0
"""From an SVID's expiry, or a root's withdrawal, to the end of what rests on it."""
CLOCK_S = 0.1
"""By how much the wall's clock, which expiry follows, and ours may differ."""

Outcome = Literal["answered", "failed", "restart", "expired", "distrusted"]
"""restart: failed in the restart window. expired: a stream that outlived the SVID it
began with, or the one that its server had shown, ended by the other side. distrusted: a
stream that the client broke off when a root was withdrawn, because what that root
vouched for may not go on."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
KINDS = ("unary", "stream")


class Call(NamedTuple):
    """One call that has ended."""

    kind: str
    """unary or stream"""
    begin: float
    end: float
    error: str
    """Empty if it was answered, and rightly."""


class Seen(NamedTuple):
    """What a process was, from this moment on."""

    at: float
    serial: str
    expires: float
    authorities: Sequence[str]
    """Of its own trust domain, as digests."""


@dataclass(frozen=True)
class Restart:
    """When the first server was told to end, had ended, and the next was there."""

    ordered: float
    gone: float
    back: float


@dataclass(frozen=True)
class Run:
    """All that was recorded of one run."""

    began: float
    ended: float
    calls: Sequence[Call]
    callers: Sequence[Seen]
    servers: Sequence[Sequence[Seen]]
    """Of each server process in turn."""
    restart: Restart | None = None

    def window(self) -> tuple[float, float]:
        """Return when calls may fail because the server was away."""
        if self.restart is None:
            return self.ended, self.ended
        restart = self.restart
        answered = (
            call.end
            for call in self.calls
            if call.begin >= restart.gone and not call.error
        )
        first = min(answered, default=self.ended)
        return restart.ordered, min(first + SETTLED_S, restart.back + WINDOW_S)

    def rotations(self) -> dict[str, list[float]]:
        """Return when each side had a new SVID; a process's first one is none."""
        return {
            "callers": list(_renewals(self.callers)),
            "server": [at for seen in self.servers for at in _renewals(seen)],
        }

    def rollovers(self) -> dict[str, list[float]]:
        """Return when each side saw an authority withdrawn, another being there."""
        # A root may be withdrawn while no server runs, so its processes are as one.
        server = [one for seen in self.servers for one in seen]
        return {
            "callers": list(_withdrawals(self.callers)),
            "server": list(_withdrawals(server)),
        }

    def outcomes(self) -> list[tuple[Call, Outcome]]:
        """Return each call with what became of it."""
        window = self.window()
        withdrawn = self.rollovers()["callers"]
        return [(call, self._outcome(call, window, withdrawn)) for call in self.calls]

    def latencies_ms(self) -> list[float]:
        """Return how long unary calls took, in order, those of the restart left out."""
        begin, end = self.window()
        return sorted(
            (call.end - call.begin) * 1e3
            for call in self.calls
            if call.kind == "unary"
            and not call.error
            and call.begin >= self.began
            and (call.end < begin or call.begin > end)
        )

    def _outcome(
        self, call: Call, window: tuple[float, float], withdrawn: Iterable[float]
    ) -> Outcome:
        if not call.error:
            return "answered"
        if window[0] <= call.end < window[1]:
            return "restart"
        if call.kind == "stream":
            expiries = [self._expiry(call.begin), *self._shown(call.begin)]
            if any(-CLOCK_S <= call.end - expiry <= CUT_S for expiry in expiries):
                return "expired"
            if any(call.begin <= at <= call.end <= at + CUT_S for at in withdrawn):
                return "distrusted"
        return "failed"

    def _expiry(self, begin: float) -> float:
        """Return when the SVID expires with which a call began at `begin`."""
        held = [one for one in self.callers if one.at <= begin]
        if len(held) > 1 and held[-1].at > begin - LANE_S:
            held.pop()  # its connection may not have been there yet
        return held[-1].expires if held else float("inf")

    def _shown(self, begin: float) -> Iterator[float]:
        """Yield when the server's SVIDs expire that a connection then may rest on."""
        for seen in self.servers:
            for one in seen:
                if one.at <= begin < one.expires:
                    yield one.expires


def counts(outcomes: Iterable[tuple[Call, Outcome]]) -> Counter[tuple[str, Outcome]]:
    """Return how many calls of each kind came to what."""
    return Counter((call.kind, outcome) for call, outcome in outcomes)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of them lie; 0 for none."""
    return ordered[int(len(ordered) * share)] if ordered else 0.0


def happened(run: Run) -> dict[str, list[float]]:
    """Return when what happened: each outcome of a call, rotations and rollovers."""
    found: dict[str, list[float]] = {name: [] for name in OUTCOMES}
    for call, outcome in run.outcomes():
        found[outcome].append(call.end)
    for what, sides in (
        ("rotations", run.rotations()),
        ("rollovers", run.rollovers()),
    ):
        found.update({f"{what}, {side}": times for side, times in sides.items()})
    return found


def placed(run: Run, times: Iterable[float], places: int) -> list[int]:
    """Return how many of `times` fall into each of so many equal parts of the run."""
    place_s = (run.ended - run.began) / places
    found = Counter(math.floor((at - run.began) / place_s) for at in times)
    return [found[place] for place in range(places)]


def failures(run: Run) -> list[str]:
    """Return a sentence for each kind of call that failed."""
    each = counts(run.outcomes())
    return [
        f"{failed} {kind} calls failed outside the restart window"
        for kind in KINDS
        if (failed := each[kind, "failed"])
    ]


def shortcomings(run: Run, *, rotations: int, rollovers: int) -> list[str]:
    """Return what a run with rotation lacks; nothing if it is as it should be."""
    found = failures(run)
    each = counts(run.outcomes())
    found += [
        f"no {kind} call was answered" for kind in KINDS if not each[kind, "answered"]
    ]
    for what, least, sides in (
        ("rotations", rotations, run.rotations()),
        ("rollovers", rollovers, run.rollovers()),
    ):
        found += [
            f"{len(times)} {what} seen by the {side}, expected {least}"
            for side, times in sides.items()
            if len(times) < least
        ]
    return found


def _renewals(seen: Sequence[Seen]) -> Iterator[float]:
    for before, after in pairwise(seen):
        if after.serial != before.serial:
            yield after.at


def _withdrawals(seen: Sequence[Seen]) -> Iterator[float]:
    for before, after in pairwise(seen):
        if after.authorities and set(before.authorities) - set(after.authorities):
            yield after.at
