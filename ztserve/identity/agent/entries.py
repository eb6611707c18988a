"""Registration entries: who may have which SPIFFE ID.

::

    [[entry]]
    spiffe_id = "spiffe://dev.ztserve.internal/ns/ml-inference/sa/digits"
    selectors = ["unix:uid:1000", "ray:deployment:Digits"]
    ttl_s = 900                          # of its SVIDs; default: the agent's
    hint = "internal"                    # default: none
    federates_with = ["b.example"]       # whose bundles go with it; default: nobody's
    admin = false                        # may steer the agent; never a Ray worker

An entry applies where all of its selectors hold (`selectors`), and to processes of the
agent's own uid unless it names another. Of several that apply, the first is the
default identity. ``entry = []`` grants nothing to anybody.
"""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from ztserve.errors import ConfigError, IdentityError
from ztserve.identity.agent.attestation import Process
from ztserve.identity.agent.registration import Grant
from ztserve.identity.agent.selectors import Selectors, check_selector, kind
from ztserve.identity.authority.development import MAX_TTL_S, MIN_TTL_S
from ztserve.identity.spiffe_id import SpiffeId, trust_domain_name, workload_id

T = TypeVar("T")
_Table: TypeAlias = Mapping[str, object]

MAX_BYTES = 256 * 1024
MAX_ENTRIES = 1024
MAX_SELECTORS = 16
MAX_FEDERATED = 63
MAX_HINT_CHARACTERS = 128

_KEYS = ("spiffe_id", "selectors", "ttl_s", "hint", "federates_with", "admin")


@dataclass(frozen=True, slots=True)
class Entry:
    """One registration entry: what it grants, and to whom."""

    grant: Grant
    selectors: frozenset[str]

    def applies(self, process: Process, holding: frozenset[str], uid: int) -> bool:
        """Return whether it applies to `process`, of which `holding` is true.

        `uid` is whose processes it is for if it names none.
        """
        return self.selectors <= holding and self._is_for(process, uid)

    def may_apply(self, process: Process, holding: frozenset[str], uid: int) -> bool:
        """Return whether it applies to `process` if all its ``ray:`` selectors hold."""
        others = {one for one in self.selectors if not one.startswith("ray:")}
        return others <= holding and self._is_for(process, uid)

    def _is_for(self, process: Process, uid: int) -> bool:
        names_uid = any(kind(selector) == "unix:uid" for selector in self.selectors)
        return names_uid or process.uid == uid


def applicable(
    entries: Iterable[Entry], process: Process, selectors: Selectors, uid: int
) -> tuple[Grant, ...]:
    """Return what `entries` grant to `process`, each ID once: by its first entry.

    Raises IdentityError if the process has ended, CannotTell if it cannot be judged.
    """
    entries = tuple(entries)
    kinds = {kind(selector) for entry in entries for selector in entry.selectors}
    ray = {name for name in kinds if name.startswith("ray:")}
    holding = selectors.of(process, kinds - ray)
    # Ray may be away: that must not hide that no entry can apply.
    entries = tuple(e for e in entries if e.may_apply(process, holding, uid))
    ray = {kind(one) for e in entries for one in e.selectors} & ray
    if ray:
        holding |= selectors.of(process, ray)
    grants: dict[SpiffeId, Grant] = {}
    for entry in entries:
        if entry.applies(process, holding, uid):
            grants.setdefault(entry.grant.spiffe_id, entry.grant)
    return tuple(grants.values())


def parse_entries(data: bytes, trust_domain: str) -> tuple[Entry, ...]:
    """Return the entries in the text of a file, in its order.

    Raises ConfigError for whatever is not understood: an unknown key or selector, an
    ID of another trust domain, over 256 KiB or 1024 entries.
    """
    if len(data) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES} bytes")
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"is not valid TOML: {error!s:.200}") from error
    # Required also where it is empty: a file that an editor cut short grants nothing
    # to anybody, and nobody meant that.
    tables = document.pop("entry", None)
    if document or not isinstance(tables, list):
        unknown = ", ".join(map(repr, document)) or "no entry"
        raise ConfigError(f"expected [[entry]] tables, or entry = []; got {unknown}")
    if len(tables) > MAX_ENTRIES:
        raise ConfigError(f"{len(tables)} entries, at most {MAX_ENTRIES} are allowed")
    return tuple(
        _entry(table, f"entry {number}", trust_domain)
        for number, table in enumerate(tables, 1)
    )


def _entry(table: object, where: str, trust_domain: str) -> Entry:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table")
    for key in table:
        if key not in _KEYS:
            raise ConfigError(
                f"{where}: {key!r} is not a known key; expected {', '.join(_KEYS)}"
            )
    try:
        spiffe_id = workload_id(_value(table, "spiffe_id", str, where))
        selectors = _texts(table, "selectors", MAX_SELECTORS, check_selector, where)
        federates_with = _texts(
            table, "federates_with", MAX_FEDERATED, trust_domain_name, where
        )
    except IdentityError as error:
        raise ConfigError(f"{where}: {error}") from error
    if spiffe_id.trust_domain != trust_domain:
        raise ConfigError(
            f"{where}: {spiffe_id} is not of the trust domain {trust_domain}"
        )
    if not selectors:
        raise ConfigError(f"{where}: without selectors it would apply to everybody")
    grant = Grant(
        spiffe_id,
        ttl_s=_ttl_s(table, where),
        hint=_hint(table, where),
        federates_with=federates_with,
        admin=_value(table, "admin", bool, where, default=False),
    )
    return Entry(grant, selectors)


def _value(
    table: _Table, key: str, type_: type[T], where: str, default: T | None = None
) -> T:
    value = table.get(key, default)
    if not isinstance(value, type_):
        raise ConfigError(f"{where}: {key}: expected {type_.__name__}, got {value!r}")
    return value


def _texts(
    table: _Table, key: str, most: int, check: Callable[[str], str], where: str
) -> frozenset[str]:
    items: list[object] = _value(table, key, list, where, default=[])
    if len(items) > most:
        raise ConfigError(f"{where}: {key}: {len(items)} texts, at most {most}")
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) < len(items):
        raise ConfigError(f"{where}: {key}: expected texts, got {items!r:.200}")
    return frozenset(check(text) for text in texts)


def _ttl_s(table: _Table, where: str) -> float | None:
    value = table.get("ttl_s")
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not MIN_TTL_S <= value <= MAX_TTL_S
    ):
        raise ConfigError(
            f"{where}: ttl_s: expected {MIN_TTL_S:g} to {MAX_TTL_S:g} seconds, "
            f"got {value!r}"
        )
    return float(value)


def _hint(table: _Table, where: str) -> str:
    hint = _value(table, "hint", str, where, default="")
    if len(hint) > MAX_HINT_CHARACTERS or not hint.isprintable():
        raise ConfigError(
            f"{where}: hint: expected at most {MAX_HINT_CHARACTERS} characters that "
            "can be printed"
        )
    return hint
