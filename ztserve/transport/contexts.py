"""What all TLS ends of ours have in common: 1.3, our SVID of now, nothing resumed.

Keys never touch a file. OpenSSL is given no roots: whoever makes a context says how the
peer's chain is judged.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from cryptography import x509
from OpenSSL import SSL

from ztserve.errors import IdentityError, Unavailable
from ztserve.identity import Identity, Source

T = TypeVar("T")


class HandshakeRefused(Exception):
    """A handshake that failed; `cause` is for the audit, in few words."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Renewed(Generic[T]):
    """What is built of our identity, and built anew when that is another.

    The constructor raises IdentityError where `source` has no valid identity.
    """

    def __init__(
        self, source: Source, build: Callable[[Identity], T], public: str
    ) -> None:
        """`public` is what callers are told where there is no identity any more."""
        self._source = source
        self._build = build
        self._public = public
        first = source.current()
        self._held = first, build(first)

    def current(self) -> tuple[Identity, T]:
        """Return what we are now, and what is built of it; raises Unavailable."""
        try:
            identity = self._source.current()
        except IdentityError as error:
            raise Unavailable(self._public, f"no identity: {error}") from error
        held = self._held
        if identity is not held[0]:
            self._held = held = identity, self._build(identity)
        return held


def context_of(identity: Identity, method: int) -> SSL.Context:
    """Return a context that shows our SVID; `method` is SSL.TLS_SERVER_METHOD or so."""
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_options(
        SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION
    )
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    leaf, *between = map(x509.load_der_x509_certificate, identity.svid.chain_der)
    context.use_certificate(leaf)
    for certificate in between:
        context.add_extra_chain_cert(certificate)
    context.use_privatekey(identity.svid.key)
    context.check_privatekey()
    return context


def cause_of(error: SSL.Error) -> str:
    """Return OpenSSL's own words for what went wrong."""
    reasons = error.args[0] if error.args else ()
    for reason in reasons if isinstance(reasons, list) else ():
        return str(reason[2])[:64]
    return "connection closed"
