"""Where a project's own Ray is, for the other shells of its owner.

Whoever starts a Ray for a project holds the file `cluster` of its state folder locked
for as long (flock(2)); the lock ends with the process, however that ends.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ztserve.config import Settings
from ztserve.errors import ConfigError

_FILE = "cluster"
_MOST_CHARS = 256


@contextmanager
def claimed(settings: Settings) -> Iterator[Callable[[str], None]]:
    """Have this project for this process; yields what notes the Ray's address.

    Raises ConfigError where another process has it.
    """
    settings.state.mkdir(mode=0o700, exist_ok=True)
    file = os.open(
        settings.state / _FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
    )
    try:
        _lock(file, fcntl.LOCK_EX, settings)
        os.ftruncate(file, 0)
        yield lambda address: _write(file, address)
    finally:
        os.close(file)


def check_free(settings: Settings) -> None:
    """Raise ConfigError where another process has this project; changes nothing."""
    try:
        file = os.open(settings.state / _FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        _lock(file, fcntl.LOCK_SH, settings)
    finally:
        os.close(file)


def _lock(file: int, kind: int, settings: Settings) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"the project of {settings.state} is being served already: see it with "
            "`ztserve status`, end it with Ctrl-C where it runs, or serve this beside "
            "it from a folder of its own"
        ) from None


def noted_address(settings: Settings) -> str | None:
    """Return the address of this project's Ray, None where nobody serves it."""
    try:
        file = os.open(settings.state / _FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with os.fdopen(file, encoding="utf-8", errors="replace") as note:
        address = note.read(_MOST_CHARS)
        try:
            if address:
                fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return address
    return None  # who wrote it was killed


def _write(file: int, address: str) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, address.encode(), 0)
