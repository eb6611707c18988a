"""A second proof that a peer is who its certificate says: its own JWT-SVID, for us."""

import threading
from collections.abc import Callable

from ztserve import types
from ztserve.errors import Unauthenticated
from ztserve.identity.jwt.source import Authorities
from ztserve.identity.jwt.svid import JwtSvid, bearer_token, verify_jwt_svid
from ztserve.identity.peer import PUBLIC
from ztserve.identity.spiffe_id import SpiffeId
from ztserve.types import Peer

MAX_KNOWN = 4096


class JwtProof:
    """Judges the ``authorization`` of calls to `audience`, our own SPIFFE ID.

    An X.509-SVID that was stolen, or that a node's processes share, does not make a
    call then: its holder must also be one to whom the agent gives tokens, minutes ago.
    A token counts only beside the peer's own certificate, so that who sees it cannot
    use it. What was verified is remembered until it expires or the keys change.
    """

    def __init__(
        self, authorities: Callable[[], Authorities], audience: SpiffeId
    ) -> None:
        self._authorities = authorities
        self._audience = audience
        self._known: dict[str, JwtSvid] = {}
        self._known_by: Authorities = {}
        self._lock = threading.Lock()

    def check(self, authorization: str | None, peer: Peer) -> None:
        """Raise Unauthenticated unless it is a JWT-SVID of `peer` for us, and holds."""
        if authorization is None:
            raise _refused(f"{peer.id}: the call bears no JWT-SVID")
        svid = self._verified(bearer_token(authorization))
        if svid.id != peer.id:
            raise _refused(f"{peer.id}: the call bears the JWT-SVID of {svid.id}")
        if types.now() >= svid.expires_at:
            raise _refused(f"{peer.id}: its JWT-SVID expired at {svid.expires_at}")

    def _verified(self, token: str) -> JwtSvid:
        authorities = self._authorities()
        with self._lock:
            if authorities is not self._known_by:
                self._known, self._known_by = {}, authorities
            known = self._known
        svid = known.get(token)
        if svid is None:
            svid = verify_jwt_svid(
                token, authorities, audience=self._audience, now=types.now()
            )
            with self._lock:
                if len(known) >= MAX_KNOWN:
                    known.clear()
                known[token] = svid
        return svid


def _refused(reason: str) -> Unauthenticated:
    return Unauthenticated(PUBLIC, reason)
