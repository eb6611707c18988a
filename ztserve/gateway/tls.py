"""TLS 1.3 towards the outside: our SVID, and whoever is at the other end.

pyOpenSSL over memory: keys never touch a file, each connection gets a context of the
identity as it is then, and the peer's whole chain can be had. A client may come without
a certificate and ask for liveness alone. OpenSSL proves that the client holds its
certificate's key; whether the chain holds is judged by `identity`, and by it alone, so
that a refusal can be told in words. No sessions are resumed and no early data is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from ztserve.errors import IdentityError, Unavailable
from ztserve.identity import Identity, PeerVerifier, Source
from ztserve.types import Peer

_READ_BYTES = 64 * 1024
_NO_IDENTITY = "the gateway has no valid identity now"


@dataclass(frozen=True, slots=True)
class _State:
    """One coherent state: our own identity, and how others are judged by it."""

    identity: Identity
    context: SSL.Context
    verifier: PeerVerifier


class Edge:
    """Our end of every connection, always with the current identity."""

    def __init__(self, source: Source) -> None:
        """Raise IdentityError where `source` has no valid identity."""
        self._source = source
        self._state = _built(source.current())

    @property
    def trust_domain(self) -> str:
        """The trust domain that we are of."""
        return self._state.identity.svid.id.trust_domain

    def session(self) -> "Session":
        """Return the server's end of a new connection; Unavailable without identity."""
        return Session(SSL.Connection(self._current().context, None))

    def peer(self, chain: Sequence[bytes]) -> Peer:
        """Return whom `chain` (DER, leaf first) proves at this moment.

        Raises Unauthenticated where it does not hold (any more), Unavailable where we
        have no valid identity of our own.
        """
        return self._current().verifier.verify(chain)

    def _current(self) -> _State:
        try:
            identity = self._source.current()
        except IdentityError as error:
            raise Unavailable(_NO_IDENTITY, f"no identity: {error}") from error
        if identity is not self._state.identity:
            self._state = _built(identity)
        return self._state


def _built(identity: Identity) -> _State:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_options(
        SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION
    )
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    leaf, *intermediates = map(x509.load_der_x509_certificate, identity.svid.chain_der)
    context.use_certificate(leaf)
    for certificate in intermediates:
        context.add_extra_chain_cert(certificate)
    context.use_privatekey(identity.svid.key)
    context.check_privatekey()
    context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
    context.set_alpn_select_callback(_protocol)
    return _State(identity, context, PeerVerifier(identity.bundles))


def _protocol(_connection: SSL.Connection, offered: list[bytes]) -> bytes | Any:
    return b"http/1.1" if b"http/1.1" in offered else SSL.NO_OVERLAPPING_PROTOCOLS


class HandshakeRefused(Exception):
    """A handshake that failed; `args[0]` is OpenSSL's word for the cause."""


class Session:
    """TLS without a socket: bytes of the wire in and out, plain bytes in and out."""

    __slots__ = ("_tls", "chain", "established")

    def __init__(self, tls: SSL.Connection) -> None:
        tls.set_accept_state()
        self._tls = tls
        self.established = False
        self.chain: tuple[bytes, ...] = ()
        """The client's certificates (DER, leaf first); empty: it showed none."""

    def receive(self, data: bytes) -> None:
        """Take bytes from the wire; go on with the handshake where it is not done.

        Raises HandshakeRefused.
        """
        view = memoryview(data)
        while view:
            view = view[self._tls.bio_write(bytes(view)) :]
        if not self.established:
            self._shake_hands()

    def read(self, most: int) -> bytes | None:
        """Return plain bytes, b"" at the end, None where more is needed first."""
        try:
            return self._tls.recv(most)
        except SSL.WantReadError:
            return None
        except (SSL.ZeroReturnError, SSL.Error):
            return b""

    def write(self, data: bytes) -> bytes:
        """Return what to send on the wire so that `data` arrives."""
        view = memoryview(data)
        while view:
            view = view[self._tls.send(bytes(view[:_READ_BYTES])) :]
        return self.outgoing()

    def close(self) -> bytes:
        """Return what to send on the wire to end the connection properly."""
        if self.established:
            try:
                self._tls.shutdown()
            except SSL.Error:
                return b""
        return self.outgoing()

    def outgoing(self) -> bytes:
        """Return what TLS itself has to send."""
        pieces = []
        try:
            while True:
                pieces.append(self._tls.bio_read(_READ_BYTES))
        except SSL.WantReadError:
            return b"".join(pieces)

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            return
        except SSL.Error as error:
            raise HandshakeRefused(_cause(error)) from None
        self.established = True
        leaf = self._tls.get_peer_certificate(as_cryptography=True)
        if leaf is not None:
            # On a server OpenSSL keeps the leaf apart from the rest of the chain.
            rest = self._tls.get_peer_cert_chain(as_cryptography=True) or []
            chain = [leaf, *(one for one in rest if one != leaf)]
            self.chain = tuple(one.public_bytes(Encoding.DER) for one in chain)


def _cause(error: SSL.Error) -> str:
    reasons = error.args[0] if error.args else ()
    for reason in reasons if isinstance(reasons, list) else ():
        return str(reason[2])[:64]
    return "connection closed"
