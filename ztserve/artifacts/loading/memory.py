"""Whose memory a model's files come to lie in, and who hashes them there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ztserve.artifacts.loading.buffers import Buffer, read_all
from ztserve.artifacts.loading.progress import Meter
from ztserve.artifacts.registry.protocol import Reader
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.types import ModelRef


@dataclass(frozen=True, slots=True)
class Wanted:
    """The files of one model, whose statements hold."""

    ref: ModelRef
    """Fixed to the digest of the manifest."""
    sizes: Mapping[str, int]
    """All files by name, in bytes, as the registry lists them."""
    serialization: Serialization
    """What is hashed of each."""
    open: Callable[[str], Reader]
    max_bytes: int | None = None
    """Most bytes of memory; None: the machine's."""
    meter: Meter | None = None
    """Counts what is read by this process."""


class Memory(Protocol):
    """Gets the wanted files into memory that nobody changes behind our back."""

    def fill(self, wanted: Wanted) -> Mapping[str, Buffer]:
        """Return all of them, with the digests of the very memory that is returned.

        Raises RegistryError, VerificationError, or what the registry's files raise.
        """


class PrivateMemory:
    """Memory of this process alone: read once and hashed here."""

    def fill(self, wanted: Wanted) -> Mapping[str, Buffer]:
        """Return the files; raises as `buffers.read_all` does."""
        return read_all(
            wanted.open,
            wanted.sizes,
            serialization=wanted.serialization,
            max_bytes=wanted.max_bytes,
            meter=wanted.meter,
        )
