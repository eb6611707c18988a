"""A signed directory as a registry of one model.

Beside the model's files lie model.sig, release.sig and attestations/NAME.sig.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ztserve.artifacts.registry.files import (
    FileReader,
    list_files,
    open_file,
    read_file,
)
from ztserve.artifacts.registry.protocol import Resolved
from ztserve.artifacts.statements.attestation import (
    MAX_ATTESTATION_BYTES,
    MAX_ATTESTATIONS,
    is_attestation,
)
from ztserve.artifacts.statements.envelope import MAX_BUNDLE_BYTES, parse_envelope
from ztserve.artifacts.statements.manifest import (
    RELEASE_FILE,
    SIGNATURE_FILE,
    is_statement,
)
from ztserve.artifacts.statements.release import parse_release
from ztserve.errors import RegistryError, VerificationError
from ztserve.types import ModelRef


def model_files(root: Path) -> dict[str, int]:
    """List every file of a directory but signatures and attestations, name to size."""
    found = list_files(root)
    return {name: n for name, n in found.items() if not is_statement(name)}


class DirectoryRegistry:
    """Read-only access to one signed directory.

    It has no aliases and one version: whatever alias is asked for means that one.
    `staged`: statements by file, yet to be written, in place of those in it.
    """

    def __init__(
        self, root: Path, staged: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        self._root = root
        self._staged = staged
        self._check_there()

    def __repr__(self) -> str:
        return f"DirectoryRegistry({str(self._root)!r})"

    def _check_there(self) -> None:
        """Tell an absent or empty directory, as of a mount to come, from a bad one."""
        try:
            there = any(self._root.iterdir())
        except OSError as error:
            raise RegistryError(
                f"there is no registry or model directory at {self._root} "
                f"({error.strerror}); `ztserve publish` makes one"
            ) from error
        if not there:
            raise RegistryError(
                f"{self._root} is empty: publish a model there with `ztserve publish`"
            )

    def resolve(self, ref: ModelRef) -> Resolved:
        """Return what the directory's own signature files claim to be."""
        envelope = parse_envelope(self.read_signature(), what=SIGNATURE_FILE)
        try:
            raw = self._statement(RELEASE_FILE, MAX_BUNDLE_BYTES)
        except FileNotFoundError:
            return Resolved(ref.name, ref.version or "", envelope.digest)
        release = parse_release(parse_envelope(raw, what=RELEASE_FILE))
        return Resolved(release.name, release.version, envelope.digest)

    def signature(self, model: Resolved) -> bytes:
        """Return model.sig; VerificationError if there is none."""
        return self.read_signature()

    def read_signature(self) -> bytes:
        """Return model.sig; VerificationError if there is none."""
        try:
            return read_file(self._root, SIGNATURE_FILE, limit=MAX_BUNDLE_BYTES)
        except FileNotFoundError as error:
            self._check_there()
            raise VerificationError(
                f"{self._root} is not signed: it has no {SIGNATURE_FILE}; sign it with "
                "`ztserve sign`"
            ) from error

    def release(self, model: Resolved) -> bytes:
        """Return release.sig; VerificationError if there is none."""
        try:
            return self._statement(RELEASE_FILE, MAX_BUNDLE_BYTES)
        except FileNotFoundError as error:
            raise VerificationError(
                f"{self._root} is not released as {model.name!r}: it has no "
                f"{RELEASE_FILE} by a deployer; publish it with `ztserve publish`"
            ) from error

    def attestations(self, model: Resolved) -> Mapping[str, bytes]:
        """Return attestations/NAME.sig by NAME; RegistryError where they are many."""
        there = {*list_files(self._root), *self._staged}
        names = sorted(filter(is_attestation, there))
        if len(names) > MAX_ATTESTATIONS:
            raise RegistryError(
                f"{self._root} has {len(names)} attestations; the limit is "
                f"{MAX_ATTESTATIONS}: remove those that nobody requires"
            )
        return {
            name.partition("/")[2].removesuffix(".sig"): self._attestation(name)
            for name in names
        }

    def _attestation(self, name: str) -> bytes:
        try:
            return self._statement(name, MAX_ATTESTATION_BYTES)
        except FileNotFoundError as error:
            raise RegistryError(f"{self._root}: {name!r} vanished") from error

    def _statement(self, name: str, limit: int) -> bytes:
        if name in self._staged:
            return self._staged[name]
        return read_file(self._root, name, limit=limit)

    def files(self, model: Resolved) -> Mapping[str, int]:
        """List every file of the directory but signatures and attestations."""
        return model_files(self._root)

    def open(self, model: Resolved, name: str) -> FileReader:
        """Open one of its files."""
        try:
            return open_file(self._root, name)
        except FileNotFoundError as error:
            raise VerificationError(f"{self._root}: {name!r} vanished") from error
