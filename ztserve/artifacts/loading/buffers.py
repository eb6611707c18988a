"""Reading each file once, into memory that nobody else can reach, hashing on the way.

What is hashed is the very memory that tensors are later built over: a file changed
after (or while) it is read changes nothing that was verified. A mapping of the file
itself would follow such changes, even a private one.
"""

import hashlib
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from ztserve.artifacts.registry.protocol import Reader
from ztserve.errors import RegistryError, VerificationError

_CHUNK = 2 << 20
"""Bytes read and then hashed while they are still in the processor's cache."""
_HUGE = 4 << 20
"""From this size on, huge pages are asked for: small ones cost more than the read."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """The content of one file in private memory, and its digest."""

    view: memoryview
    sha256: str
    """Hex digits."""


def physical_memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_all(
    open_file: Callable[[str], Reader],
    sizes: Mapping[str, int],
    *,
    max_bytes: int | None = None,
) -> dict[str, Buffer]:
    """Read the files named in `sizes`, a thread each, as many as there are cores.

    Refuses before reading where they need more than `max_bytes` together (default:
    the machine's memory). Raises RegistryError, or what `open_file` raises.
    """
    limit = physical_memory() if max_bytes is None else max_bytes
    total = sum(sizes.values())
    if total > limit:
        raise RegistryError(
            f"the model's files need {total} bytes of memory, more than the limit "
            f"of {limit}"
        )
    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    pool = ThreadPoolExecutor(os.cpu_count() or 1, "ztserve-artifacts")
    try:
        reads = {
            name: pool.submit(_read, open_file, name, sizes[name])
            for name in largest_first
        }
        return {name: read.result() for name, read in reads.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _read(open_file: Callable[[str], Reader], name: str, size: int) -> Buffer:
    digest = hashlib.sha256()
    with open_file(name) as reader:
        if reader.size != size:
            raise VerificationError(
                f"{name!r} has {reader.size} bytes where the registry listed {size}"
            )
        view = _private_memory(size)
        offset = 0
        while offset < size:
            end = min(offset + _CHUNK, size)
            read = _read_into(reader, view[offset:end], offset, name)
            digest.update(view[offset : offset + read])
            offset += read
    return Buffer(view, digest.hexdigest())


def _read_into(reader: Reader, view: memoryview, offset: int, name: str) -> int:
    try:
        read = reader.read_into(view, offset)
    except OSError as error:
        raise RegistryError(f"{name!r} cannot be read: {error.strerror}") from error
    if not 0 < read <= len(view):
        raise VerificationError(
            f"{name!r} is truncated: it ends after {offset} bytes, short of its size"
        )
    return read


def _private_memory(size: int) -> memoryview:
    if size == 0:
        return memoryview(bytearray())
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise RegistryError(f"no memory for a file of {size} bytes") from error
    if size >= _HUGE:
        with suppress(OSError):  # a kernel without transparent huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
