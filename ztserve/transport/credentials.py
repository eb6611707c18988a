"""The grpcio server's own identity, and its judgement of who is at the other end.

gRPC keeps one pool of roots, so a federated authority could vouch for any ID in the
handshake; it accepts TLS 1.2 and resumed sessions; and it judges a certificate once,
when the connection is made. Therefore the handshake only keeps strangers out, and
each call is judged anew here: TLS 1.3, no resumption, and `identity.PeerVerifier`
against the peer's own trust domain, at this moment, and the quarantine list.
"""

import base64
import logging
import re
import ssl
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated, Unavailable
from ztserve.identity import Identity, PeerVerifier, Quarantine, Source, SpiffeId
from ztserve.types import Peer

_LOG = logging.getLogger(__name__)

Facts: TypeAlias = Mapping[str, Sequence[bytes]]
"""What gRPC knows of a connection (`grpc.ServicerContext.auth_context`)."""

PUBLIC = "the peer's identity could not be verified"
_Configuration: TypeAlias = Any  # grpc.ServerCertificateConfiguration; may be None

MAX_KNOWN = 4096
MAX_PEM_BYTES = 128 * 1024
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----([^-]+)-----END CERTIFICATE-----")
_NOTHING = (b"",)


@dataclass(frozen=True, slots=True)
class _Known:
    peer: Peer
    not_before: float
    not_after: float


@dataclass(frozen=True, slots=True)
class _State:
    """One coherent state: who we are, whom we trust, and whom we have verified."""

    id: SpiffeId
    not_after: float
    verifier: PeerVerifier
    known: dict[tuple[bytes, bytes], _Known] = field(default_factory=dict)


class ServerCredentials:
    """What a server shows in handshakes and how it judges callers, always current.

    The constructor raises IdentityError where `source` has no valid identity. From
    then on a change takes effect at the next handshake and at the next call; where
    our own identity is withdrawn or expired, every call is refused.
    """

    def __init__(self, source: Source, quarantine: Quarantine | None = None) -> None:
        self._source = source
        self._quarantine = quarantine
        self._lock = threading.Lock()
        self._first, state = _built(source.current())
        self._state: _State | None = state
        self._fresh: _Configuration | None = None
        self._unsubscribe = source.subscribe(self._refresh)
        self._refresh()  # what changed since `current` was told to nobody

    def grpc(self) -> grpc.ServerCredentials:
        """Return credentials that follow the source: client certificate required."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._take_fresh,
            require_client_authentication=True,
        )

    def close(self) -> None:
        """Stop following the source."""
        self._unsubscribe()

    @property
    def id(self) -> SpiffeId:
        """Our own SPIFFE ID. Raises Unavailable where we have no valid identity."""
        return self._current(types.now().timestamp()).id

    def peer(self, facts: Facts) -> Peer:
        """Return who is at the other end of a connection, judged at this moment.

        Raises Unauthenticated where that does not hold or is in quarantine,
        Unavailable where we have no valid identity of our own, or no usable list.
        """
        now = types.now().timestamp()
        state = self._current(now)
        if facts.get("ssl_tls_version") != [b"TLSv1.3"]:
            raise _refused("the connection is not TLS 1.3")
        if facts.get("ssl_session_reused") != [b"false"]:
            raise _refused("the TLS session was resumed")
        leaf = facts.get("x509_pem_cert", _NOTHING)[0]
        chain = facts.get("x509_pem_cert_chain", _NOTHING)[0]
        known = state.known.get((leaf, chain))
        if known is None:
            known = _verified(state, leaf, chain)
        if not known.not_before <= now <= known.not_after:
            raise _refused(f"{known.peer.id}: expired at {known.peer.not_after}")
        if self._quarantine is not None:
            self._quarantine.check(known.peer)
        return known.peer

    def _current(self, now: float) -> _State:
        state = self._state
        if state is None or now > state.not_after:
            raise Unavailable(
                "this server has no valid identity now",
                "our own SVID is expired or withdrawn",
            )
        return state

    def _refresh(self) -> None:
        with self._lock:
            try:
                self._fresh, self._state = _built(self._source.current())
            except IdentityError as error:
                _LOG.warning("no calls are taken without an identity: %s", error)
                self._state = None

    def _take_fresh(self) -> _Configuration:
        # gRPC calls this for each new connection, on a thread of its own. It must not
        # raise: gRPC would go on with the old identity.
        with self._lock:
            fresh, self._fresh = self._fresh, None
        return fresh


def _built(identity: Identity) -> tuple[_Configuration, _State]:
    svid = identity.svid
    roots = "".join(
        ssl.DER_cert_to_PEM_cert(root)
        for bundle in identity.bundles.values()
        for root in bundle
    )
    configuration = grpc.ssl_server_certificate_configuration(
        [(svid.key_pem(), svid.chain_pem())], root_certificates=roots.encode()
    )
    verifier = PeerVerifier(identity.bundles)
    return configuration, _State(svid.id, svid.not_after.timestamp(), verifier)


def _verified(state: _State, leaf: bytes, chain: bytes) -> _Known:
    if not leaf:
        raise _refused("no client certificate")
    if len(leaf) + len(chain) > MAX_PEM_BYTES:
        raise _refused("the certificate chain is too long")
    encoded = _PEM.findall(leaf + chain)
    peer = state.verifier.verify([base64.b64decode(one) for one in encoded])
    known = _Known(peer, peer.not_before.timestamp(), peer.not_after.timestamp())
    if len(state.known) >= MAX_KNOWN:
        state.known.clear()
    state.known[leaf, chain] = known
    return known


def _refused(reason: str) -> Unauthenticated:
    return Unauthenticated(PUBLIC, reason)
