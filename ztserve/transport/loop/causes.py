"""Why a connection could not be had, in words that say what to look at."""

from ztserve.errors import CallError, IdentityError, Unavailable
from ztserve.identity import SpiffeId
from ztserve.transport.contexts import HandshakeRefused

_OF_OURSELVES = (
    "(another trust domain, expired, in quarantine, or an authority that its bundle "
    "does not hold)"
)


class WrongServer(CallError):
    """The server proved an identity, but not the expected one."""


def turned_away(refused: HandshakeRefused, server: SpiffeId) -> Unavailable:
    """Return the error of a handshake that one of the ends refused."""
    judged = refused.__cause__
    if isinstance(judged, Unavailable):
        return judged
    if isinstance(judged, WrongServer):
        public = f"the server's certificate is not for the expected SPIFFE ID {server}"
    elif isinstance(judged, CallError):
        public = (
            "the server's certificate is not signed by the trust bundle of "
            f"{server}'s trust domain, or is expired: is it of another trust domain "
            "or authority?"
        )
    elif refused.cause == "not TLS":
        public = "the server does not speak TLS at this address: is it the right port?"
    elif refused.cause == "not HTTP/2":
        public = "the server speaks TLS, but not gRPC: is it the right port?"
    else:
        public = (
            "the server refused this client in the handshake: probably it does not "
            f"trust this client's SVID {_OF_OURSELVES}"
        )
    return Unavailable(public, f"{public} [{refused.cause}]")


def closed(server: SpiffeId, error: Exception | None) -> Unavailable:
    """Return the error of a connection that ended before the server had spoken."""
    public = (
        f"{server} closed the connection during the handshake: probably it does not "
        f"trust this client's SVID {_OF_OURSELVES}, or takes no more connections"
    )
    return Unavailable(public, f"{public} [{error}]" if error else public)


def unreachable(error: BaseException, server: SpiffeId, address: str) -> Exception:
    """Return what is told of a connection that could not be had."""
    if isinstance(error, Unavailable | IdentityError):
        return error
    if isinstance(error, ConnectionRefusedError):
        public = "nothing listens there: is the deployment running, and on this port?"
    elif isinstance(error, TimeoutError):
        public = f"{server} did not answer in time"
    else:
        public = f"no connection to {server}"
    return Unavailable(public, f"{public} [{address}: {error!r}]")
