"""The writing end of a log: each line bound to the one before, within a budget.

A line is one write(2) on an O_APPEND descriptor: once that has returned, the line
survives the death of the process (not the loss of power).
"""

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from threading import Lock
from time import monotonic

from ztserve.audit import files, lines
from ztserve.errors import AuditError, ConfigError

_HEAD_BYTES = 128
"""At least what seq, prev, braces and newline add to a line's fields."""


class Chain:
    """Appends lines. Thread-safe; one process at a time (flock).

    `header(number)` gives the fields of the line that begins each file. Raises
    AuditError where file or directory are not private to this user, or do not hold
    an audit log; ConfigError on impossible limits.
    """

    def __init__(
        self,
        path: Path,
        header: Callable[[int], str],
        *,
        max_bytes: int,
        reserve_bytes: int,
        segment_bytes: int,
    ) -> None:
        if not 0 < reserve_bytes < max_bytes or segment_bytes <= 0:
            raise ConfigError(
                f"audit log {path}: expected 0 < reserve_bytes < max_bytes and "
                f"segment_bytes > 0, got {reserve_bytes}, {max_bytes}, {segment_bytes}"
            )
        self._path = path
        self.common = ""
        """JSON members at the end of each line from now on, each after a comma."""
        self._header = header
        self._max_bytes = max_bytes
        self._open_bytes = max_bytes - reserve_bytes
        self._segment_bytes = segment_bytes
        self._lock = Lock()
        self._seq, self._prev, self._end = 0, lines.FIRST_PREV, 0
        self._whole = False
        """Whether seq, prev and end are known to be those of the file."""
        self._check_at = self._measure_at = 0.0
        self._fd = -1
        self._directory = files.open_directory(path.parent)
        try:
            self._number = max(files.numbers(path, self._directory), default=1)
            self._fd = files.open_append(self._file, self._directory, new=False)
            if files.numbers(path, self._directory)[-1] != self._number:
                raise AuditError(f"audit log {path}: it is being written by another")
            self._used = self._measure()
            self._resume()
            self._write(header(self._number))
        except BaseException:
            self.close()
            raise

    @property
    def _file(self) -> Path:
        return files.segment(self._path, self._number)

    def append(self, fields: str, *, reserved: bool = False) -> None:
        """Write one line; `fields` are JSON members in ASCII, without braces.

        `reserved`: may use the part of the budget kept for refusals. Raises
        AuditError where the line is not, whole and surely, in the file.
        """
        size = len(fields) + len(self.common) + _HEAD_BYTES
        with self._lock:
            if (
                not self._whole
                or self._used + size > self._open_bytes
                or self._end + size > self._segment_bytes
                or monotonic() >= self._check_at
            ):
                self._prepare(size, self._max_bytes if reserved else self._open_bytes)
            self._write(fields)

    def close(self) -> None:
        """Give the files back. Nothing can be written any more."""
        with self._lock:
            for fd in (self._fd, self._directory):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._directory = -1
            self._whole = False

    def _prepare(self, size: int, limit: int) -> None:
        """Make sure that a line of `size` bytes may be, and can be, written."""
        if self._fd < 0:
            raise AuditError(f"audit log {self._path} is closed")
        if monotonic() >= self._check_at:
            files.check_in_place(self._fd, self._file, self._directory)
            self._check_at = monotonic() + 1
        if not self._whole:
            self._resume()
            if not self._end:
                self._write(self._header(self._number))
        if self._used + size > limit and monotonic() >= self._measure_at:
            # Whoever archives finished files makes room, without a restart.
            self._used = self._measure()
            self._measure_at = monotonic() + 1
        if self._used + size > limit:
            raise AuditError(
                f"audit log {self._path} holds {self._used} of at most {limit} bytes: "
                "archive its finished files, or raise max_bytes"
            )
        if self._end + size > self._segment_bytes:
            self._rotate()

    def _write(self, fields: str, before: bytes = b"") -> None:
        place = f'"seq":{self._seq + 1},"prev":"{self._prev}"'
        line = f"{{{place},{fields}{self.common}}}".encode()
        data = before + line + b"\n"
        # Until the write is known to be whole, the file has to be read again.
        self._whole = False
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            raise AuditError(
                f"audit log {self._path} cannot be written: {error.strerror}"
            ) from error
        if written != len(data):
            raise AuditError(
                f"audit log {self._path}: only {written} of {len(data)} bytes could be "
                "written; is the disk full?"
            )
        self._prev = sha256(line).hexdigest()
        self._seq += 1
        self._end += written
        self._used += written
        self._whole = True

    def _resume(self) -> None:
        """Find the end of the chain in the files, and close a torn line."""
        tail = files.read_tail(self._fd, self._file)
        last = tail
        if not tail.seq and self._number > 1:
            last = files.read_tail_of(files.segment(self._path, self._number - 1))
        self._seq, self._prev, self._end = last.seq, last.prev, tail.end
        self._whole = True
        if tail.torn:
            mark = b"" if tail.torn.endswith(b"\n") else lines.TORN_MARK
            torn = tail.torn + mark
            fields = {"bytes": len(torn), "sha256": sha256(torn).hexdigest()}
            self._end += len(tail.torn)
            self._write(lines.event("torn", fields), mark)

    def _rotate(self) -> None:
        following = files.segment(self._path, self._number + 1)
        fd = files.open_append(following, self._directory, new=True)
        os.close(self._fd)
        self._fd, self._number, self._end = fd, self._number + 1, 0
        self._write(self._header(self._number))

    def _measure(self) -> int:
        return sum(
            os.stat(
                files.segment(self._path, number).name,
                dir_fd=self._directory,
                follow_symlinks=False,
            ).st_size
            for number in files.numbers(self._path, self._directory)
        )
