"""SVIDs that SPIRE issues and this node's agent hands on.

SPIRE's agent tells processes apart by uid, program or container; to it all replicas of
a node look alike. Ours knows them by Ray's actor table. So it attests a process and
asks SPIRE, by its Delegated Identity API, what the *selectors* of that process are
entitled to: the entries are those of SPIRE's server, and may say ``ray:deployment``.

SPIRE lets whoever has the ID of an authorized delegate ask for anybody. That is **a
boundary** where our agent runs as a uid of its own; where Ray's workers share its uid,
they could ask as it does, and all here is **hygiene**. SPIRE keeps one SVID for each
entry and node, so processes of one entry share a key; with an entry for each
deployment, deployments do not.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.agent.attestation import CannotTell, Process, this_process
from ztserve.identity.agent.registration import Grant
from ztserve.identity.agent.selectors import KINDS, Further, Selectors
from ztserve.identity.agent.spire import (
    ASK_S,
    JWT_BUNDLES,
    X509_BUNDLES,
    Spire,
    read_bundles,
    read_selectors,
    read_svid,
    read_token,
)
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.feed import Feed
from ztserve.identity.jwt.svid import JwtSvid
from ztserve.identity.source import FixedSource, check_valid
from ztserve.identity.spiffe_id import SCHEME, SpiffeId, trust_domain_name, workload_id
from ztserve.identity.subscribers import OnEvent, Subscribers, tell
from ztserve.identity.svid import Identity, Svid
from ztserve.identity.v1 import delegated_identity_pb2 as messages

_LOG = logging.getLogger(__name__)

MAX_SVIDS = 64
"""Of one process."""
MAX_SUBSCRIPTIONS = 512
"""Different sets of selectors that are followed at once."""


@dataclass
class _Subscription:
    """What SPIRE says of the processes that have the same selectors."""

    selectors: list[messages.Selector]
    processes: set[Process] = field(default_factory=set)
    answer: messages.SvidsResponse | None = None
    svids: Mapping[SpiffeId, Svid] = field(default_factory=dict)
    """Those of the answer that hold, in its order."""
    grants: tuple[Grant, ...] = ()
    feed: "Feed[messages.SvidsResponse]" = field(init=False)


class Delegation:
    """SPIRE's identities, for `Agent` to hand on: its authority, entries and bundles.

    Args:
        socket: SPIRE's admin endpoint, ``unix:///path`` (its `admin_socket_path`).
        trust_domain: ours; an SVID of another one is not handed on.
        further: tells the ``ray:`` selectors of a process, as for entries.
        timeout_s: longest wait for SPIRE's bundles at the start.
        on_event: told of an SVID that is not handed on, and why.
        clock: the time, for tests.

    What SPIRE sends is judged as any peer would judge it. It is held through an outage
    until it expires; what SPIRE withdraws is gone at once, and so is everything when
    it says that this agent is no delegate. Raises IdentityError where no bundle comes.

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
        self._on_event = on_event
        self._selectors = Selectors(further)
        self._subscribers = Subscribers()
        self.subscribe = self._subscribers.subscribe
        self._followed: dict[frozenset[str], _Subscription] = {}
        self._sent: dict[str, Mapping[str, bytes]] = {X509_BUNDLES: {}, JWT_BUNDLES: {}}
        self._bundles: Mapping[str, TrustBundle] = {}
        self._denied = ""
        self._following = threading.Lock()
        self._judging = threading.Lock()
        self._spire = Spire(socket)
        self._feeds = [self._bundle_feed(X509_BUNDLES), self._bundle_feed(JWT_BUNDLES)]
        end = time.monotonic() + timeout_s
        for feed in self._feeds:
            feed.heard.wait(max(0.0, end - time.monotonic()))
        if self._denied or self.trust_domain not in self._bundles:
            self.close()
            raise IdentityError(
                f"no trust bundle of {self.trust_domain} from SPIRE at {socket}: "
                f"{self._denied or self._feeds[0].problem}"
            )

    def close(self) -> None:
        """Follow no more and forget the keys. May be called again."""
        with self._following:
            followed = [*self._followed.values()]
            self._followed.clear()
        for feed in self._feeds:
            feed.close()
        for one in followed:
            one.feed.close()
        self._spire.close()

    # --- its authority ----------------------------------------------------------

    @property
    def bundle(self) -> tuple[bytes, ...]:
        """The roots of our trust domain (DER)."""
        return self.trust_bundle().x509_authorities

    def trust_bundle(self) -> TrustBundle:
        """Return what others need to verify our SVIDs."""
        return self._bundles[self.trust_domain]

    def issue(self, spiffe_id: str, *, ttl_s: float = 0.0) -> Svid:
        """Return SPIRE's present SVID of `spiffe_id`.

        How long it lives, SPIRE decides; `ttl_s` is there because an `Authority` has
        it. Raises IdentityError where SPIRE gives it to no process of this node, or it
        has expired.
        """
        subject = workload_id(spiffe_id)
        svid = self._holding(subject).svids[subject]
        check_valid(svid, now=self._clock())
        return svid

    def issue_jwt(
        self,
        spiffe_id: str,
        audience: Sequence[str],
        *,
        ttl_s: float = 0.0,
    ) -> JwtSvid:
        """Return a JWT-SVID of `spiffe_id` for the one `audience`, from SPIRE.

        How long it lives, SPIRE decides. Raises IdentityError, CannotTell where SPIRE
        does not answer.
        """
        subject = workload_id(spiffe_id)
        if len(audience) != 1:  # nobody of ours would believe it (`verify_jwt_svid`)
            raise IdentityError("a JWT-SVID for several audiences is not handed on")
        token = self._spire.token(
            subject, audience[0], self._holding(subject).selectors
        )
        bundle = self.trust_bundle()
        return read_token(token, subject, audience[0], bundle, now=self._clock())

    def own(self, spiffe_id: SpiffeId) -> FixedSource:
        """Return this process's own identity as `spiffe_id`, as SPIRE gives it now.

        Raises IdentityError where it does not.
        """
        given = [grant.spiffe_id for grant in self.grants(this_process())]
        if spiffe_id not in given:
            raise IdentityError(
                f"SPIRE at {self.socket} gives this process "
                f"{', '.join(given) or 'no identity'}, and it is to be {spiffe_id}: "
                "mend its registration entry"
            )
        roots = {self.trust_domain: self.bundle}
        return FixedSource(Identity(self.issue(spiffe_id), roots), clock=self._clock)

    # --- its registration entries -----------------------------------------------

    def grants(
        self, process: Process, only: SpiffeId | None = None
    ) -> tuple[Grant, ...]:
        """Return what SPIRE's entries give to `process`, in SPIRE's order.

        With `only`, no other ID than that.

        Raises CannotTell where SPIRE does not say, IdentityError where it lets us ask
        for nobody, or the process has ended.
        """
        subscription = self._subscription(process)
        if not subscription.feed.heard.wait(ASK_S):
            raise CannotTell(
                f"SPIRE at {self.socket} does not say who process {process.pid} is: "
                f"{subscription.feed.problem}"
            )
        if self._denied:
            raise IdentityError(
                f"SPIRE at {self.socket} does not let this agent act for others: "
                f"{self._denied}: name its SPIFFE ID in authorized_delegates"
            )
        return tuple(
            grant for grant in subscription.grants if only in (None, grant.spiffe_id)
        )

    # --- its bundles of other trust domains -------------------------------------

    def bundles(self) -> Mapping[str, TrustBundle]:
        """Return all that SPIRE sends, ours among them, by trust domain."""
        return self._bundles

    # --- whom we follow ---------------------------------------------------------

    def _subscription(self, process: Process) -> _Subscription:
        selectors = self._selectors.of(process, KINDS)
        with self._following:
            found = self._followed.get(selectors)
            if found is None or process not in found.processes:
                self._prune(process)
                found = self._followed.get(selectors) or self._follow(selectors)
                found.processes.add(process)
        return found

    def _follow(self, selectors: frozenset[str]) -> _Subscription:
        """Ask SPIRE about `selectors` from now on; called with the lock held."""
        if len(self._followed) >= MAX_SUBSCRIPTIONS:
            raise CannotTell(f"{MAX_SUBSCRIPTIONS} sets of selectors are followed")
        one = self._followed[selectors] = _Subscription(read_selectors(selectors))
        one.feed = Feed(
            lambda: self._spire.svids(one.selectors),
            take=lambda answer: self._take_svids(one, answer),
            denied=self._deny,
            name="ztserve-spire-svids",
        )
        return one

    def _prune(self, moving: Process) -> None:
        """Follow no more what only ended processes have, or had: `moving` does not."""
        for selectors, one in [*self._followed.items()]:
            one.processes = {p for p in one.processes if p != moving and _lives(p)}
            if not one.processes:
                one.feed.close()
                del self._followed[selectors]

    def _holding(self, spiffe_id: SpiffeId) -> _Subscription:
        """Return the subscription with the longest-lived SVID of `spiffe_id`."""
        with self._following:
            holding = [o for o in self._followed.values() if spiffe_id in o.svids]
        if not holding:
            raise IdentityError(f"SPIRE gives {spiffe_id} to no process of this node")
        return max(holding, key=lambda one: one.svids[spiffe_id].not_after)

    # --- the feeds' threads -----------------------------------------------------

    def _bundle_feed(self, method: str) -> "Feed[messages.BundlesResponse]":
        return Feed(
            lambda: self._spire.bundles(method),
            take=lambda answer: self._take_bundles(method, answer),
            denied=self._deny,
            name="ztserve-spire-bundles",
        )

    def _take_bundles(self, method: str, answer: messages.BundlesResponse) -> None:
        with self._judging:
            sent = {**self._sent, method: dict(answer.bundles)}
            self._bundles = read_bundles(
                self.trust_domain, sent[X509_BUNDLES], sent[JWT_BUNDLES]
            )
            self._sent, self._denied = sent, ""
            self._judge_all()
        self._subscribers.notify()

    def _take_svids(self, one: _Subscription, answer: messages.SvidsResponse) -> None:
        if len(answer.svids) > MAX_SVIDS:
            raise IdentityError(f"{len(answer.svids)} SVIDs, at most {MAX_SVIDS}")
        with self._judging:
            one.answer, self._denied = answer, ""
            self._judge(one)
        self._subscribers.notify()

    def _deny(self, problem: str) -> None:
        with self._judging:
            self._denied = problem
            self._judge_all()
        self._subscribers.notify()

    def _judge_all(self) -> None:
        with self._following:
            followed = [*self._followed.values()]
        for one in followed:
            self._judge(one)

    def _judge(self, one: _Subscription) -> None:
        """Believe of its answer what any peer would believe now."""
        svids: dict[SpiffeId, Svid] = {}
        grants: list[Grant] = []
        answer = one.answer
        if answer is not None and not self._denied:
            federates_with = frozenset(
                name.removeprefix(SCHEME) for name in answer.federates_with
            )
            for sent in answer.svids:
                try:
                    svid = read_svid(sent, self.trust_bundle(), now=self._clock())
                except IdentityError as error:
                    _LOG.error("not handed on: %s", error)
                    tell(self._on_event, "svid-refused", {"reason": str(error)})
                    continue
                if svid.id not in svids:
                    svids[svid.id] = svid
                    hint = sent.svid.hint
                    grants.append(
                        Grant(svid.id, hint=hint, federates_with=federates_with)
                    )
        one.svids, one.grants = svids, tuple(grants)


def _lives(process: Process) -> bool:
    try:
        process.check_alive()
    except IdentityError:
        return False
    return True
