"""The file that says with whom we federate, followed while we run.

::

    [[federation]]
    trust_domain = "b.example"
    profile = "https_spiffe"             # or https_web, or file
    url = "https://bundles.b.example/"
    spiffe_id = "spiffe://b.example/ns/ztserve/sa/bundle"
    bootstrap = "b.example.json"         # relative to this file

``federation = []`` ends all relationships.
"""

import logging
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Self

from ztserve.errors import ConfigError, IdentityError, VerificationError
from ztserve.identity.federation.bundles import Federation
from ztserve.identity.federation.relationship import Relationship, read_relationships
from ztserve.identity.guarded_files import read_guarded
from ztserve.identity.subscribers import OnEvent, tell

_LOG = logging.getLogger(__name__)

MAX_BYTES = 256 * 1024
POLL_S = 0.2
"""A change is believed when two looks in a row found the same: within half a second."""


class RelationshipFile:
    """The relationships in the file `path`, as they were when it was last in order.

    Raises ConfigError where the file cannot be read, can be changed by others, or holds
    what is not understood. A later edit like that, and the file's removal, is told to
    `on_event` (``relationships-refused``) and logged; what was before stays in force,
    and the edit is tried again as long as it is the newest. `check` is given the bytes
    before they are parsed, and refuses them by raising VerificationError.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_event: OnEvent = lambda _name, _facts: None,
        check: Callable[[bytes], object] = lambda _raw: None,
    ) -> None:
        self._path = path
        self._on_event = on_event
        self._check = check
        self._raw = _read(path)
        check(self._raw)
        self.relationships = _parse(self._raw, path)
        self._closed = threading.Event()

    def follow(self, federation: Federation) -> Self:
        """Have `federation` follow each change, on a daemon thread; return self."""
        threading.Thread(
            target=self._follow,
            args=(federation,),
            name="ztserve-relationships",
            daemon=True,
        ).start()
        return self

    def close(self) -> None:
        """Follow the file no longer. May be called again."""
        self._closed.set()

    def _follow(self, federation: Federation) -> None:
        seen, problem, refused = self._raw, "", False
        while not self._closed.wait(POLL_S):
            try:
                now = _read(self._path)
                settled, seen = now == seen, now
                # A refused edit is tried again: what it names may be there by now.
                if settled and (refused or now != self._raw):
                    self._raw, refused = now, True
                    self._take(federation)
                    refused = False
                if settled:
                    federation.problem = problem = ""
            except Exception as error:  # noqa: BLE001
                # Whatever it is, the next edit, perhaps a withdrawal, is still to come.
                why = _why(error, self._path)
                if why != problem:  # once for each cause
                    _LOG.error("%s; the relationships before stay in force", why)
                    tell(self._on_event, "relationships-refused", {"reason": why})
                federation.problem = problem = why

    def _take(self, federation: Federation) -> None:
        self._check(self._raw)
        relationships = _parse(self._raw, self._path)
        federation.set_relationships(relationships)
        self.relationships = relationships
        names = [one.trust_domain for one in relationships]
        tell(self._on_event, "relationships-loaded", {"trust_domains": names})


def _why(error: Exception, path: Path) -> str:
    if isinstance(error, ConfigError | IdentityError | VerificationError):
        return str(error)
    return f"{path}: {error!r:.200}"


def _read(path: Path) -> bytes:
    try:
        return read_guarded(path, MAX_BYTES, secret=False)
    except IdentityError as error:
        raise ConfigError(str(error)) from error


def _parse(raw: bytes, path: Path) -> tuple[Relationship, ...]:
    try:
        document = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error!s:.200}") from error
    # Required also where it is empty: a file that an editor cut short ends all
    # relationships, and nobody meant that.
    if set(document) != {"federation"}:
        raise ConfigError(
            f"{path}: expected [[federation]] tables, or federation = []; got "
            + (", ".join(map(repr, document)) or "nothing")
        )
    try:
        return read_relationships(document["federation"], path.parent)
    except (ConfigError, ValueError) as error:  # of an integer too long to be shown
        raise ConfigError(f"{path}: {error}") from error
