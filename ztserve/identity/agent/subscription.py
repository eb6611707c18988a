"""What SPIRE says of processes with the same selectors, and what of it holds."""

import logging
import threading
from collections.abc import Callable, Mapping
from datetime import datetime

from ztserve.errors import IdentityError
from ztserve.identity.agent.attestation import CannotTell, Process
from ztserve.identity.agent.registration import Grant
from ztserve.identity.agent.spire import ASK_S, Spire, read_selectors, read_svid
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.feed import Feed
from ztserve.identity.spiffe_id import SCHEME, SpiffeId
from ztserve.identity.svid import Svid
from ztserve.identity.v1 import delegated_identity_pb2 as messages

_LOG = logging.getLogger(__name__)

MAX_SVIDS = 64
"""Of one process."""


class Subscription:
    """The SVIDs for `selectors`, followed until `close`.

    Each is judged by `bundle` as a peer would judge it, when it arrives and at each
    `judge`. `changed` is called when what holds is another than before, but for the
    first answer; `refused` once for each cause that an SVID does not hold. When SPIRE
    denies that we may ask, its answers are forgotten until there is a new one.
    """

    def __init__(
        self,
        spire: Spire,
        selectors: frozenset[str],
        *,
        bundle: Callable[[], TrustBundle],
        clock: Callable[[], datetime],
        changed: Callable[[], None],
        refused: Callable[[str], None],
    ) -> None:
        self.selectors = read_selectors(selectors)
        self.processes: set[Process] = set()
        """Those that have these selectors."""
        self.denied = ""
        """Why SPIRE lets us ask for nobody; empty if it does."""
        self._socket = spire.socket
        self._bundle, self._clock = bundle, clock
        self._changed, self._refused = changed, refused
        self._answer: messages.SvidsResponse | None = None
        self._held: Mapping[SpiffeId, tuple[Grant, Svid]] = {}
        self._causes: frozenset[str] = frozenset()
        self._judging = threading.Lock()
        self._feed = Feed(
            lambda: spire.svids(self.selectors),
            take=self._take,
            denied=self._deny,
            name="ztserve-spire-svids",
        )
        self.start, self.close = self._feed.start, self._feed.close

    def grants(self) -> tuple[Grant, ...]:
        """Return what SPIRE's entries give, in its order; wait for its first word.

        Raises CannotTell where there is none, IdentityError where it denies us.
        """
        if not self._feed.heard.wait(ASK_S):
            raise CannotTell(f"SPIRE at {self._socket}: {self._feed.problem}")
        if self.denied:
            raise IdentityError(denial(self._socket, self.denied))
        return tuple(grant for grant, _ in self._held.values())

    def svid(self, spiffe_id: SpiffeId) -> Svid:
        """Return the SVID of `spiffe_id`. Raises IdentityError where there is none."""
        held = self._held.get(spiffe_id)
        if held is None:
            raise IdentityError(f"SPIRE no longer gives {spiffe_id} to this process")
        return held[1]

    def judge(self) -> None:
        """Believe of the last answer what holds now."""
        with self._judging:
            before, causes = self._told(), self._causes
            self._held, self._causes = self._judged()
            changed = self._told() != before
        for cause in self._causes - causes:
            _LOG.error("not handed on: %s", cause)
            self._refused(cause)
        if changed and self._feed.heard.is_set():
            self._changed()

    def _take(self, answer: messages.SvidsResponse) -> None:
        if len(answer.svids) > MAX_SVIDS:
            raise IdentityError(f"{len(answer.svids)} SVIDs, at most {MAX_SVIDS}")
        self._answer, self.denied = answer, ""
        self.judge()

    def _deny(self, problem: str) -> None:
        # What SPIRE withdraws meanwhile, nobody tells us.
        self._answer, self.denied = None, problem
        self.judge()

    def _told(self) -> list[tuple[Grant, tuple[bytes, ...]]]:
        return [(grant, svid.chain_der) for grant, svid in self._held.values()]

    def _judged(
        self,
    ) -> tuple[Mapping[SpiffeId, tuple[Grant, Svid]], frozenset[str]]:
        held: dict[SpiffeId, tuple[Grant, Svid]] = {}
        causes: set[str] = set()
        answer = self._answer
        if answer is not None:
            domains = frozenset(
                one.removeprefix(SCHEME) for one in answer.federates_with
            )
            for sent in answer.svids:
                try:
                    svid = read_svid(sent, self._bundle(), now=self._clock())
                except IdentityError as error:
                    causes.add(str(error))
                    continue
                grant = Grant(svid.id, hint=sent.svid.hint, federates_with=domains)
                held.setdefault(svid.id, (grant, svid))
        return held, frozenset(causes)


def denial(socket: str, problem: str) -> str:
    """Return what an operator needs to know where SPIRE denies us."""
    return (
        f"SPIRE at {socket} does not let this agent act for others: {problem}: name "
        "its SPIFFE ID in authorized_delegates"
    )
