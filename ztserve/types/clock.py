"""The one clock."""

import time
from datetime import UTC, datetime

_START_WALL, _START_MONOTONIC = time.time(), time.monotonic()


def now() -> datetime:
    """Return the time in UTC, never behind monotonic progress since start-up.

    A wall clock that is set back can therefore not revive what has expired.
    """
    steady = _START_WALL + (time.monotonic() - _START_MONOTONIC)
    return datetime.fromtimestamp(max(time.time(), steady), UTC)
