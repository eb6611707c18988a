"""Reading files beneath a directory: regular ones only, through no link, bounded.

Every path component is opened with O_NOFOLLOW under its parent's descriptor, so a
link swapped in at any time leads nowhere. Nothing here can write.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from ztserve.errors import RegistryError, VerificationError

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
MAX_DEPTH = 16
MAX_ENTRIES = 20_000


class FileReader:
    """One open file of fixed `size`; a `registry.Reader`."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self.size = size

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset`; return the bytes read, 0 at the end."""
        return os.preadv(self._descriptor, [view], offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)


def open_file(root: Path, name: str) -> FileReader:
    """Open the regular file `name` (``/``-separated) beneath `root`.

    Raises FileNotFoundError where there is none, VerificationError where a link or
    special file is in the way, RegistryError where the storage fails.
    """
    *folders, last = name.split("/")
    with _faults(root, name):
        parent = os.open(root, _FOLDER)
        try:
            for folder in folders:
                child = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
                os.close(parent)
                parent = child
            descriptor = os.open(last, _FILE, dir_fd=parent)
        except NotADirectoryError as error:
            raise VerificationError(_irregular(root, name)) from error
        finally:
            os.close(parent)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise VerificationError(_irregular(root, name))
    return FileReader(descriptor, status.st_size)


def read_file(root: Path, name: str, *, limit: int) -> bytes:
    """Read a small file whole; errors as `open_file`, RegistryError above `limit`."""
    with open_file(root, name) as reader:
        if reader.size > limit:
            raise RegistryError(
                f"{root / name} has {reader.size} bytes, more than the {limit} allowed"
            )
        buffer = bytearray(reader.size)
        with _faults(root, name):
            read = reader.read_into(memoryview(buffer), 0)
    if read != len(buffer):
        raise RegistryError(f"{root / name} changed while it was read; try again")
    return bytes(buffer)


def list_files(root: Path) -> dict[str, int]:
    """Return every file beneath `root`, name to size in bytes.

    Raises VerificationError on links, special files and too many entries,
    RegistryError where the storage fails.
    """
    found: dict[str, int] = {}
    try:
        with _faults(root, "."):
            descriptor = os.open(root, _FOLDER)
            try:
                _walk(descriptor, "", root, found, count(1))
            finally:
                os.close(descriptor)
    except FileNotFoundError as error:
        raise RegistryError(
            f"there is no folder {root}, or it vanished while it was listed"
        ) from error
    return found


def _walk(
    folder: int, prefix: str, root: Path, found: dict[str, int], seen: Iterator[int]
) -> None:
    if prefix.count("/") > MAX_DEPTH:
        raise VerificationError(f"{str(root / prefix)!r} lies too deep")
    with os.scandir(folder) as entries:
        for entry in entries:
            if next(seen) > MAX_ENTRIES:
                raise VerificationError(
                    f"{root} has more than {MAX_ENTRIES} files and folders"
                )
            name = prefix + entry.name
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                child = os.open(entry.name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                try:
                    _walk(child, name + "/", root, found, seen)
                finally:
                    os.close(child)
            elif not stat.S_ISREG(status.st_mode):
                raise VerificationError(_irregular(root, name))
            else:
                found[name] = status.st_size


@contextmanager
def _faults(root: Path, name: str) -> Iterator[None]:
    """Tell a missing file from a link and from storage that fails."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise VerificationError(_irregular(root, name)) from error
        raise RegistryError(
            f"{str(root / name)!r} cannot be read: {error.strerror}"
        ) from error


def _irregular(root: Path, name: str) -> str:
    return (
        f"{str(root / name)!r} is, or leads through, a symbolic link or special file: "
        "a model consists of regular files only"
    )
