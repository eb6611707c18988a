"""The file of registration entries, followed while the agent runs."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ztserve.errors import ConfigError, IdentityError, VerificationError
from ztserve.identity.agent.attestation import Process
from ztserve.identity.agent.entries import MAX_BYTES, Entry, applicable, parse_entries
from ztserve.identity.agent.registration import Grant
from ztserve.identity.agent.selectors import Selectors
from ztserve.identity.guarded_files import read_guarded
from ztserve.identity.spiffe_id import SpiffeId
from ztserve.identity.subscribers import Subscribers

_LOG = logging.getLogger(__name__)
_Stamp: TypeAlias = tuple[int, ...]

POLL_S = 0.2
"""A change is believed when two looks in a row found the same: within half a second."""


class EntryFile:
    """The entries in the file `path`, as they were when it was last in order.

    Raises ConfigError where the file cannot be read, is not ours or root's alone to
    write, or holds what is not understood. A later edit like that is refused, told to
    `told` (kind of event, what; it raises nothing) and logged; the entries before it
    stay in force. `check` is given the bytes before they are parsed, and refuses them
    by raising VerificationError.
    """

    def __init__(
        self,
        path: Path,
        trust_domain: str,
        *,
        selectors: Selectors | None = None,
        told: Callable[[str, str], None] = lambda _kind, _what: None,
        check: Callable[[bytes], object] = lambda _raw: None,
    ) -> None:
        self._path = path
        self._trust_domain = trust_domain
        self._selectors = selectors or Selectors()
        self._told = told
        self._check = check
        self._changed = Subscribers()
        self.subscribe = self._changed.subscribe
        self._stamp = self._look()
        self._entries = self._read()
        self.problem = ""
        """Why the newest edit is not in force; empty if it is."""
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._follow, name="ztserve-entries", daemon=True
        )

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries in force."""
        return self._entries

    def grants(
        self, process: Process, only: SpiffeId | None = None
    ) -> tuple[Grant, ...]:
        """Return what applies to `process`; see `entries.applicable`.

        With `only`, what grants another ID is not looked at: what an entry that is
        gone granted is withdrawn also while Ray cannot say what another asks for.
        """
        entries = (e for e in self._entries if only in (None, e.grant.spiffe_id))
        return applicable(entries, process, self._selectors, os.geteuid())

    def follow(self) -> None:
        """Take up changes from now on, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Follow the file no longer. May be called again."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _follow(self) -> None:
        seen = self._stamp
        while not self._closed.wait(POLL_S):
            now = self._look()
            if now == seen and now != self._stamp:
                self._stamp = now
                self._take()
            seen = now

    def _take(self) -> None:
        try:
            self._entries = self._read()
        except Exception as error:  # noqa: BLE001
            # Whatever it is, the next edit, perhaps a withdrawal, is still to come.
            known = isinstance(error, ConfigError | VerificationError)
            why = str(error) if known else f"{self._path}: {error!r:.200}"
            _LOG.error("%s; the entries before stay in force", why)
            self.problem = why
            self._tell("entries-refused", why)
            return
        self.problem = ""
        self._changed.notify()
        self._tell("entries-loaded", f"{self._path}: {len(self._entries)} entries")

    def _tell(self, kind: str, what: str) -> None:
        try:
            self._told(kind, what)
        except Exception:  # noqa: BLE001
            _LOG.exception("%s could not be told", kind)

    def _look(self) -> _Stamp:
        try:
            found = self._path.stat()
        except OSError as error:
            return (error.errno or 0,)
        return (
            found.st_dev,
            found.st_ino,
            found.st_mode,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
        )

    def _read(self) -> tuple[Entry, ...]:
        try:
            data = read_guarded(self._path, MAX_BYTES, secret=False)
        except IdentityError as error:
            raise ConfigError(f"registration entries: {error}") from error
        self._check(data)
        try:
            return parse_entries(data, self._trust_domain)
        except (ConfigError, ValueError) as error:  # of an integer too long to show
            raise ConfigError(f"{self._path}: {error}") from error
