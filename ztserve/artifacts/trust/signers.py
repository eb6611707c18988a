"""The `[[signers]]` of a trust policy, and the strict reading of its TOML."""

import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, cast, get_args

from ztserve.artifacts.statements.keys import PublicKey, key_id, load_public_key
from ztserve.errors import ConfigError

Role: TypeAlias = Literal["trainer", "evaluator", "deployer"]
ROLES: tuple[Role, ...] = get_args(Role)
MAX_POLICY_BYTES = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Signer:
    """Someone whose signatures count, in these roles, within this window."""

    name: str
    key: PublicKey
    key_id: str
    roles: frozenset[Role]
    not_before: datetime | None = None
    not_after: datetime | None = None


@dataclass(frozen=True, slots=True)
class SignedBy:
    """Who signed a verified model, in which role."""

    name: str
    role: Role
    key_id: str

    def __str__(self) -> str:
        return f"{self.name} as {self.role} ({self.key_id})"


def read_guarded(path: Path) -> bytes:
    """Read a small file that only its owner may write; raises ConfigError."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path} may be written by group or others (mode {mode & 0o777:o}): "
            f"whoever can write it decides whom we trust; run chmod go-w {path}"
        )
    if len(raw) > MAX_POLICY_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_POLICY_BYTES} bytes")
    return raw


def load_key(text: str, folder: Path, where: str) -> PublicKey:
    """Return a key given as PEM text, or as a file beneath `folder`; ConfigError."""
    if "-----BEGIN" in text:
        return load_public_key(text.encode(), where)
    file = folder / text
    return load_public_key(read_guarded(file), f"{where} ({file})")


def parse_signers(
    entries: list[object], path: Path, *, inline: bool
) -> tuple[Signer, ...]:
    """Return the signers, at least one, names and keys unique; ConfigError.

    `inline`: only keys within the policy's own text count, not files beside it.
    """
    signers = tuple(
        _parse_signer(entry, f"{path}: [[signers]] number {number}", path, inline)
        for number, entry in enumerate(entries, 1)
    )
    if not signers:
        raise ConfigError(f"{path}: no [[signers]]: such a policy would trust nobody")
    for field in ("name", "key_id"):
        values = [getattr(signer, field) for signer in signers]
        if len(set(values)) != len(values):
            raise ConfigError(f"{path}: two [[signers]] have the same {field}")
    return signers


def _parse_signer(
    entry: object,
    where: str,
    path: Path,
    inline: bool,  # noqa: FBT001
) -> Signer:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is not a table")
    only(entry, ("name", "key", "roles", "not_before", "not_after"), where)
    name, key_text = take(entry, "name", str, where), take(entry, "key", str, where)
    if not name or not key_text:
        raise ConfigError(f"{where} needs a name and a key")
    if inline and "-----BEGIN" not in key_text:
        raise ConfigError(
            f"{where}: a policy signed under a trust root holds its keys as PEM text: "
            f"what is in the file {key_text!r} is not signed"
        )
    key = load_key(key_text, path.parent, f"{where}: the key of {name!r}")
    return Signer(
        name=name,
        key=key,
        key_id=key_id(key),
        roles=_roles(take(entry, "roles", list, where) or [], where),
        not_before=take_time(entry, "not_before", where),
        not_after=take_time(entry, "not_after", where),
    )


def _roles(values: list[object], where: str) -> frozenset[Role]:
    if not values or any(value not in ROLES for value in values):
        raise ConfigError(
            f"{where}: roles is {values!r}; expected at least one of {', '.join(ROLES)}"
        )
    return frozenset(cast("list[Role]", values))


def only(table: Mapping[str, object], allowed: Collection[str], where: str) -> None:
    """Raise ConfigError on a key that is not among the `allowed`."""
    for key in table:
        if key not in allowed:
            raise ConfigError(
                f"{where}: unknown key {key!r}; known: {', '.join(allowed)}"
            )


def take(table: Mapping[str, object], key: str, kind: type[T], where: str) -> T | None:
    """Return a key's value, None where it is absent; ConfigError on another kind."""
    value = table.get(key)
    if value is None:
        return None
    if type(value) is not kind:
        raise ConfigError(f"{where}: {key} must be of kind {kind.__name__}")
    return value


def take_time(table: Mapping[str, object], key: str, where: str) -> datetime | None:
    """Return a time that has a zone, in UTC; ConfigError on one without."""
    value = take(table, key, datetime, where)
    if value is None:
        return None
    if value.tzinfo is None:
        raise ConfigError(
            f"{where}: {key} has no time zone; write it as 2027-01-01T00:00:00Z"
        )
    return value.astimezone(UTC)
