"""A verified model: the only way from signed bytes to weights."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ztserve.artifacts.loading.header import DTYPES, Extent, Layout, check_values
from ztserve.artifacts.loading.judging import Evidence, Judged
from ztserve.artifacts.loading.shards import Shards
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import VerificationError

if TYPE_CHECKING:
    import torch

_AHEAD = 256 << 20
"""Bytes of weights that a lazy model reads at once, by all cores."""


class VerifiedModel:
    """The files of one model, each byte of which was signed. Made by `verify_model`.

    Holds the very memory that was hashed; stays in the process that verified it. A
    lazy one holds only what was asked for so far; to get at weights verifies them,
    and raises VerificationError, or RegistryError, where that fails.
    """

    def __init__(
        self,
        *,
        name: str,
        judged: Judged,
        evidence: Evidence,
        files: Mapping[str, memoryview],
        layouts: Mapping[str, Layout],
        shards: Shards | None = None,
    ) -> None:
        self.name = name
        self.release = judged.release
        """The deployer's release; None where verified for purpose ``deploy``."""
        self.digest = judged.manifest.digest
        """``sha256:<hex>`` of the signed manifest: the identity of the model."""
        self.signers = judged.signers
        self.checks = judged.checks
        """What was checked of its statements, in order."""
        self.evidence = evidence
        """Its statements as the registry gave them, to be judged again."""
        self._files = files
        self._layouts = layouts
        self._homes = {
            name: file for file, layout in sorted(layouts.items()) for name in layout
        }
        self._shards = shards
        self._directory: Path | None = None

    def __repr__(self) -> str:
        return f"VerifiedModel({self.name}:{self.version}@{self.digest})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a VerifiedModel does not travel between processes: pass its ModelRef, "
            "pinned, and verify it there"
        )

    @property
    def version(self) -> str:
        """The released version; empty where it was not released yet."""
        return self.release.version if self.release else ""

    @property
    def names(self) -> tuple[str, ...]:
        """The signed files, sorted."""
        return tuple(sorted(self._files.keys() | self._layouts.keys()))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor by its name; reads nothing."""
        return {name: self._extent(name).shape for name in self._homes}

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        weights = 0 if self._shards is None else self._shards.size
        return sum(map(len, self._files.values())) + weights

    @property
    def unread(self) -> int:
        """Bytes of weights that were not read, and so not verified; 0 unless lazy."""
        return 0 if self._shards is None else self._shards.unread

    def read(self, name: str) -> bytes:
        """Return the content of a signed file other than weights.

        Raises VerificationError for any other name.
        """
        if name in self._layouts:
            raise VerificationError(f"{name} holds weights: use tensors()")
        if name not in self._files:
            raise VerificationError(
                f"{self.name} has no signed file {name!r}; it has "
                f"{', '.join(self.names)}"
            )
        return bytes(self._files[name])

    def tensors(
        self, prefix: str | None = None, device: "torch.device | str | None" = None
    ) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (name, tensor) for the weights whose name begins with `prefix`.

        Without `device` they lie over the verified memory itself: nothing is copied,
        and what is written into one is seen by all that share it.
        """
        for names in self._batches(prefix or ""):
            if self._shards is not None:
                extents = ((self._homes[name], self._extent(name)) for name in names)
                self._shards.require((file, (e.start, e.end)) for file, e in extents)
            for name in names:
                yield name, self.tensor(name, device)

    def tensor(
        self, name: str, device: "torch.device | str | None" = None
    ) -> "torch.Tensor":
        """Return one of the weights, as `tensors` does.

        Raises VerificationError for a name that none has.
        """
        return self._built(name, self._extent(name), device)

    def rows(
        self,
        name: str,
        start: int,
        stop: int,
        device: "torch.device | str | None" = None,
    ) -> "torch.Tensor":
        """Return the rows `start` to `stop` (first dimension) of one of the weights.

        What a tensor-parallel rank holds of it: rows n * rank // ranks to
        n * (rank + 1) // ranks of n. A lazy model reads the shards that cover them.
        Raises ValueError where there are no such rows.
        """
        return self._built(name, self._extent(name).rows(start, stop), device)

    def _batches(self, prefix: str) -> Iterator[list[str]]:
        """Cut the names that begin with `prefix` into lists of some `_AHEAD` bytes."""
        names: list[str] = []
        size = 0
        for name in self._homes:
            if name.startswith(prefix):
                names.append(name)
                size += self._extent(name).end - self._extent(name).start
            if size >= _AHEAD:
                yield names
                names, size = [], 0
        if names:
            yield names

    def _extent(self, name: str) -> Extent:
        if name not in self._homes:
            raise VerificationError(
                f"{self.name} has no tensor {name!r}; it has {len(self._homes)}, see "
                "shapes"
            )
        return self._layouts[self._homes[name]][name]

    def _built(
        self, name: str, extent: Extent, device: "torch.device | str | None"
    ) -> "torch.Tensor":
        tensor = _tensor(self._content(name, extent), extent)
        return tensor if device is None else tensor.to(device)

    def _content(self, name: str, extent: Extent) -> memoryview:
        """Return the bytes of a tensor, or of rows of it; all were verified."""
        file = self._homes[name]
        if self._shards is None:
            return self._files[file][extent.start : extent.end]
        content = self._shards.content(file, extent.start, extent.end)
        try:
            check_values(name, extent, content)
        except Malformed as error:
            raise VerificationError(
                f"{file} is not sound safetensors: {error}"
            ) from error
        return content

    def close(self) -> None:
        """Have weights that were not read so far be read no more: RegistryError.

        Called when loading ends, and the way to the registry with it. May be called
        again; what was read stays.
        """
        if self._shards is not None:
            self._shards.close()

    def directory(self) -> Path:
        """Return a private, read-only directory of the signed files but the weights.

        For libraries that insist on paths; it lives as long as this object. Its files
        are copies: code of the same user could change them, `read` it could not.
        """
        if self._directory is None:
            path = Path(tempfile.mkdtemp(prefix="ztserve-model-"))
            weakref.finalize(self, _remove, path)
            for name in self._files.keys() - self._layouts.keys():
                _write_private(path / name, self._files[name])
            for folder, _, _ in os.walk(path):
                Path(folder).chmod(0o500)
            self._directory = path
        return self._directory


def _tensor(content: memoryview, extent: Extent) -> "torch.Tensor":
    import torch

    title, width = DTYPES[extent.dtype]
    dtype: torch.dtype = getattr(torch, title)
    if not content:
        return torch.empty(extent.shape, dtype=dtype)
    flat = torch.frombuffer(content, dtype=torch.uint8)
    if extent.start % width:
        flat = flat.clone()  # an odd header length leaves the data unaligned
    return flat.view(dtype).view(extent.shape)


def _write_private(path: Path, content: memoryview) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
        file.write(content)


def _remove(path: Path) -> None:
    for folder, _, _ in os.walk(path):
        Path(folder).chmod(0o700)
    shutil.rmtree(path)
