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

from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from ztserve.identity import Identity, PeerVerifier, Source
from ztserve.transport.contexts import HandshakeRefused, Renewed, cause_of, context_of
from ztserve.types import Peer

_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class _State:
    """How others are judged by one state of our identity, and its context."""

    context: SSL.Context
    verifier: PeerVerifier


class Edge:
    """Our end of every connection, always with the current identity."""

    def __init__(self, source: Source) -> None:
        """Raise IdentityError where `source` has no valid identity."""
        self._renewed = Renewed(source, _built, "the gateway has no valid identity now")

    def session(self) -> "Session":
        """Return the server's end of a new connection; Unavailable without identity."""
        return Session(SSL.Connection(self._renewed.current()[1].context, None))

    def peer(self, chain: Sequence[bytes]) -> Peer:
        """Return whom `chain` (DER, leaf first) proves at this moment.

        Raises Unauthenticated where it does not hold (any more), Unavailable where we
        have no valid identity of our own.
        """
        return self._renewed.current()[1].verifier.verify(chain)


def _built(identity: Identity) -> _State:
    context = context_of(identity, SSL.TLS_SERVER_METHOD)
    context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
    context.set_alpn_select_callback(_protocol)
    return _State(context, PeerVerifier(identity.bundles))


def _protocol(_connection: SSL.Connection, offered: list[bytes]) -> bytes | Any:
    return b"http/1.1" if b"http/1.1" in offered else SSL.NO_OVERLAPPING_PROTOCOLS


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
            raise HandshakeRefused(cause_of(error)) from None
        self.established = True
        leaf = self._tls.get_peer_certificate(as_cryptography=True)
        if leaf is not None:
            # On a server OpenSSL keeps the leaf apart from the rest of the chain.
            rest = self._tls.get_peer_cert_chain(as_cryptography=True) or []
            chain = [leaf, *(one for one in rest if one != leaf)]
            self.chain = tuple(one.public_bytes(Encoding.DER) for one in chain)
