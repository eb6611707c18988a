"""Read policy files: bounded, and only files that nobody else can change."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ztserve.authorization.document import MAX_BYTES
from ztserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_FILES = 64


def read_files(paths: Iterable[Path | str]) -> dict[str, str]:
    """Return the texts of policy files by path.

    ConfigError for no file at all, more than 64, one over 256 KiB, one that is not a
    regular UTF-8 file, and one that its group or others may write.
    """
    files = [Path(path) for path in paths]
    if not 0 < len(files) <= MAX_FILES:
        raise ConfigError(
            f"{len(files)} policy files; name at least one and at most {MAX_FILES}"
        )
    return {str(file): _read(file) for file in files}


def _read(file: Path) -> str:
    try:
        # A named pipe must not make the start-up wait for a writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # Of the file that is open, not of the path: it cannot change in between.
            _check_mode(file, os.fstat(descriptor).st_mode)
            with os.fdopen(descriptor, "rb", closefd=False) as opened:
                data = opened.read(MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file}: larger than {MAX_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}") from None


def _check_mode(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{file}: not a regular file")
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{file}: writable by group or others; run: chmod go-w {file}"
        )
