"""Connections that ended before a call, by cause and address, told of now and then."""

import logging
import threading
from collections import Counter
from collections.abc import Callable

_LOG = logging.getLogger(__name__)

MAX_KINDS = 64
"""Causes and addresses that are told apart between two times; the rest is one count."""
OTHERS = ("several causes", "")


class RefusedHandshakes:
    """Counts refusals; `report` (cause, count, address) is told by `tell`."""

    def __init__(self, report: Callable[[str, int, str], None]) -> None:
        self._report = report
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, cause: str, address: str, count: int = 1) -> None:
        """Count refusals; what a stranger can vary is bounded."""
        with self._lock:
            known = (cause, address)
            if known not in self._counts and len(self._counts) >= MAX_KINDS:
                known = OTHERS
            self._counts[known] += count

    def tell(self) -> None:
        """Report what was counted, and begin anew.

        A report that fails keeps no other back, and is made again the next time.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        for (cause, address), count in counts.items():
            try:
                self._report(cause, count, address)
            except Exception:  # noqa: BLE001 - logged; the others are told
                _LOG.exception("a report of refused handshakes failed")
                self.add(cause, address, count)
