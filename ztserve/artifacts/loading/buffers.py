"""Reading each file once, into memory that nobody else can reach, hashing on the way.

What is hashed is the very memory that tensors are later built over: a file changed
after (or while) it is read changes nothing that was verified. A mapping of the file
itself would follow such changes, even a private one.
"""

import mmap
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from ztserve.artifacts.loading.progress import INTERVAL_S, Meter
from ztserve.artifacts.registry.protocol import Reader
from ztserve.artifacts.statements.serialization import (
    WHOLE_FILES,
    Serialization,
    Span,
)
from ztserve.errors import RegistryError, VerificationError

_CHUNK = 2 << 20
"""Bytes read and then hashed while they are still in the processor's cache."""
_PIECE = 32 << 20
"""Bytes that a thread takes at once of a file in shards: it opens the file for them."""
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux's, on x86 and Arm; Python names it since 3.13."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """The content of one file in private memory, and its digests."""

    view: memoryview
    digests: tuple[str, ...]
    """Hex digits: of the whole file, or of each of its shards in order."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Spans of one file that one thread reads, one after the other."""

    name: str
    view: memoryview
    """The memory of the whole file."""
    spans: list[Span]

    @property
    def size(self) -> int:
        """Return its bytes."""
        return self.spans[-1][1] - self.spans[0][0]


def physical_memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_all(
    open_file: Callable[[str], Reader],
    sizes: Mapping[str, int],
    *,
    serialization: Serialization = WHOLE_FILES,
    max_bytes: int | None = None,
    allocate: Callable[[Mapping[str, int]], Mapping[str, memoryview]] | None = None,
    meter: Meter | None = None,
) -> dict[str, Buffer]:
    """Read the files named in `sizes` and hash them as `serialization` says.

    As many threads as there are cores, each at a file of its own; where files are in
    shards, each at some shards, so that also one big file keeps them all busy.
    `open_file` is called once for each such piece, and no Reader is used by two.
    `allocate` gives the memory of these sizes (default: private to this process).
    `meter` counts, and tells of progress on this thread.

    Refuses before reading where they need more than `max_bytes` together (default:
    the machine's memory). Raises RegistryError, VerificationError, or what
    `open_file` raises.
    """
    limit = physical_memory() if max_bytes is None else max_bytes
    total = sum(sizes.values())
    if total > limit:
        raise RegistryError(
            f"the model's files need {total} bytes of memory, more than the limit "
            f"of {limit}"
        )
    serialization.new_hash()  # where it is not installed: before the memory is taken
    views = (allocate or _private_memories)(sizes)
    pieces = [
        Piece(name, view, spans)
        for name, view in views.items()
        for spans in shares(serialization.spans(len(view)))
    ]
    digests: dict[str, list[str]] = {name: [] for name in sizes}
    if meter is not None:
        meter.begin(total)
    for piece, found in zip(
        pieces, read_pieces(open_file, pieces, serialization, meter), strict=True
    ):
        digests[piece.name].extend(found)
    return {name: Buffer(views[name], tuple(digests[name])) for name in sizes}


def shares(spans: Iterable[Span], least: int | None = None) -> Iterator[list[Span]]:
    """Cut adjoining spans into lists of `least` bytes or more, but for the last.

    `least` is `_PIECE` at most, and where it is not given.
    """
    least = _PIECE if least is None else min(least, _PIECE)
    share: list[Span] = []
    for span in spans:
        share.append(span)
        if span[1] - share[0][0] >= least:
            yield share
            share = []
    if share:
        yield share


def read_pieces(
    open_file: Callable[[str], Reader],
    pieces: Sequence[Piece],
    serialization: Serialization,
    meter: Meter | None = None,
) -> list[list[str]]:
    """Read all pieces into their places, the largest first; return their digests.

    Hex digits, by piece and span. Errors as of `read_all`.
    """
    pool = ThreadPoolExecutor(os.cpu_count() or 1, "ztserve-artifacts")
    try:
        reads = {
            number: pool.submit(_read, open_file, pieces[number], serialization, meter)
            for number in sorted(range(len(pieces)), key=lambda n: -pieces[n].size)
        }
        if meter is not None:
            _report(meter, reads.values())
        return [reads[number].result() for number in range(len(pieces))]
    finally:
        pool.shutdown(cancel_futures=True)


def _report(meter: Meter, reads: Collection[Future[list[str]]]) -> None:
    """Tell of progress until all is read, or something fails."""
    going: Collection[Future[list[str]]] = reads
    while going:
        done, going = wait(going, INTERVAL_S, return_when=FIRST_EXCEPTION)
        meter.report()
        if any(read.exception() for read in done):
            return


def _read(
    open_file: Callable[[str], Reader],
    piece: Piece,
    serialization: Serialization,
    meter: Meter | None,
) -> list[str]:
    """Read a piece into its place; return the digest of each of its spans."""
    digests = []
    with open_file(piece.name) as reader:
        if reader.size != len(piece.view):
            raise VerificationError(
                f"{piece.name!r} has {reader.size} bytes where the registry listed "
                f"{len(piece.view)}"
            )
        filled, last = piece.spans[0][0], piece.spans[-1][1]
        for start, end in piece.spans:
            digest, hashed = serialization.new_hash(), start
            while hashed < end:
                if hashed == filled:  # chunks are read whole, however small the shards
                    chunk = piece.view[filled : min(filled + _CHUNK, last)]
                    read = _read_into(reader, chunk, filled, piece.name)
                    filled += read
                    if meter is not None:
                        meter.read(read)
                upto = min(filled, end)
                digest.update(piece.view[hashed:upto])
                hashed = upto
            digests.append(digest.hexdigest())
            if meter is not None:
                meter.hashed(piece.name, (start, end), digests[-1])
    return digests


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


def _private_memories(sizes: Mapping[str, int]) -> Mapping[str, memoryview]:
    return {name: private_memory(size) for name, size in sizes.items()}


def private_memory(size: int, *, reserve: bool = True) -> memoryview:
    """Return so many bytes of zeros of our own; RegistryError where there are none.

    Without `reserve` there may be more of them than the machine has memory: they take
    some only where they are written to.
    """
    if size == 0:
        return memoryview(bytearray())
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    flags |= 0 if reserve else _MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError) as error:
        raise RegistryError(f"no memory for a file of {size} bytes") from error
    # No huge pages: on a virtual machine that gives free memory back, the host has to
    # find each anew, and a load took twice as long.
    return memoryview(memory)
