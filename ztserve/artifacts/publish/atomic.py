"""Writing files that are there whole, or not at all, also after a crash."""

import os
import tempfile
from pathlib import Path


def create(path: Path, content: bytes, *, mode: int) -> None:
    """Write a new file and sync it; raises FileExistsError, never overwrites."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, mode), "wb") as file:  # noqa: PTH123 - descriptor
        _write(file.fileno(), content)
    sync_folder(path.parent)


def replace(path: Path, content: bytes | memoryview, *, mode: int = 0o644) -> None:
    """Write a file through a temporary one beside it: readers see old or new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
            os.fchmod(file.fileno(), mode)
            _write(file.fileno(), content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries last a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
