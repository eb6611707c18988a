"""What the agent did and refused, for an audit log: floods are counted."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ztserve.errors import ZTServeError
from ztserve.identity.agent.attestation import FalseClaim, Process
from ztserve.identity.subscribers import OnEvent

_LOG = logging.getLogger(__name__)

WINDOW_S = 60.0
EACH = 20
"""Events of one kind and process that are written in a window; then they count."""
MOST = 600
"""Events of one kind that are written in a window, of whatever process."""


@dataclass
class _Window:
    ends: float
    written: int = 0
    by_pid: Counter[int] = field(default_factory=Counter)
    dropped: int = 0


class Events:
    """Writes events through `write`, in bounded number and memory. Thread-safe.

    What is over the bounds is counted; the count is written, as `events-dropped` with
    its kind, when the window of a minute ends (at the next event of that kind, or at
    `close`). Kinds must be few.
    """

    def __init__(
        self, write: OnEvent, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._windows: dict[str, _Window] = {}
        self._lock = threading.Lock()

    def tell(self, kind: str, process: Process | None, /, **fields: object) -> None:
        """Write one event, or count it. Raises what `write` raises."""
        pid = process.pid if process else 0
        with self._lock:
            ended = self._turn(kind)
            window = self._windows[kind]
            allowed = window.written < MOST and window.by_pid[pid] < EACH
            if allowed:
                window.written += 1
                window.by_pid[pid] += 1  # at most MOST keys
            else:
                window.dropped += 1
        if ended:
            self._write("events-dropped", {"kind": kind, "count": ended})
        if allowed:
            caller = {"pid": pid, "uid": process.uid} if process else {}
            self._write(kind, {**caller, **fields})

    def refused(self, process: Process | None, what: str, error: Exception) -> None:
        """Write that `what` was refused; a `FalseClaim` is an alert.

        Raises nothing: a refusal stands, also where it cannot be written.
        """
        false = isinstance(error, FalseClaim)
        kind = "identity-alert" if false else "identity-refused"
        self.note(kind, process, what=what, reason=str(error))

    def note(self, kind: str, process: Process | None, /, **fields: object) -> None:
        """Write an event that nothing depends on; one that cannot be is logged."""
        try:
            self.tell(kind, process, **fields)
        except ZTServeError as failure:
            _LOG.error("%s not audited: %s: %s", kind, fields, failure)

    def close(self) -> None:
        """Write what was counted."""
        with self._lock:
            windows = list(self._windows.items())
            self._windows.clear()
        for kind, window in windows:
            if window.dropped:
                self.note("events-dropped", None, kind=kind, count=window.dropped)

    def _turn(self, kind: str) -> int:
        """Begin a new window if need be; return how many the old one dropped."""
        now = self._clock()
        window = self._windows.get(kind)
        if window is not None and now < window.ends:
            return 0
        self._windows[kind] = _Window(now + WINDOW_S)
        return window.dropped if window else 0
