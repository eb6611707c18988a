"""The files of one log: how they are named, opened, and end.

A log at ``audit.jsonl`` continues in ``audit.jsonl.000002`` and so on. Files and
directory must be private to this user: whoever else may write there could put a link
or another file in place of the log.
"""

import fcntl
import os
import re
import stat
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ztserve.audit.lines import FIRST_PREV, MAX_LINE_BYTES, TORN_MARK, parse
from ztserve.errors import AuditError

TAIL_BYTES = 4 * MAX_LINE_BYTES
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Tail(NamedTuple):
    """How a file ends."""

    seq: int
    """Of its last record; 0 where it has none."""
    prev: str
    """SHA-256 of that record's line, hex."""
    end: int
    """Where that line ends, in bytes."""
    torn: bytes
    """What follows it: left by writes that did not complete."""


def segment(path: Path, number: int) -> Path:
    """Return the path of a log's file by its number, from 1."""
    return path if number == 1 else path.with_name(f"{path.name}.{number:06d}")


def numbers(path: Path, directory: int | Path) -> list[int]:
    """Return the numbers of the log's files in `directory`, ascending."""
    pattern = re.compile(re.escape(path.name) + r"(?:\.(\d{6}))?\Z")
    # By descriptor where one is given: a path could name another directory by now.
    names = os.listdir(directory)  # noqa: PTH208
    found = [match for name in names if (match := pattern.match(name))]
    return sorted(int(match[1] or 1) for match in found)


def open_directory(path: Path) -> int:
    """Open, or make, the log's directory; AuditError where it is not private."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise AuditError(
            f"audit directory {path} cannot be opened: {error.strerror}; expected a "
            "directory, not a link"
        ) from error
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(fd)
        raise AuditError(
            f"audit directory {path} has mode {stat.S_IMODE(status.st_mode):o} and uid "
            f"{status.st_uid}; expected mode 700 and uid {os.geteuid()}"
        )
    return fd


def open_append(path: Path, directory: int, *, new: bool) -> int:
    """Open a log's file to append, alone; AuditError where it is not private."""
    try:
        flags = _APPEND | (os.O_EXCL if new else 0)
        fd = os.open(path.name, flags, 0o600, dir_fd=directory)
    except OSError as error:
        raise AuditError(
            f"audit log {path} cannot be opened: {error.strerror}; expected a plain "
            "file of our own, or none"
        ) from error
    try:
        _check_private(os.fstat(fd), path)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise AuditError(f"audit log {path}: it is being written by another") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_private(status: os.stat_result, path: Path) -> None:
    if (
        not stat.S_ISREG(status.st_mode)
        or status.st_uid != os.geteuid()
        or status.st_mode & 0o077
        or status.st_nlink != 1
    ):
        raise AuditError(
            f"audit log {path} has mode {stat.S_IMODE(status.st_mode):o}, uid "
            f"{status.st_uid} and {status.st_nlink} names; expected a plain file with "
            f"mode 600, uid {os.geteuid()} and one name"
        )


def check_in_place(fd: int, path: Path, directory: int) -> None:
    """Raise AuditError where `path` is no longer the open file."""
    ours = os.fstat(fd)
    try:
        there = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        there = None
    if there is None or not os.path.samestat(ours, there):
        raise AuditError(
            f"audit log {path} was moved or deleted while in use: put it back, or "
            "restart to begin another"
        )


def read_tail(fd: int, path: Path) -> Tail:
    """Return how the file ends; AuditError where it is no audit log."""
    start = max(0, os.fstat(fd).st_size - TAIL_BYTES)
    data = os.pread(fd, TAIL_BYTES, start)
    end = data.rfind(b"\n") + 1
    while end:
        begin = data.rfind(b"\n", 0, end - 1) + 1
        line = data[begin : end - 1]
        fields = parse(line) if begin or not start else None
        if fields is not None:
            digest = sha256(line).hexdigest()
            return Tail(fields["seq"], digest, start + end, data[end:])
        if not data[begin:end].endswith(TORN_MARK):
            break
        end = begin
    if end or start:
        raise AuditError(
            f"audit log {path}: no record is where the last one should be; it was "
            "changed, or is no audit log: verify it, and move it away"
        )
    return Tail(0, FIRST_PREV, 0, data)


def read_tail_of(path: Path) -> Tail:
    """Return how a finished file ends."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise AuditError(
            f"audit log {path} cannot be read ({error.strerror}), and the file after "
            "it is empty: put it back, or begin another log"
        ) from error
    try:
        return read_tail(fd, path)
    finally:
        os.close(fd)
