"""Weight files of which each shard is read and verified when it is first needed.

A shard is what one digest of the manifest is over: the whole file, where the model was
signed by method `files`. Nothing of a shard is given out before its digest is found to
be the signed one, and none is read again after that: a file that changes between two
reads is refused at the shard that was read too late.
"""

import hmac
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import TypeAlias

from ztserve.artifacts.loading.buffers import (
    Piece,
    private_memory,
    read_pieces,
    shares,
)
from ztserve.artifacts.loading.header import data_start
from ztserve.artifacts.registry.protocol import Reader
from ztserve.artifacts.statements.manifest import Manifest
from ztserve.artifacts.statements.serialization import Span
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import RegistryError, VerificationError

_Shard: TypeAlias = tuple[str, int]
"""A file, and the number of a shard of it."""
_TAKEN, _VERIFIED = 1, 2
"""How a shard stands: memory is taken for it; it is there. (0: neither.)"""
_CLOSED = (
    "the weights asked for in {!r} were not read while the model was loaded, and are "
    "read no more: ask for them in load()"
)
_INTERRUPTED = (
    "reading these weights was interrupted: verify the model anew to have them"
)


class Shards:
    """The verified part of some files; it grows as more of them is asked for.

    May be used by several threads: each shard is read by one, the others wait for it.
    What was read stays until this object and all that lies over its memory is gone.

    Args:
        open_file: opens a file of the model; called for each run of shards.
        manifest: what was signed.
        sizes: the files and their sizes in bytes.
        max_bytes: most bytes that may be read, all files together.

    """

    def __init__(
        self,
        open_file: Callable[[str], Reader],
        manifest: Manifest,
        sizes: Mapping[str, int],
        *,
        max_bytes: int,
    ) -> None:
        self._open = open_file
        self._manifest = manifest
        self._views = {
            name: private_memory(size, reserve=False) for name, size in sizes.items()
        }
        self._spans = {
            name: manifest.serialization.spans(size) for name, size in sizes.items()
        }
        self._max_bytes = max_bytes
        self._taken = 0
        """Bytes of memory written to, if only by a read that failed."""
        self._verified = 0
        self._state = {
            name: bytearray(len(spans)) for name, spans in self._spans.items()
        }
        self._reads: dict[_Shard, Future[None]] = {}
        """Those going on."""
        self._lock = threading.Lock()
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(map(len, self._views.values()))

    @property
    def unread(self) -> int:
        """Bytes of the files that nobody asked for, and so nobody verified."""
        return self.size - self._verified

    def content(self, name: str, start: int, end: int) -> memoryview:
        """Return the bytes from `start` to `end` of a file, verified; see `require`."""
        self.require([(name, (start, end))])
        return self._views[name][start:end]

    def header(self, name: str) -> memoryview:
        """Return the beginning of a safetensors file, to the end of its header.

        Its length is believed only once the shard that it stands in is verified.
        """
        size = len(self._views[name])
        first = self.content(name, 0, min(8, size))
        try:
            return self.content(name, 0, data_start(first, size))
        except Malformed as error:
            raise VerificationError(
                f"{name} is not sound safetensors: {error}"
            ) from error

    def close(self) -> None:
        """Read no more; what was read stays."""
        self._closed = True

    def require(self, ranges: Iterable[tuple[str, Span]]) -> None:
        """Read and verify the shards that cover these ranges of files, in parallel.

        Raises VerificationError where a shard has not its signed digest, RegistryError
        where it cannot be read, or needs more memory than `max_bytes`. What failed is
        read anew when it is asked for again.
        """
        mine, others = self._claim(ranges)
        try:
            self._read(list(mine))
        except Exception as error:
            self._end(mine, _TAKEN)
            for read in mine.values():
                read.set_exception(error)
            raise
        except BaseException:
            # A thread may go on to write there: these shards are never read again.
            for read in mine.values():
                read.set_exception(RegistryError(_INTERRUPTED))
            raise
        self._end(mine, _VERIFIED)
        for read in mine.values():
            read.set_result(None)
        for read in others:
            read.result()

    def _end(self, shards: Iterable[_Shard], state: int) -> None:
        with self._lock:
            for shard in shards:
                name, number = shard
                self._state[name][number] = state
                self._verified += self._size(shard) if state == _VERIFIED else 0
                del self._reads[shard]

    def _claim(
        self, ranges: Iterable[tuple[str, Span]]
    ) -> tuple[dict[_Shard, Future[None]], list[Future[None]]]:
        """Return the shards that nobody read so far, and the reads of the others."""
        mine: dict[_Shard, Future[None]] = {}
        others = []
        with self._lock:
            for shard in self._covering(ranges):
                if shard in self._reads:
                    others.append(self._reads[shard])
                elif self._stands(shard) != _VERIFIED:
                    mine[shard] = Future()
            if mine and self._closed:
                raise RegistryError(_CLOSED.format(sorted(mine)[0][0]))
            fresh = (shard for shard in mine if self._stands(shard) != _TAKEN)
            more = sum(map(self._size, fresh))
            if self._taken + more > self._max_bytes:
                raise RegistryError(
                    f"{self._taken + more} bytes of weights are needed in memory, more "
                    f"than the limit of {self._max_bytes}"
                )
            self._taken += more
            self._reads |= mine
        return mine, others

    def _covering(self, ranges: Iterable[tuple[str, Span]]) -> list[_Shard]:
        found: dict[_Shard, None] = {}
        for name, (start, end) in ranges:
            step = self._manifest.serialization.shard_size or len(self._views[name])
            if start < end:
                for number in range(start // step, (end - 1) // step + 1):
                    found[name, number] = None
        return sorted(found)

    def _stands(self, shard: _Shard) -> int:
        return self._state[shard[0]][shard[1]]

    def _size(self, shard: _Shard) -> int:
        start, end = self._spans[shard[0]][shard[1]]
        return end - start

    def _read(self, shards: list[_Shard]) -> None:
        """Read shards into their places; raise VerificationError at a wrong one."""
        # Little may be asked for at once, and is to keep all cores busy even so.
        least = sum(map(self._size, shards)) // (os.cpu_count() or 1)
        pieces = [
            Piece(name, self._views[name], share)
            for name, run in _runs(shards)
            for share in shares((self._spans[name][number] for number in run), least)
        ]
        if not pieces:
            return
        how = self._manifest.serialization
        for piece, digests in zip(
            pieces, read_pieces(self._open, pieces, how), strict=True
        ):
            for span, digest in zip(piece.spans, digests, strict=True):
                check_shard(self._manifest, piece.name, span, digest)


def check_shard(manifest: Manifest, name: str, span: Span, digest: str) -> None:
    """Raise VerificationError unless a shard's digest (hex) is the signed one."""
    how, signed = manifest.serialization, manifest.files[name]
    number = span[0] // how.shard_size if how.shard_size else 0
    if not hmac.compare_digest(digest, signed.digests[number]):
        raise VerificationError(
            f"{name!r} was changed after signing: "
            + difference(manifest, name, span, digest, signed.digests[number])
        )


def difference(
    manifest: Manifest, name: str, span: Span, found: str, expected: str
) -> str:
    """Say in what two digests of a file, or of a shard of it, differ."""
    hash_type = manifest.serialization.hash_type
    title = hash_type.replace("sha", "SHA-").replace("blake", "BLAKE")
    sharded = manifest.files[name].size is not None
    what = (
        f"the {title} of its bytes {span[0]} to {span[1]}"
        if sharded
        else f"its {title}"
    )
    return f"{what} is {found}, signed was {expected}"


def _runs(shards: Iterable[_Shard]) -> list[tuple[str, list[int]]]:
    """Put sorted shards that adjoin each other together."""
    runs: list[tuple[str, list[int]]] = []
    for name, number in shards:
        if runs and runs[-1][0] == name and runs[-1][1][-1] == number - 1:
            runs[-1][1].append(number)
        else:
            runs.append((name, [number]))
    return runs
