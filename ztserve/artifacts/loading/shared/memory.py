"""Memory that nobody can change any more: memfd_create(2), sealed (fcntl(2)).

One piece of it holds all files of a model in the order of their names, each from the
beginning of a page on. It could be written to only through the one mapping in which it
was filled and hashed: F_SEAL_FUTURE_WRITE is on before the first byte, and the kernel
grants F_SEAL_WRITE only once that mapping is gone. No process can take a seal off.

Which memory it is, is told by its inode number. These are never used again from Linux
5.9 on (commit e809d5f0b5c9, 64 bits of tmpfs's own); before, a counter of 32 bits for
all file systems wraps, and who makes enough of them gets a number that is taken.
"""

import errno
import fcntl
import mmap
import os
import platform
import re
import stat
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ztserve.artifacts.loading.buffers import Buffer, read_all
from ztserve.artifacts.loading.memory import Wanted
from ztserve.errors import RegistryError, VerificationError

_NAME = "ztserve-weights"
_FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE (Linux 5.1), which `fcntl` has no name for."""
_NOEXEC = 0x8
"""MFD_NOEXEC_SEAL (Linux 6.3): never to be executed; some kernels insist on it."""
_FIXED = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
SEALS = _FIXED | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
"""What shared memory must have: no other size, no other bytes, no seal more."""

_UNIQUE_SINCE = (5, 9)
"""Which Linux it takes for inode numbers to be one memory's alone."""


class MemoryId(NamedTuple):
    """Which memory it is, on one node, until it is given back."""

    device: int
    inode: int
    size: int
    """In bytes, a whole number of pages."""


class SealedMemory:
    """Reads a model's files into memory that it then seals; does so once.

    `reserve` is told how many bytes that takes, and raises where they are too many.
    """

    def __init__(self, reserve: Callable[[int], None]) -> None:
        self._reserve = reserve
        self.descriptor = -1
        """Of the sealed memory; -1 before `fill`, and after `close`."""
        self.sizes: dict[str, int] = {}
        self.digests: dict[str, tuple[str, ...]] = {}

    def fill(self, wanted: Wanted) -> Mapping[str, Buffer]:
        """Read, hash and seal; return the files as `map_private` shows them.

        Raises RegistryError where there is no such memory, and as `read_all`.
        """
        size = layout(wanted.sizes)[1]
        check_numbering(platform.release())
        self._reserve(size)
        self.descriptor = _create(size)
        try:
            self.digests = _filled(self.descriptor, wanted)
            _add_seals(self.descriptor, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
        except BaseException:
            self.close()
            raise
        self.sizes = dict(wanted.sizes)
        views = map_private(self.descriptor, self.sizes)
        return {name: Buffer(views[name], self.digests[name]) for name in self.sizes}

    def id(self) -> MemoryId:
        """Return which memory this is."""
        return memory_id(self.descriptor)

    def close(self) -> None:
        """Give our hold on the memory up; mappings of it stay. May be called again."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def layout(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return where each file begins, and how many bytes the memory has."""
    offsets, end = {}, 0
    for name in sorted(sizes):
        offsets[name] = end
        end += -(-sizes[name] // mmap.PAGESIZE) * mmap.PAGESIZE
    return offsets, max(end, mmap.PAGESIZE)


def check_numbering(release: str) -> None:
    """Raise RegistryError where the kernel gives an inode number twice."""
    version = re.match(r"(\d+)\.(\d+)", release)
    if version is None or tuple(map(int, version.groups())) < _UNIQUE_SINCE:
        raise RegistryError(
            f"Linux {release:.80} may give two memories one inode number, so that "
            "which one was hashed cannot be told; sharing takes Linux 5.9"
        )


def check_sealed(descriptor: int) -> MemoryId:
    """Return which memory `descriptor` is of.

    Raises VerificationError unless it is memory that nobody can change any more.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:  # EINVAL: a file on a disk, a pipe, a device
        raise VerificationError(
            f"it is a file that cannot be sealed ({error.strerror}), so that whoever "
            "has it can change it; expected memory of memfd_create(2)"
        ) from error
    if seals & SEALS != SEALS:
        raise VerificationError(
            f"its seals are {seals:#x}, expected at least {SEALS:#x}: whoever has it "
            "can change it still"
        )
    return memory_id(descriptor)


def memory_id(descriptor: int) -> MemoryId:
    """Return which memory `descriptor` is of, sealed or not."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise VerificationError("it is no memory of memfd_create(2)")
    return MemoryId(found.st_dev, found.st_ino, found.st_size)


def map_private(
    descriptor: int,
    sizes: Mapping[str, int],
    *,
    bound: Callable[[mmap.mmap], object] = lambda _: None,
) -> dict[str, memoryview]:
    """Map the memory and return its files; what is written stays in this process.

    Copy on write (MAP_PRIVATE): a write gets a copy of the page that no other process
    sees. `bound` is given the mapping, which lives for as long as any file's view.
    Raises RegistryError where there is no room for it.
    """
    offsets, size = layout(sizes)
    try:
        mapping = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE)
    except (OSError, OverflowError) as error:
        raise RegistryError(f"no room for a mapping of {size} bytes") from error
    bound(mapping)
    return _cut(memoryview(mapping), offsets, sizes)


def _cut(
    whole: memoryview, offsets: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[str, memoryview]:
    return {
        name: whole[offsets[name] : offsets[name] + size]
        for name, size in sizes.items()
    }


def _create(size: int) -> int:
    usual = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        try:
            descriptor = os.memfd_create(_NAME, usual | _NOEXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            descriptor = os.memfd_create(_NAME, usual)  # an older kernel
    except OSError as error:
        raise RegistryError(f"no memory to share: {error.strerror}") from error
    try:
        os.ftruncate(descriptor, size)
    except (OSError, OverflowError) as error:
        os.close(descriptor)
        raise RegistryError(f"no memory to share of {size} bytes: {error}") from error
    return descriptor


def _filled(descriptor: int, wanted: Wanted) -> dict[str, tuple[str, ...]]:
    """Fill the memory through a mapping that ends here; return the digests."""
    offsets, size = layout(wanted.sizes)
    writable = mmap.mmap(descriptor, size)
    _add_seals(descriptor, _FIXED | _FUTURE_WRITE)
    whole = memoryview(writable)
    buffers = read_all(
        wanted.open,
        wanted.sizes,
        serialization=wanted.serialization,
        max_bytes=wanted.max_bytes,
        allocate=lambda sizes: _cut(whole, offsets, sizes),
    )
    try:
        for buffer in buffers.values():
            buffer.view.release()
        whole.release()
        writable.close()
    except BufferError as error:  # a reader has kept a view to write through
        raise RegistryError(f"memory to share is in use still: {error}") from error
    return {name: buffer.digests for name, buffer in buffers.items()}


def _add_seals(descriptor: int, seals: int) -> None:
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        raise RegistryError(
            f"memory cannot be sealed here ({error.strerror}); it takes Linux 5.9"
        ) from error
