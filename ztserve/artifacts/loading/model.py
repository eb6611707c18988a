"""A verified model: the only way from signed bytes to weights."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ztserve.artifacts.loading.header import DTYPES, Extent, Layout
from ztserve.artifacts.loading.judging import Evidence, Judged
from ztserve.errors import VerificationError

if TYPE_CHECKING:
    import torch


class VerifiedModel:
    """The files of one model, each byte of which was signed. Made by `verify_model`.

    Holds the very memory that was hashed; stays in the process that verified it.
    """

    def __init__(
        self,
        *,
        name: str,
        judged: Judged,
        evidence: Evidence,
        files: Mapping[str, memoryview],
        layouts: Mapping[str, Layout],
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
        return tuple(sorted(self._files))

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
        for file, layout in sorted(self._layouts.items()):
            for name, extent in layout.items():
                if prefix is None or name.startswith(prefix):
                    tensor = _tensor(self._files[file], extent)
                    yield name, tensor if device is None else tensor.to(device)

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


def _tensor(file: memoryview, extent: Extent) -> "torch.Tensor":
    import torch

    title, width = DTYPES[extent.dtype]
    dtype: torch.dtype = getattr(torch, title)
    size = extent.end - extent.start
    if size == 0:
        return torch.empty(extent.shape, dtype=dtype)
    flat = torch.frombuffer(file, dtype=torch.uint8, count=size, offset=extent.start)
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
