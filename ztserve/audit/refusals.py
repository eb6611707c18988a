"""Refusals beyond what is worth a line each: counted, in bounded memory.

A caller that is refused in a loop would otherwise fill the disk, and with it stop the
service for all others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from time import monotonic

from ztserve.audit.lines import clock, refusals

LINES_PER_MINUTE = 20
"""So many refusals of one kind and principal get a line each; then they count."""
MAX_KEYS = 128
OTHERS = "(other principals)"


@dataclass(slots=True)
class _Tally:
    window: float
    lines: int = 0
    pending: int = 0
    since: str = ""


class Refusals:
    """Counts refusals by principal and class of error."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._tallies: dict[tuple[str, str], _Tally] = {}

    def is_line(self, principal: str, error: str) -> bool:
        """Say whether a refusal gets its own line; if not, it has been counted."""
        with self._lock:
            tally = self._tally(principal, error)
            now = monotonic()
            if now - tally.window >= 60:
                tally.window, tally.lines = now, 0
            if tally.lines < LINES_PER_MINUTE:
                tally.lines += 1
                return True
            self._count(tally, 1)
            return False

    def count(self, principal: str, error: str) -> None:
        """Count one that could not be written."""
        with self._lock:
            self._count(self._tally(principal, error), 1)

    def flush(self, append: Callable[[str], None]) -> None:
        """Write what was counted, a line for each principal and error.

        Raises AuditError where a line cannot be written; its count is kept.
        """
        with self._lock:
            due = [
                (key, tally) for key, tally in self._tallies.items() if tally.pending
            ]
        for (principal, error), tally in due:
            count = tally.pending
            append(refusals(principal, error, count, tally.since))
            with self._lock:
                tally.pending -= count
                tally.since = clock()

    def _count(self, tally: _Tally, count: int) -> None:
        if not tally.pending:
            tally.since = clock()
        tally.pending += count

    def _tally(self, principal: str, error: str) -> _Tally:
        tally = self._tallies.get((principal, error))
        if tally is None:
            if len(self._tallies) >= MAX_KEYS:
                self._forget_idle()
            if len(self._tallies) >= MAX_KEYS and principal != OTHERS:
                return self._tally(OTHERS, error)
            tally = self._tallies[principal, error] = _Tally(monotonic())
        return tally

    def _forget_idle(self) -> None:
        now = monotonic()
        self._tallies = {
            key: tally
            for key, tally in self._tallies.items()
            if tally.pending or now - tally.window < 60
        }
