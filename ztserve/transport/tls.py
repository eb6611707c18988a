"""Mutual TLS 1.3 between verified ends, without a socket.

pyOpenSSL over memory: keys never touch a file, and the peer's chain is judged inside
the handshake, before our Finished leaves: a server turns a stranger away with an alert,
and a client shows its own certificate to nobody but the server that it means. OpenSSL
is given no roots: it proves that the peer holds its key, and `identity` alone says who
that is. No session is resumed, no ticket can be used, no early data is taken.

A context belongs to one state of our identity; a connection keeps the one that it
began with, and its peer is judged anew by whatever holds now (`Ends.judge`).
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from ztserve.errors import CallError, Unauthenticated
from ztserve.identity import Identity, PeerVerifier, Source
from ztserve.transport.contexts import HandshakeRefused, Renewed, cause_of, context_of
from ztserve.types import Peer

if TYPE_CHECKING:
    from cryptography import x509

ALPN = b"h2"
MAX_CERTIFICATES = 8
"""Of a peer's chain."""
_RECORD_BYTES = 16 * 1024
_HEAD_BYTES = 5
_OVERHEAD_BYTES = 22
"""Of a record on the wire: its head, the kind of its content, the tag."""
_DATA = b"\x17\x03\x03"
"""How each record begins once the handshake is done."""
MAX_IDLE = 64
"""Records of one connection that carry no plain bytes, such as updates of keys and
tickets: each costs as much as a small call, and OpenSSL takes any number."""
_TOO_LONG = 22  # X509_V_ERR_CERT_CHAIN_TOO_LONG

Judge = Callable[[Sequence[bytes]], Peer]
"""Who a chain (DER, leaf first) proves; raises CallError for nobody."""


@dataclass(frozen=True, slots=True)
class _State:
    """How others are judged by one state of our identity, and its contexts."""

    verifier: PeerVerifier
    server: SSL.Context
    client: SSL.Context


class Ends:
    """Our end of connections, in either role, always with the current identity.

    The constructor raises IdentityError where `source` has no valid identity.
    """

    def __init__(self, source: Source) -> None:
        self._renewed = Renewed(source, _built, "this server has no valid identity now")

    @property
    def identity(self) -> Identity:
        """What we are now. Raises Unavailable where that is nothing."""
        return self._renewed.current()[0]

    def accept(self, judge: Callable[[Peer], object]) -> "Session":
        """Return the server's end of a new connection.

        `judge` may refuse a verified peer by raising CallError.
        """
        identity, state = self._renewed.current()

        def judged(chain: Sequence[bytes]) -> Peer:
            peer = state.verifier.verify(chain)
            judge(peer)
            return peer

        return Session(SSL.Connection(state.server, None), judged, identity)

    def connect(self, judge: Callable[[Peer], object]) -> "Session":
        """Return the client's end of a new connection, to whom `judge` lets it be."""
        identity, state = self._renewed.current()

        def judged(chain: Sequence[bytes]) -> Peer:
            peer = state.verifier.verify(chain)
            judge(peer)
            return peer

        tls = SSL.Connection(state.client, None)
        return Session(tls, judged, identity, client=True)

    def judge(self, chain: Sequence[bytes]) -> Peer:
        """Return whom `chain` proves at this moment, by the bundles of this moment.

        Raises Unauthenticated where that does not hold (any more), Unavailable where we
        have no valid identity of our own.
        """
        return self._renewed.current()[1].verifier.verify(chain)


def _built(identity: Identity) -> _State:
    server = _context(identity, SSL.TLS_SERVER_METHOD)
    server.set_alpn_select_callback(_chosen)
    client = _context(identity, SSL.TLS_CLIENT_METHOD)
    client.set_alpn_protos([ALPN])
    return _State(PeerVerifier(identity.bundles), server, client)


def _context(identity: Identity, method: int) -> SSL.Context:
    context = context_of(identity, method)
    context.set_verify_depth(MAX_CERTIFICATES)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _seen)
    return context


def _chosen(_connection: SSL.Connection, offered: list[bytes]) -> bytes | Any:
    return ALPN if ALPN in offered else SSL.NO_OVERLAPPING_PROTOCOLS


def _seen(
    connection: SSL.Connection, certificate: Any, error: int, depth: int, ok: int
) -> bool:
    """Take one certificate of the peer's; at the leaf, judge them all.

    OpenSSL calls this for each certificate of the path that it built from what was
    sent, and for each fault that it finds: with no roots there always is one. The last
    call is for the leaf, whose signature by the next has been checked by then.
    """
    session: Session = connection.get_app_data()
    if error == _TOO_LONG or not 0 <= depth < MAX_CERTIFICATES:
        raise Unauthenticated("the peer's identity could not be verified", "chain long")
    session.take(certificate, depth, last=bool(ok) and depth == 0)
    return True


class Session:
    """TLS without a socket: bytes of the wire in and out, plain bytes in and out."""

    __slots__ = (
        "_head",
        "_idle",
        "_judge",
        "_next",
        "_seen",
        "_tls",
        "_whole",
        "chain",
        "ended",
        "established",
        "judged_by",
        "peer",
    )

    def __init__(
        self,
        tls: SSL.Connection,
        judge: Judge,
        judged_by: Identity,
        *,
        client: bool = False,
    ) -> None:
        self._tls = tls
        self._judge = judge
        self.judged_by = judged_by
        """The state of ours by which the peer is judged in the handshake."""
        self._seen: dict[int, x509.Certificate] = {}
        self._whole = 0
        """Records that OpenSSL has whole, or may judge already; at most as many give
        plain bytes."""
        self._next = 0
        """Bytes of the record that has begun which are still to come."""
        self._head = b""
        """What there is of the head of the one that follows."""
        self._idle = 0
        """Records so far that carried nothing."""
        self.established = False
        self.ended = False
        """Whether nothing can be read any more, whatever was read last."""
        self.chain: tuple[bytes, ...] = ()
        """The peer's certificates (DER, leaf first), once they were judged."""
        self.peer: Peer | None = None
        tls.set_app_data(self)
        if client:
            tls.set_connect_state()
        else:
            tls.set_accept_state()

    def begin(self) -> bytes:
        """Return what a client sends first. Raises HandshakeRefused."""
        self._shake_hands()
        return self.outgoing()

    def receive(self, data: bytes) -> None:
        """Take bytes from the wire; go on with the handshake where it is not done.

        Raises HandshakeRefused.
        """
        at = self._tls.bio_write(data)
        while at < len(data):
            at += self._tls.bio_write(data[at:])
        self._count(data)
        if not self.established:
            self._shake_hands()

    def read(self) -> bytes | None:
        """Return plain bytes, b"" at the end, None where more is needed first.

        Raises HandshakeRefused where the peer refused us: in TLS 1.3 a client hears of
        that only here; and where it offends TLS.
        """
        pieces = []
        try:
            while self._whole:  # to ask in vain would cost more than most calls' TLS
                self._whole -= 1
                pieces.append(self._tls.recv(_RECORD_BYTES))
        except SSL.WantReadError:
            self._idle += self._whole + 1
            self._whole = 0
            if self._idle > MAX_IDLE:
                self.ended = True
                raise HandshakeRefused("too many records without data") from None
        except SSL.ZeroReturnError:
            self.ended = True
        except SSL.Error as error:
            self.ended = True
            if not pieces:
                raise HandshakeRefused(_cause(error)) from None
        if len(pieces) == 1:
            return pieces[0]
        return b"".join(pieces) if pieces or self.ended else None

    def write(self, data: bytes | memoryview) -> bytes:
        """Return what to send on the wire so that `data` arrives."""
        at = self._tls.send(data)  # one record
        if at < len(data):
            rest = memoryview(data)  # a slice of bytes would copy all that is left
            while at < len(data):
                at += self._tls.send(rest[at : at + _RECORD_BYTES])
        records = len(data) // _RECORD_BYTES + 1
        return self.outgoing(len(data) + (records + 1) * _OVERHEAD_BYTES)

    def close(self) -> bytes:
        """Return what to send on the wire to end the connection properly."""
        if self.established:
            with suppress(SSL.Error):  # there may be an alert to send all the same
                self._tls.shutdown()
        return self.outgoing()

    def outgoing(self, most: int = _RECORD_BYTES) -> bytes:
        """Return what TLS itself has to send; quickest if that is less than `most`."""
        pieces: list[bytes] = []
        try:
            while not pieces or len(pieces[-1]) == most:
                pieces.append(self._tls.bio_read(most))
        except SSL.WantReadError:
            pass
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def take(self, certificate: Any, depth: int, *, last: bool) -> None:
        """Take a certificate from OpenSSL; at the last one, judge. Raises CallError."""
        self._seen[depth] = certificate.to_cryptography()
        if last:
            found = [self._seen[at] for at in range(len(self._seen))]
            self.chain = tuple(one.public_bytes(Encoding.DER) for one in found)
            self.peer = self._judge(self.chain)

    def _count(self, data: bytes) -> None:
        """See how many records are whole with `data` (RFC 8446, section 5.1)."""
        if self._head:
            data, self._head = self._head + data, b""
        at, size = self._next, len(data)
        if 0 < at <= size:
            self._whole += 1
        while at <= size:
            if size - at < _HEAD_BYTES:
                self._head, self._next = data[at:], 0
                return
            known = data[at : at + 3] == _DATA
            length = data[at + 3] << 8 | data[at + 4]
            at += _HEAD_BYTES + length
            if at <= size or length > _RECORD_BYTES + 256 or not known:
                self._whole += 1  # or OpenSSL need not wait for the rest of it
        self._next = at - size

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            self._whole = 0
            return
        except SSL.Error as error:
            raise HandshakeRefused(_cause(error)) from None
        except Unauthenticated as error:
            reason = f"certificate not trusted: {error.reason}"
            raise HandshakeRefused(reason[:300]) from error
        except CallError as error:  # it is we who cannot judge, or mean another
            raise HandshakeRefused(error.reason[:300]) from error
        if self.peer is None or self._tls.get_alpn_proto_negotiated() != ALPN:
            raise HandshakeRefused("not HTTP/2")
        self._seen.clear()
        self.established = True


_CAUSES = {
    "http request": "not TLS",
    "wrong version number": "not TLS",
    "bad record type": "not TLS",
    "packet length too long": "not TLS",
    "unsupported protocol": "TLS older than 1.3",
    "peer did not return a certificate": "no client certificate",
    "no application protocol": "not HTTP/2",
    "no shared cipher": "no common cipher",
    "no suitable key share": "no common group",
}
"""What OpenSSL's words mean; all others stand as they are: they are its own."""


def _cause(error: SSL.Error) -> str:
    words = cause_of(error)
    return _CAUSES.get(words, words)
