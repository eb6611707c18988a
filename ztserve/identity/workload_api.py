"""The SPIFFE Workload API on the wire: what the agent and its clients share.

The messages are those that the `spiffe` package generated from the standard's proto
file; nothing else of that package is used.
"""

import re

from spiffe._proto.workload_pb2 import (
    X509SVID,
    X509BundlesRequest,
    X509BundlesResponse,
    X509SVIDRequest,
    X509SVIDResponse,
)

from ztserve.errors import IdentityError

SERVICE = "SpiffeWorkloadAPI"
FETCH_SVID = "FetchX509SVID"
FETCH_BUNDLES = "FetchX509Bundles"
HEADER = ("workload.spiffe.io", "true")
"""Each request bears it, so that no browser or proxy can be made to ask (section 3)."""

MAX_SOCKET_BYTES = 107
_PATH = re.compile(r"/[^\s%?#\x00-\x1f\x7f]+")

__all__ = [
    "FETCH_BUNDLES",
    "FETCH_SVID",
    "HEADER",
    "SERVICE",
    "X509SVID",
    "X509BundlesRequest",
    "X509BundlesResponse",
    "X509SVIDRequest",
    "X509SVIDResponse",
    "socket_path",
]


def socket_path(endpoint: str) -> str:
    """Return the path in ``unix:///path``, the form of SPIFFE_ENDPOINT_SOCKET.

    Raises IdentityError for any other value.
    """
    expected = (
        f"SPIFFE endpoint socket {endpoint!r}: expected unix:///absolute/path of a "
        f"socket, at most {MAX_SOCKET_BYTES} bytes long"
    )
    if not endpoint.startswith("unix:///"):
        raise IdentityError(expected)
    path = endpoint.removeprefix("unix://")
    if not _PATH.fullmatch(path) or len(path.encode()) > MAX_SOCKET_BYTES:
        raise IdentityError(expected)
    return path
