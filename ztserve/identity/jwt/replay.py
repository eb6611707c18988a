"""A memory of JWT-SVIDs that were used (JWT-SVID, section 7.1)."""

import heapq
import threading
from hashlib import sha256

from ztserve.errors import Overloaded, Unauthenticated
from ztserve.identity.jwt.svid import MAX_LIFETIME_S, JwtSvid
from ztserve.identity.peer import PUBLIC, Moment, as_datetime


class ReplayWindow:
    """Remembers the JWT-SVIDs that were used, so that none is used twice.

    A token is remembered until it expires. One that would live longer than `seconds`
    is refused, and so is a new one while `capacity` living ones are remembered: none
    is forgotten early. Thread-safe; one window serves one process.
    """

    def __init__(self, seconds: float, capacity: int) -> None:
        if not 0 < seconds <= MAX_LIFETIME_S or capacity < 1:
            raise ValueError(f"expected 0 < seconds <= {MAX_LIFETIME_S}, capacity >= 1")
        self._seconds = seconds
        self._capacity = capacity
        self._used: set[bytes] = set()
        self._by_expiry: list[tuple[float, bytes]] = []
        self._latest = 0.0
        self._lock = threading.Lock()

    def use(self, svid: JwtSvid, *, now: Moment) -> JwtSvid:
        """Return `svid`, which was verified, if this is its first use.

        Raises Unauthenticated if it is not, and Overloaded where the window is full.
        """
        digest = _digest(svid.token)
        expires_at = svid.expires_at.timestamp()
        with self._lock:
            # A clock set back must not revive what was forgotten because it expired.
            self._latest = at = max(self._latest, as_datetime(now).timestamp())
            while self._by_expiry and self._by_expiry[0][0] <= at:
                self._used.discard(heapq.heappop(self._by_expiry)[1])
            if not at < expires_at <= at + self._seconds:
                raise _refused(
                    f"{svid.id}: expires at {svid.expires_at}, expected within "
                    f"{self._seconds:g} s"
                )
            if digest in self._used:
                raise _refused(f"{svid.id}: this JWT-SVID was used before")
            if len(self._used) >= self._capacity:
                raise Overloaded(
                    "too many tokens in use",
                    f"the replay window is full: {self._capacity} living JWT-SVIDs",
                )
            self._used.add(digest)
            heapq.heappush(self._by_expiry, (expires_at, digest))
        return svid


def _digest(token: str) -> bytes:
    # Without the signature: one of ECDSA can be rewritten into another valid one.
    return sha256(token.rpartition(".")[0].encode()).digest()


def _refused(reason: str) -> Unauthenticated:
    return Unauthenticated(PUBLIC, reason)
