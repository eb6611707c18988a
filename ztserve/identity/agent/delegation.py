"""SVIDs that SPIRE issues and this node's agent hands on.

SPIRE's agent tells processes apart by uid, program or container; to it all replicas of
a node look alike. Ours knows them by Ray's actor table. So it attests a process and
asks SPIRE, by its Delegated Identity API, what the *selectors* of that process are
entitled to: the entries are those of SPIRE's server, and may say ``ray:deployment``.

SPIRE lets whoever has the ID of an authorized delegate ask for anybody. That is **a
boundary** where our agent runs as a uid of its own; where Ray's workers share its uid,
they could ask as it does, and all here is **hygiene**. SPIRE keeps one SVID for each
entry and node, so processes of one entry share a key; with an entry for each
deployment, deployments do not. SPIRE tells of a process, not of each entry, with whom
it federates.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Final

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.agent.attestation import CannotTell, Process, this_process
from ztserve.identity.agent.events import Events
from ztserve.identity.agent.registration import Grant
from ztserve.identity.agent.selectors import KINDS, Further, Selectors
from ztserve.identity.agent.spire import (
    JWT_BUNDLES,
    X509_BUNDLES,
    Spire,
    read_bundles,
    read_token,
)
from ztserve.identity.agent.subscription import Subscription, denial
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.feed import Feed
from ztserve.identity.jwt.svid import JwtSvid
from ztserve.identity.source import FixedSource, check_valid
from ztserve.identity.spiffe_id import SpiffeId, trust_domain_name
from ztserve.identity.subscribers import OnEvent, Subscribers
from ztserve.identity.svid import Identity, Svid
from ztserve.identity.v1 import delegated_identity_pb2 as messages

MAX_SUBSCRIPTIONS = 512
"""Different sets of selectors that are followed at once."""


class Delegation:
    """SPIRE's identities, for `Agent` to hand on: its authority, entries and bundles.

    Args:
        socket: SPIRE's admin endpoint, ``unix:///path`` (its `admin_socket_path`).
        trust_domain: ours; an SVID of another one is not handed on.
        further: tells the ``ray:`` selectors of a process, as for entries.
        timeout_s: longest wait for SPIRE's bundles at the start.
        on_event: told of an SVID that is not handed on, and why; floods are counted.
        clock: the time, for tests.

    What SPIRE sends is judged as any peer would judge it. It is held through an outage
    until it expires. What an answer no longer has is gone at once (an answer of over
    64 SVIDs is none); when a stream is denied, all that came by it is, and all there is
    while the bundles' are. Raises IdentityError where no bundle comes.

    """

    def __init__(
        self,
        socket: str,
        trust_domain: str,
        *,
        further: Further = lambda _process: (),
        timeout_s: float = 30.0,
        on_event: OnEvent = lambda _kind, _fields: None,
        clock: Callable[[], datetime] = types.now,
    ) -> None:
        self.trust_domain: Final = trust_domain_name(trust_domain)
        self.socket = socket
        self._clock = clock
        self._events = Events(on_event)
        self._selectors = Selectors(further)
        self._subscribers = Subscribers()
        self.subscribe = self._subscribers.subscribe
        self._followed: dict[frozenset[str], Subscription] = {}
        self._sent: dict[str, Mapping[str, bytes]] = {X509_BUNDLES: {}, JWT_BUNDLES: {}}
        self._bundles: Mapping[str, TrustBundle] = {}
        self._denied = {X509_BUNDLES: "", JWT_BUNDLES: ""}
        self._closed = False
        self._following = threading.Lock()
        self._reading = threading.Lock()
        self._spire = Spire(socket)
        self._feeds = [self._bundle_feed(X509_BUNDLES), self._bundle_feed(JWT_BUNDLES)]
        end = time.monotonic() + timeout_s
        for feed in self._feeds:
            feed.start()
        for feed in self._feeds:
            feed.heard.wait(max(0.0, end - time.monotonic()))
        ours = self._bundles.get(trust_domain)
        if self._denial or ours is None or not ours.x509_authorities:
            problem = self._denial or self._feeds[0].problem
            self.close()
            raise IdentityError(
                f"no trust bundle of {self.trust_domain} from SPIRE at {socket}: "
                f"{problem}"
            )

    def close(self) -> None:
        """Follow no more and forget the keys. May be called again."""
        with self._following:
            self._closed = True
            followed = [*self._followed.values()]
            self._followed.clear()
        for feed in self._feeds:
            feed.close()
        for one in followed:
            one.close()
        self._spire.close()
        self._events.close()

    # --- its authority ----------------------------------------------------------

    @property
    def bundle(self) -> tuple[bytes, ...]:
        """The roots of our trust domain (DER)."""
        return self.trust_bundle().x509_authorities

    def trust_bundle(self) -> TrustBundle:
        """Return what others need to verify our SVIDs."""
        return self._bundles[self.trust_domain]

    def svid(self, process: Process, spiffe_id: SpiffeId) -> Svid:
        """Return the SVID of `spiffe_id` that SPIRE gives to `process`.

        How long it lives, SPIRE decides. Raises IdentityError where there is none (any
        more), or it has expired.
        """
        svid = self._subscription(process).svid(spiffe_id)
        check_valid(svid, now=self._clock())
        return svid

    def token(
        self, process: Process, spiffe_id: SpiffeId, audience: Sequence[str]
    ) -> JwtSvid:
        """Return a JWT-SVID of `spiffe_id` for the one `audience`, as SPIRE gives it.

        Raises IdentityError, CannotTell where SPIRE does not answer.
        """
        if len(audience) != 1:  # nobody of ours would believe it (`verify_jwt_svid`)
            raise IdentityError("a JWT-SVID for several audiences is not handed on")
        subscription = self._subscription(process)
        token = self._spire.token(spiffe_id, audience[0], subscription.selectors)
        bundle = self.trust_bundle()
        return read_token(token, spiffe_id, audience[0], bundle, now=self._clock())

    def own(self, spiffe_id: SpiffeId) -> FixedSource:
        """Return this process's own identity as `spiffe_id`, as SPIRE gives it now.

        Raises IdentityError where it does not.
        """
        process = this_process()
        given = [grant.spiffe_id for grant in self.grants(process)]
        if spiffe_id not in given:
            raise IdentityError(
                f"SPIRE at {self.socket} gives this process "
                f"{', '.join(given) or 'no identity'}, and it is to be {spiffe_id}: "
                "mend its registration entry"
            )
        identity = Identity(
            self.svid(process, spiffe_id), {self.trust_domain: self.bundle}
        )
        return FixedSource(identity, clock=self._clock)

    # --- its registration entries -----------------------------------------------

    def grants(
        self, process: Process, only: SpiffeId | None = None
    ) -> tuple[Grant, ...]:
        """Return what SPIRE's entries give to `process`, in SPIRE's order.

        With `only`, no other ID than that. Raises CannotTell where SPIRE does not say,
        IdentityError where it lets us ask for nobody, or the process has ended.
        """
        grants = self._subscription(process).grants()
        if self._denial:
            raise IdentityError(denial(self.socket, self._denial))
        return tuple(grant for grant in grants if only in (None, grant.spiffe_id))

    # --- its bundles of other trust domains -------------------------------------

    def bundles(self) -> Mapping[str, TrustBundle]:
        """Return all that SPIRE sends, ours among them, by trust domain."""
        return self._bundles

    # --- whom we follow ---------------------------------------------------------

    def _subscription(self, process: Process) -> Subscription:
        selectors = self._selectors.of(process, KINDS)
        with self._following:
            found = self._followed.get(selectors)
            if found is None or process not in found.processes:
                self._prune(process)
                found = self._followed.get(selectors) or self._follow(selectors)
                found.processes.add(process)
        return found

    def _follow(self, selectors: frozenset[str]) -> Subscription:
        """Ask SPIRE about `selectors` from now on; called with the lock held."""
        if self._closed or len(self._followed) >= MAX_SUBSCRIPTIONS:
            raise CannotTell(
                f"{len(self._followed)} sets of selectors are followed, at most "
                f"{MAX_SUBSCRIPTIONS}"
            )
        try:
            one = Subscription(
                self._spire,
                selectors,
                bundle=self.trust_bundle,
                clock=self._clock,
                changed=self._subscribers.notify,
                refused=self._refused,
            )
            one.start()
        except RuntimeError as error:  # no thread could be started
            raise CannotTell(f"SPIRE cannot be asked now: {error}") from error
        self._followed[selectors] = one
        return one

    def _prune(self, moving: Process) -> None:
        """Follow no more what only ended processes have, or had: `moving` does not."""
        for selectors, one in [*self._followed.items()]:
            one.processes = {p for p in one.processes if p != moving and _lives(p)}
            if not one.processes:
                one.close()
                del self._followed[selectors]

    def _refused(self, reason: str) -> None:
        self._events.note("svid-refused", None, reason=reason)

    # --- the bundles' threads ---------------------------------------------------

    def _bundle_feed(self, method: str) -> "Feed[messages.BundlesResponse]":
        return Feed(
            lambda: self._spire.bundles(method),
            take=partial(self._take_bundles, method),
            denied=partial(self._deny, method),
            name="ztserve-spire-bundles",
        )

    @property
    def _denial(self) -> str:
        return self._denied[X509_BUNDLES] or self._denied[JWT_BUNDLES]

    def _take_bundles(self, method: str, answer: messages.BundlesResponse) -> None:
        with self._reading:
            sent = {**self._sent, method: dict(answer.bundles)}
            if sent == self._sent and not self._denied[method]:
                return
            bundles = read_bundles(
                self.trust_domain, sent[X509_BUNDLES], sent[JWT_BUNDLES]
            )
            self._sent, self._bundles = sent, bundles
            self._denied[method] = ""
        self._changed()

    def _deny(self, method: str, problem: str) -> None:
        self._denied[method] = problem
        self._changed()

    def _changed(self) -> None:
        with self._following:
            followed = [*self._followed.values()]
        for one in followed:
            one.judge()
        self._subscribers.notify()


def _lives(process: Process) -> bool:
    try:
        process.check_alive()
    except IdentityError:
        return False
    return True
