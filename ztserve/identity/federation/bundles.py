"""The trust bundles of other trust domains, fetched and kept current.

SPIFFE Federation, sections 4.2 and 6: each bundle is held under the one trust domain
that the relationship names, never merged with another's; it is asked for again at its
refresh hint; a poll that fails changes nothing; a relationship that ends takes its
bundle with it.
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Self

from ztserve.errors import ConfigError, IdentityError
from ztserve.identity.bundle import TrustBundle, newer
from ztserve.identity.federation.fetch import Fetcher
from ztserve.identity.federation.relationship import (
    Relationship,
    checked_relationships,
    read_bundle_file,
)
from ztserve.identity.guarded_files import MissingFileError
from ztserve.identity.spiffe_id import trust_domain_name
from ztserve.identity.subscribers import OnEvent, Subscribers, tell

_LOG = logging.getLogger(__name__)

INTERVAL_S = 300.0
"""Between polls where a bundle has no refresh hint (section 4.1)."""
BOUNDS_S = (10.0, 3600.0)
"""Whatever a bundle's refresh hint says."""
FILE_INTERVAL_S = 0.25


@dataclass(slots=True, eq=False)
class _Link:
    """A relationship, and what we have of it."""

    relationship: Relationship
    held: TrustBundle | None
    problem: str = ""
    fetched_at: float | None = None
    """Monotonic seconds."""
    ended: threading.Event = field(default_factory=threading.Event)
    storing: threading.Lock = field(default_factory=threading.Lock)


class Federation:
    """Holds the bundles of those trust domains that there is a relationship with.

    Args:
        relationships: with whom; see `set_relationships`.
        trust_domain: our own, whose bundle is never another's to give.
        interval_s: seconds between polls where a bundle has no refresh hint.
        bounds_s: least and most seconds between polls, whatever the hint.
        web_roots: authorities (PEM) for https_web; by default the system's.
        store: a directory of ours for fetched bundles; without it, a restart begins
            with the bootstrap bundles again, which may hold roots withdrawn since.
        on_event: is told of ``bundle-changed``, ``bundle-refused`` (a poll failed, once
            for each cause) and ``bundle-dropped``.

    Each relationship is followed by a daemon thread of its own, so that a slow endpoint
    holds up no other. Raises ConfigError and IdentityError as `set_relationships` does.

    """

    def __init__(
        self,
        relationships: Iterable[Relationship],
        *,
        trust_domain: str,
        interval_s: float = INTERVAL_S,
        bounds_s: tuple[float, float] = BOUNDS_S,
        web_roots: str | None = None,
        store: Path | None = None,
        on_event: OnEvent = lambda *_: None,
    ) -> None:
        self.problem = ""
        """Why the newest edit of the relationships is not in force; empty if it is."""
        self._own = trust_domain_name(trust_domain)
        self._interval_s = interval_s
        self._bounds_s = bounds_s
        self._fetcher = Fetcher(web_roots)
        self._store = store
        self._on_event = on_event
        self._links: dict[str, _Link] = {}
        self._subscribers = Subscribers()
        self._setting = threading.RLock()
        self._lock = threading.Lock()
        self.set_relationships(relationships)

    def bundles(self) -> Mapping[str, TrustBundle]:
        """Return the bundles held now, each under its trust domain's name."""
        with self._lock:
            return MappingProxyType(
                {
                    name: link.held
                    for name, link in self._links.items()
                    if link.held is not None
                }
            )

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each change of `bundles`; return how to end it.

        It is called on the thread that changed them and should return at once.
        """
        return self._subscribers.subscribe(callback)

    def set_relationships(self, relationships: Iterable[Relationship]) -> None:
        """Have exactly these relationships from now on.

        One that is no longer there ends: its bundle is gone when this returns. One that
        is unchanged goes on with the bundle that it has. Raises ConfigError for one
        with our own trust domain or two with the same, IdentityError for a bootstrap
        bundle or file that cannot be read; then nothing changes.
        """
        wanted = checked_relationships(relationships)
        if any(one.trust_domain == self._own for one in wanted):
            raise ConfigError(
                f"federation with {self._own!r}: that is our own trust domain"
            )
        with self._setting:
            before, links = self._links, dict[str, _Link]()
            for one in wanted:
                name, link = one.trust_domain, before.get(one.trust_domain)
                if link is None or link.relationship != one:
                    # Begun again with other parameters: all is begun again (6.3).
                    link = _Link(one, self._first_bundle(one, stored=link is None))
                links[name] = link
            ended = [one for name, one in before.items() if links.get(name) is not one]
            begun = [one for name, one in links.items() if before.get(name) is not one]
            with self._lock:
                self._links = links
                for link in ended:
                    link.ended.set()
            for link in ended:
                self._forget(link)
            for link in begun:
                name = f"ztserve-federation-{link.relationship.trust_domain}"
                threading.Thread(
                    target=self._follow, args=(link,), name=name, daemon=True
                ).start()
        if ended or begun:
            self._subscribers.notify()

    def status(self) -> list[dict[str, object]]:
        """Return what an operator wants to know of each relationship."""
        with self._lock:
            links = list(self._links.values())
        return [
            {
                "trust_domain": link.relationship.trust_domain,
                "profile": link.relationship.profile,
                "sequence": link.held and link.held.sequence,
                "age_s": None
                if link.fetched_at is None
                else round(time.monotonic() - link.fetched_at, 3),
                "problem": link.problem,
            }
            for link in links
        ]

    def close(self) -> None:
        """Follow nobody any more; what is held stays. May be called again."""
        with self._lock:
            for link in self._links.values():
                link.ended.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one relationship ---------------------------------------------------------

    def _follow(self, link: _Link) -> None:
        while not link.ended.is_set():
            try:
                self._take(link, self._fetched(link.relationship))
            except MissingFileError:
                # A bundle that its owner removed is withdrawn (section 6.3).
                self._take(link, None)
            except IdentityError as error:
                self._refuse(link, str(error))
            link.ended.wait(self._pause_s(link))

    def _fetched(self, relationship: Relationship) -> TrustBundle:
        if relationship.file is not None:
            return read_bundle_file(relationship.file, relationship.trust_domain)
        voucher = self.bundles().get(relationship.endpoint_domain)
        return self._fetcher.fetch(
            relationship, () if voucher is None else voucher.x509_authorities
        )

    def _take(self, link: _Link, fetched: TrustBundle | None) -> None:
        with self._lock:
            if link.ended.is_set():  # it was ended while we fetched
                return
            held = link.held
            if held is not None and fetched is not None:
                newer(held, fetched)
            link.held, link.problem = fetched, "" if fetched else "the file is gone"
            link.fetched_at = time.monotonic()
            if fetched == held:
                return
        if fetched is not None and link.relationship.file is None:
            self._keep(link, fetched)
        name = link.relationship.trust_domain
        if fetched is None:
            _LOG.warning("federation with %s: its bundle's file is gone", name)
            self._tell("bundle-dropped", {"trust_domain": name})
        else:
            facts = {"trust_domain": name, "sequence": fetched.sequence}
            self._tell("bundle-changed", facts)
        self._subscribers.notify()

    def _refuse(self, link: _Link, problem: str) -> None:
        if problem != link.problem and not link.ended.is_set():
            _LOG.warning("%s; the bundle held stays", problem)
            name = link.relationship.trust_domain
            self._tell("bundle-refused", {"trust_domain": name, "reason": problem})
        link.problem = problem

    def _tell(self, event: str, facts: Mapping[str, object]) -> None:
        tell(self._on_event, event, facts)

    def _pause_s(self, link: _Link) -> float:
        if link.relationship.file is not None:
            return FILE_INTERVAL_S
        hint = link.held.refresh_hint_s if link.held else None
        least, most = self._bounds_s
        return min(max(hint or self._interval_s, least), most)

    # --- what outlives us -----------------------------------------------------------

    def _first_bundle(
        self, relationship: Relationship, *, stored: bool
    ) -> TrustBundle | None:
        """Return the newest of what the operator gave and what we stored."""
        name, found = relationship.trust_domain, list[TrustBundle]()
        ours = self._path(name)
        if stored and ours is not None and relationship.file is None:
            with contextlib.suppress(MissingFileError):
                found.append(read_bundle_file(ours, name))
        given = relationship.bootstrap or relationship.file
        if given is not None:
            found.append(read_bundle_file(given, name))
        return max(found, key=lambda bundle: bundle.sequence or 0, default=None)

    def _path(self, trust_domain: str) -> Path | None:
        return self._store and self._store / f"{trust_domain}.jwks"

    def _keep(self, link: _Link, bundle: TrustBundle) -> None:
        path = self._path(bundle.trust_domain)
        if path is None:
            return
        # A disk that stalls holds up this link alone, and whoever ends it.
        with link.storing:
            if link.ended.is_set():
                return  # what was forgotten stays so
            try:
                opened, written = tempfile.mkstemp(dir=path.parent)  # mode 0600
                with os.fdopen(opened, "wb") as file:
                    file.write(bundle.jwks())
                Path(written).replace(path)
            except OSError as error:
                _LOG.warning("%s: the bundle could not be stored: %s", path, error)

    def _forget(self, link: _Link) -> None:
        name = link.relationship.trust_domain
        path = self._path(name)
        with link.storing:
            try:
                if path is not None:
                    path.unlink(missing_ok=True)
            except OSError as error:
                _LOG.warning("%s: the bundle could not be forgotten: %s", path, error)
        self._tell("bundle-dropped", {"trust_domain": name})
