"""Who may be at the other end of a connection, judged anew for each call."""

from dataclasses import dataclass

from ztserve import types
from ztserve.errors import Unauthenticated
from ztserve.identity import Identity, Quarantine, SpiffeId
from ztserve.transport.tls import Ends
from ztserve.types import Peer

PUBLIC = "the peer's identity could not be verified"


@dataclass(slots=True)
class Visitor:
    """The other end of a connection, and what was last found of it."""

    chain: tuple[bytes, ...] = ()
    peer: Peer | None = None
    judged_by: Identity | None = None
    """The state of ours by whose bundles it was judged."""


class Credentials:
    """Judges callers by what holds at this moment: time, bundles, quarantine."""

    def __init__(self, ends: Ends, quarantine: Quarantine | None) -> None:
        self._ends = ends
        self._quarantine = quarantine

    @property
    def id(self) -> SpiffeId:
        """Our own SPIFFE ID. Raises Unavailable where we have no valid identity."""
        return self._ends.identity.svid.id

    def check(self, peer: Peer) -> None:
        """Raise Unauthenticated for one in quarantine, Unavailable without a list."""
        if self._quarantine is not None:
            self._quarantine.check(peer)

    def peer(self, visitor: Visitor) -> Peer:
        """Return who is at the other end of a connection, judged at this moment.

        Raises Unauthenticated where that does not hold or is in quarantine,
        Unavailable where we have no valid identity of our own, or no usable list.
        """
        identity = self._ends.identity
        if visitor.judged_by is not identity:
            visitor.peer = self._ends.judge(visitor.chain)
            visitor.judged_by = identity
        peer = visitor.peer
        if peer is None or not peer.not_before <= types.now() <= peer.not_after:
            raise Unauthenticated(PUBLIC, "the peer's SVID is expired")
        self.check(peer)
        return peer
