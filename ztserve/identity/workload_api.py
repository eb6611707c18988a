"""The SPIFFE Workload API on the wire: what the agent and its clients share.

The messages are those that the `spiffe` package generated from the standard's proto
file; nothing else of that package is used.
"""

import re
from ipaddress import ip_address
from urllib.parse import quote

from spiffe._proto.workload_pb2 import (
    JWTSVID,
    X509SVID,
    JWTBundlesRequest,
    JWTBundlesResponse,
    JWTSVIDRequest,
    JWTSVIDResponse,
    ValidateJWTSVIDRequest,
    ValidateJWTSVIDResponse,
    X509BundlesRequest,
    X509BundlesResponse,
    X509SVIDRequest,
    X509SVIDResponse,
)

from ztserve.errors import IdentityError

SERVICE = "SpiffeWorkloadAPI"
FETCH_SVID = "FetchX509SVID"
FETCH_BUNDLES = "FetchX509Bundles"
FETCH_JWT_SVID = "FetchJWTSVID"
FETCH_JWT_BUNDLES = "FetchJWTBundles"
VALIDATE_JWT_SVID = "ValidateJWTSVID"
HEADER = ("workload.spiffe.io", "true")
"""Each request bears it, so that no browser or proxy can be made to ask (section 3)."""

MAX_SOCKET_BYTES = 107
_UNIX = re.compile(r"unix:(?://)?(/(?!/)[^\s%?#\x00-\x1f\x7f]+)")
_TCP = re.compile(r"tcp://(?:\[([0-9a-f:.]+)]|([0-9.]+)):([0-9]{1,5})")
_EXPECTED = (
    "expected unix:///absolute/path of a socket, at most "
    f"{MAX_SOCKET_BYTES} bytes long and not percent-encoded, or tcp://ADDRESS:PORT"
)

__all__ = [
    "FETCH_BUNDLES",
    "FETCH_JWT_BUNDLES",
    "FETCH_JWT_SVID",
    "FETCH_SVID",
    "HEADER",
    "JWTSVID",
    "SERVICE",
    "VALIDATE_JWT_SVID",
    "X509SVID",
    "JWTBundlesRequest",
    "JWTBundlesResponse",
    "JWTSVIDRequest",
    "JWTSVIDResponse",
    "ValidateJWTSVIDRequest",
    "ValidateJWTSVIDResponse",
    "X509BundlesRequest",
    "X509BundlesResponse",
    "X509SVIDRequest",
    "X509SVIDResponse",
    "grpc_target",
    "socket_path",
]


def socket_path(endpoint: str) -> str:
    """Return the path in ``unix:///path`` or ``unix:/path``, which mean the same.

    Raises IdentityError for anything else: there is a scheme and an absolute path, and
    nothing more (Workload Endpoint, section 4).
    """
    match = _UNIX.fullmatch(endpoint)
    if match is None or len(match[1].encode()) > MAX_SOCKET_BYTES:
        raise _wrong(endpoint)
    return match[1]


def grpc_target(endpoint: str) -> str:
    """Return the gRPC target of an endpoint as SPIFFE_ENDPOINT_SOCKET gives it.

    ``tcp://`` takes the address and port of this machine or of its own link, and
    nothing more (Workload Endpoint, section 4). It is the weaker way: whoever gets hold
    of the port while the agent is away can be our agent. Raises IdentityError.
    """
    if not endpoint.startswith("tcp:"):
        return f"unix:{quote(socket_path(endpoint))}"
    match = _TCP.fullmatch(endpoint)
    if match is None:
        raise _wrong(endpoint)
    six, four, port = match.groups()
    try:
        address = ip_address(six or four)
    except ValueError:
        raise _wrong(endpoint) from None
    if not 0 < int(port) <= 65535 or address.version != (6 if six else 4):
        raise _wrong(endpoint)
    if not (address.is_loopback or address.is_link_local):
        raise IdentityError(
            f"SPIFFE endpoint socket {endpoint!r}: {address} is neither of this machine"
            " nor of its own link; our private key would cross a network in the clear "
            "and whoever answers there would choose whom we trust"
        )
    return f"ipv6:%5B{address}%5D:{port}" if six else f"ipv4:{address}:{port}"


def _wrong(endpoint: str) -> IdentityError:
    return IdentityError(f"SPIFFE endpoint socket {endpoint!r}: {_EXPECTED}")
