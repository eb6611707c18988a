"""Where models come from: a registry, read only and not trusted.

Whatever a registry answers is a claim until `loader.verify_model` has checked it;
what it can do wrong at most is to be away. Six verbs, none of which writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from ztserve.errors import ConfigError, RegistryError, VerificationError
from ztserve.types import ModelRef

if TYPE_CHECKING:
    import os

    from ztserve.artifacts.registry.address import Access, RegistryUrl


class Reader(Protocol):
    """An open file of a model, read by ranges into memory of the caller's."""

    size: int
    """Its size in bytes, as far as the registry tells the truth."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset`; return the bytes read, 0 at the end."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a registry says that a reference means; nothing of it is verified."""

    name: str
    version: str
    """Empty for a directory that was not released yet."""
    digest: str
    """``sha256:<hex>`` of the manifest: the identity of the model."""

    def __post_init__(self) -> None:
        try:
            ref = self.ref
        except ConfigError as error:
            raise RegistryError(
                f"the registry answers nonsense: {error!s:.300}"
            ) from error
        if (ref.name, ref.version or "") != (self.name, self.version):
            raise RegistryError(f"the registry answers nonsense: {self.name!r:.300}")

    @property
    def ref(self) -> ModelRef:
        """The reference that is fixed to this very model; replicas get this one."""
        version = f":{self.version}" if self.version else ""
        return ModelRef(f"{self.name}{version}@{self.digest}")


def check_answered(found: Resolved, ref: ModelRef, where: str) -> None:
    """Raise VerificationError where the answer is a model of another name.

    Before it is remembered: else it would stand for that one, for all who ask after.
    """
    if found.name != ref.name:
        raise VerificationError(
            f"{where}: what it has as {ref} claims to be {found.ref}: publish it under "
            "the name of its release"
        )


class Registry(Protocol):
    """A store of signed models.

    Each verb raises RegistryError where the store is away or answers nonsense, and
    VerificationError where it answers with what can never be a signed model.
    """

    def resolve(self, ref: ModelRef) -> Resolved:
        """Say which model a name, version, alias or digest means now."""

    def signature(self, model: Resolved) -> bytes:
        """Return the bundle that signs the model's manifest."""

    def release(self, model: Resolved) -> bytes:
        """Return the bundle that signs its name and version."""

    def attestations(self, model: Resolved) -> Mapping[str, bytes]:
        """Return the bundles that speak of its manifest, by name; none is no error.

        At most MAX_ATTESTATIONS of at most MAX_ATTESTATION_BYTES each: RegistryError.
        """

    def files(self, model: Resolved) -> Mapping[str, int]:
        """List the model's files, name to size; all there are, signed or not."""

    def open(self, model: Resolved, name: str) -> Reader:
        """Open one of its files; several may be open at once, also of one file."""


def open_registry(
    source: "str | os.PathLike[str] | RegistryUrl", access: "Access | None" = None
) -> Registry:
    """Open an OCI image layout or one signed directory by its path, or a server.

    A server is named by its address; `access` is for that. Reads nothing yet beyond
    telling the two kinds of path apart; raises RegistryError where there is nothing at
    a path (now: a mount may still come), ConfigError where an address is none.
    """
    # Here, not above: these implement the protocol and import it from this module.
    from ztserve.artifacts.registry.address import Access, RegistryUrl
    from ztserve.artifacts.registry.directory import DirectoryRegistry
    from ztserve.artifacts.registry.layout import LAYOUT_FILE, LayoutRegistry

    if isinstance(source, str) and "://" in source:
        source = RegistryUrl.parse(source)
    if isinstance(source, RegistryUrl):
        return _open_server(source, access or Access())
    root = Path(source).absolute()
    try:
        is_layout = (root / LAYOUT_FILE).is_file()
    except OSError as error:
        raise RegistryError(f"{root} cannot be read: {error.strerror}") from error
    return LayoutRegistry(root) if is_layout else DirectoryRegistry(root)


def _open_server(source: "RegistryUrl", access: "Access") -> Registry:
    # Imported for servers alone: that takes longer than to borrow a local model.
    from ztserve.artifacts.registry.distribution import DistributionRegistry
    from ztserve.artifacts.registry.mlflow import MlflowRegistry

    kind = DistributionRegistry if source.kind == "oci" else MlflowRegistry
    return kind(source, access)
