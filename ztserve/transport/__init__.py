"""How does a call arrive, and a reply leave?

`Server` answers over mutual TLS 1.3 gRPC what `inference_methods` or
`directory_methods` say, within `Limits`. `Client` and `AsyncClient` call it, and know
its exact SPIFFE ID before a byte of a request leaves.
"""

from ztserve.transport.arrival import Refusal
from ztserve.transport.async_client import AsyncClient
from ztserve.transport.client import Client
from ztserve.transport.directory import (
    WATCH,
    Directory,
    Endpoint,
    directory_methods,
)
from ztserve.transport.limits import Limits
from ztserve.transport.loop.server import Server
from ztserve.transport.methods import Method, inference_methods
from ztserve.transport.protocol import Metadata
from ztserve.transport.refusals import RefusedHandshakes
from ztserve.transport.status import http_status

__all__ = [
    "WATCH",
    "AsyncClient",
    "Client",
    "Directory",
    "Endpoint",
    "Limits",
    "Metadata",
    "Method",
    "Refusal",
    "RefusedHandshakes",
    "Server",
    "directory_methods",
    "http_status",
    "inference_methods",
]
