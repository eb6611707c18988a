"""Writing files that are there whole, or not at all, also after a crash."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path


def create(path: Path, content: bytes, *, mode: int) -> None:
    """Write a new file and sync it; raises FileExistsError, never overwrites."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, mode), "wb") as file:  # noqa: PTH123 - descriptor
        _write(file.fileno(), content)
    sync_folder(path.parent)


def replace(path: Path, content: bytes | memoryview, *, mode: int = 0o644) -> None:
    """Write a file through a temporary one beside it: readers see old or new."""
    with prepared({path: content}, mode=mode):
        pass


@contextmanager
def prepared(
    files: Mapping[Path, bytes | memoryview], *, mode: int = 0o644
) -> Iterator[None]:
    """Write files that take their names at the end, and leave none where it fails.

    What can fail for want of room, or of a right, fails at the beginning.
    """
    with ExitStack() as undoing:
        temporaries = {}
        for path, content in files.items():
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            temporaries[path] = Path(name)
            undoing.callback(Path(name).unlink, missing_ok=True)
            with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
                os.fchmod(file.fileno(), mode)
                _write(file.fileno(), content)
        yield
        for path, temporary in temporaries.items():
            temporary.replace(path)
    for folder in {path.parent for path in files}:
        sync_folder(folder)


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
