"""How far the reading of a model has come."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ztserve.artifacts.statements.manifest import Manifest
from ztserve.artifacts.statements.serialization import Span

INTERVAL_S = 0.1
"""Least time between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a model's files has been read, and how much of that verified.

    Nothing of the model is reachable before all of it is, whatever this says.
    """

    read: int
    """Bytes in memory so far."""
    verified: int
    """Bytes of them whose digest is the signed one."""
    total: int
    """Bytes there are to read."""
    seconds: float
    """Since reading began."""

    @property
    def rate(self) -> float:
        """Bytes read a second."""
        return self.read / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.read / 2**30:.2f} of {self.total / 2**30:.2f} GiB read, "
            f"{self.verified / 2**30:.2f} verified, {self.rate / 2**30:.2f} GiB/s"
        )


Tell: TypeAlias = Callable[[Progress], None]


class Meter:
    """Counts what threads read and verify; tells of it on the thread that waits.

    Args:
        tell: called by `report`, every `INTERVAL_S` at most.
        manifest: what was signed.

    """

    def __init__(self, tell: Tell, manifest: Manifest) -> None:
        self._tell = tell
        self._manifest = manifest
        self._total = 0
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._read = self._verified = 0

    def begin(self, total: int) -> None:
        """Say that reading begins, and how many bytes there are to read."""
        self._total, self._began = total, time.monotonic()

    def read(self, count: int) -> None:
        """Count bytes that were read."""
        with self._lock:
            self._read += count

    def hashed(self, name: str, span: Span, digest: str) -> None:
        """Count a span of a file, if its digest is the signed one."""
        step = self._manifest.serialization.shard_size
        number = 0 if step is None else span[0] // step
        signed = self._manifest.files.get(name)
        if signed is not None and digest in signed.digests[number : number + 1]:
            with self._lock:
                self._verified += span[1] - span[0]

    def report(self) -> None:
        """Tell how far it is."""
        with self._lock:
            read, verified = self._read, self._verified
        seconds = time.monotonic() - self._began
        self._tell(Progress(read, verified, self._total, seconds))
