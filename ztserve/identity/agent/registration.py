"""Which process has which ID: registered once, or named by an entry, and no other.

One rule holds whatever the entries say: no descendant of the workers' parent gets an
ID of a local process (gateway, door, developer) or an admin's. That, and that a
registration happens once, is hygiene between processes of one uid (`attestation`).
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ztserve.errors import IdentityError
from ztserve.identity.agent.attestation import FalseClaim, Process, Rules
from ztserve.identity.spiffe_id import SpiffeId, workload_id

Check: TypeAlias = Callable[[Process, SpiffeId], None]
"""Asked before a worker's claim is believed; raises FalseClaim, or CannotTell."""

_MAX_CLAIMS = 4096


@dataclass(frozen=True, slots=True)
class Grant:
    """An ID that a process is entitled to now, and on what terms."""

    spiffe_id: SpiffeId
    ttl_s: float | None = None
    """Lifetime of its SVIDs; None: the agent's."""
    hint: str = ""
    federates_with: frozenset[str] | None = None
    """The foreign trust domains whose bundles go with it; None: all."""
    admin: bool = False


class Entitlements(Protocol):
    """What registration entries say of a process (`entries.EntryFile`)."""

    def grants(
        self, process: Process, only: SpiffeId | None = None
    ) -> tuple[Grant, ...]:
        """Return what applies to `process`, the first entry first; may be empty.

        With `only`, no other ID is of interest.
        """


class Registry:
    """What each process is entitled to. Thread-safe.

    Without `entries`, `rules` say which ID a process may register, and those in
    `admin_ids` are admins. With them, the entries alone do: a process is entitled to
    all that apply to it, or, if it registered one of these, to that one. A worker must
    have registered one, for `check` is asked then.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        entries: Entitlements | None = None,
        check: Check = lambda _process, _spiffe_id: None,
        admin_ids: tuple[str, ...] = (),
    ) -> None:
        self._rules = rules
        self._entries = entries
        self._check = check
        self._admin_ids = frozenset(workload_id(text) for text in admin_ids)
        self._claims: dict[Process, SpiffeId] = {}
        self._lock = threading.Lock()

    def register(self, process: Process, text: str) -> SpiffeId:
        """Give `process` the ID that it claims, for its whole life.

        Raises IdentityError if it may not have it, FalseClaim if it has one already,
        be it the default one or the same.
        """
        self._rules.check_uid(process)
        spiffe_id = workload_id(text)
        held = self.held(process)
        if held is not None:
            raise FalseClaim(
                f"process {process.pid} is {held} already and cannot become {spiffe_id}"
                ": an identity is registered once, before the first use"
            )
        if self._entries is None:
            self._rules.check_claim(process, spiffe_id)
        else:
            self._check_entitled(process, spiffe_id, self._entries)
        if self._rules.is_worker(process):
            self._check(process, spiffe_id)
        process.check_alive()  # what was just asked of its pid is true of it
        with self._lock:
            self._settle(process, spiffe_id)
        return spiffe_id

    def grants(self, process: Process) -> tuple[Grant, ...]:
        """Return all that `process` is entitled to now, the default identity first.

        Raises IdentityError if that is nothing, or it has ended: its connections may
        live on in a child of its, which is another process.
        """
        process.check_alive()
        if self._entries is None:
            return (self._by_rules(process),)
        held = self.held(process)
        if held is None and self._rules.is_worker(process):
            raise IdentityError(f"process {process.pid} has registered no identity")
        grants = self._entitled(process, self._entries, only=held)
        if not grants:
            raise IdentityError(
                f"no registration entry applies to process {process.pid}"
                + ("" if held is None else f" as {held}")
            )
        return grants

    def held(self, process: Process) -> SpiffeId | None:
        """Return the ID that `process` registered or was given, if any."""
        with self._lock:
            return self._claims.get(process)

    def forget(self, process: Process) -> None:
        """Take a registration back, which could not be written down."""
        with self._lock:
            self._claims.pop(process, None)

    def check_admin(self, process: Process) -> SpiffeId:
        """Return the admin's ID that `process` has.

        Raises IdentityError if it has none, FalseClaim if it is a worker.
        """
        if self._rules.is_worker(process):
            raise FalseClaim(f"process {process.pid} is a Ray worker: it may not")
        for grant in self.grants(process):
            if self._is_admin(grant):
                return grant.spiffe_id
        raise IdentityError(f"process {process.pid} is no admin of this agent")

    def living(self) -> Mapping[Process, SpiffeId]:
        """Return the IDs of the processes that still run."""
        with self._lock:
            self._prune()
            return dict(self._claims)

    def _by_rules(self, process: Process) -> Grant:
        self._rules.check_uid(process)
        held = self.held(process)
        if held is None:
            held = self._rules.default(process)
            with self._lock:
                # Whoever has used the default ID can register no other.
                held = self._claims.get(process) or self._settle(process, held)
        return Grant(held)

    def _entitled(
        self, process: Process, entries: Entitlements, only: SpiffeId | None
    ) -> tuple[Grant, ...]:
        grants = entries.grants(process, only)
        if not self._rules.is_worker(process):
            return grants
        return tuple(
            grant
            for grant in grants
            if not (self._rules.is_local(grant.spiffe_id) or self._is_admin(grant))
        )

    def _is_admin(self, grant: Grant) -> bool:
        return grant.admin or grant.spiffe_id in self._admin_ids

    def _check_entitled(
        self, process: Process, spiffe_id: SpiffeId, entries: Entitlements
    ) -> None:
        if self._rules.is_worker(process):
            self._rules.check_worker(process, spiffe_id)
        if not self._entitled(process, entries, only=spiffe_id):
            raise IdentityError(
                f"no registration entry makes process {process.pid} {spiffe_id}"
            )

    def _settle(self, process: Process, spiffe_id: SpiffeId) -> SpiffeId:
        """Note the claim; called with the lock held."""
        if process in self._claims:
            raise FalseClaim(f"process {process.pid} makes two claims at once")
        self._prune()
        if len(self._claims) >= _MAX_CLAIMS:
            raise IdentityError(f"over {_MAX_CLAIMS} processes have identities")
        self._claims[process] = spiffe_id
        return spiffe_id

    def _prune(self) -> None:
        for process in list(self._claims):
            try:
                process.check_alive()
            except IdentityError:
                del self._claims[process]
