"""The `[[signers]]` of a trust policy, and the strict reading of its TOML."""

import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, cast, get_args

from ztserve.artifacts.statements.keys import PublicKey, key_id, load_public_key
from ztserve.errors import ConfigError, IdentityError
from ztserve.identity.spiffe_id import SpiffeId, workload_id

Role: TypeAlias = Literal["trainer", "evaluator", "deployer"]
ROLES: tuple[Role, ...] = get_args(Role)
MAX_POLICY_BYTES = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Signer:
    """Someone whose signatures count, in these roles, within this window.

    Known by a key of its own, or by a SPIFFE ID, for which any of its SVIDs stands.
    """

    name: str
    key: PublicKey | None
    key_id: str
    """``sha256:<hex>``, or empty for a signer by SPIFFE ID."""
    roles: frozenset[Role]
    not_before: datetime | None = None
    not_after: datetime | None = None
    spiffe: SpiffeId | None = None


@dataclass(frozen=True, slots=True)
class SignedBy:
    """Who signed a verified model, in which role."""

    name: str
    role: Role
    key_id: str
    """The key that signed: the signer's own, or that of its SVID."""
    spiffe: str = ""
    """The SPIFFE ID of the SVID that signed, with its `serial` (hex)."""
    serial: str = ""
    signed_at: datetime | None = None
    """When, if a timestamp proves it, by the authority `timestamped_by`."""
    timestamped_by: str = ""

    def __str__(self) -> str:
        facts = [self.key_id]
        if self.spiffe:
            facts += [self.spiffe, f"serial {self.serial}"]
        if self.signed_at is not None:
            moment = f"{self.signed_at:%Y-%m-%dT%H:%M:%SZ}"
            facts.append(f"signed at {moment} by the clock of {self.timestamped_by}")
        return f"{self.name} as {self.role} ({', '.join(facts)})"


def read_guarded(path: Path) -> bytes:
    """Read a small regular file that only we, or root, may write; ConfigError."""
    try:
        # Not blocking: a pipe in its place would hold up whoever follows the policy.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            check_owned(path, os.fstat(descriptor))
            raw = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_POLICY_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_POLICY_BYTES} bytes")
    return raw


def check_owned(path: Path, status: os.stat_result) -> None:
    """Raise ConfigError unless a file is regular and nobody else may write it."""
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is not a regular file")
    if status.st_uid not in {0, os.geteuid()}:
        raise ConfigError(
            f"{path} belongs to uid {status.st_uid}, who can write it and so decides "
            f"whom we trust; run chown {os.geteuid()} {path}"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path} may be written by group or others "
            f"(mode {status.st_mode & 0o777:o}): "
            f"whoever can write it decides whom we trust; run chmod go-w {path}"
        )


def load_text(text: str, folder: Path, where: str, *, inline: bool) -> bytes:
    """Return PEM text, or what is in a file beneath `folder`; raises ConfigError.

    `inline`: only text, as for a policy that is signed under a trust root.
    """
    if "-----BEGIN" in text:
        return text.encode()
    if inline:
        raise ConfigError(
            f"{where}: a policy signed under a trust root holds PEM text: what is in "
            f"the file {text!r} is not signed"
        )
    return read_guarded(folder / text)


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
    for field in ("name", "key_id", "spiffe"):
        values = [value for s in signers if (value := getattr(s, field))]
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
    only(entry, ("name", "key", "spiffe", "roles", "not_before", "not_after"), where)
    name, key_text = take(entry, "name", str, where), take(entry, "key", str, where)
    spiffe = take(entry, "spiffe", str, where)
    if not name or not (key_text or spiffe):
        raise ConfigError(f"{where} needs a name and a key (or a SPIFFE ID)")
    if key_text and spiffe:
        raise ConfigError(f"{where}: {name!r} has a key and a SPIFFE ID: choose one")
    key = _key(key_text, where, path, name, inline=inline) if key_text else None
    return Signer(
        name=name,
        key=key,
        key_id=key_id(key) if key else "",
        roles=roles_of(take(entry, "roles", list, where) or [], where),
        not_before=take_time(entry, "not_before", where),
        not_after=take_time(entry, "not_after", where),
        spiffe=_spiffe(spiffe, where) if spiffe else None,
    )


def _key(text: str, where: str, path: Path, name: str, *, inline: bool) -> PublicKey:
    if inline and "-----BEGIN" not in text:
        raise ConfigError(
            f"{where}: a policy signed under a trust root holds its keys as PEM text: "
            f"what is in the file {text!r} is not signed; "
            f"`ztserve key show {path.parent / text} --role ROLE` prints the entry as "
            "it should be"
        )
    return load_key(text, path.parent, f"{where}: the key of {name!r}")


def _spiffe(text: str, where: str) -> SpiffeId:
    try:
        return workload_id(text)
    except IdentityError as error:
        raise ConfigError(f"{where}: spiffe: {error}") from error


def roles_of(values: list[object], where: str) -> frozenset[Role]:
    """Return the roles that a list names, at least one; ConfigError."""
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
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        raise ConfigError(
            f"{where}: {key} is no time of the years 1 to 9999"
        ) from error
