"""HTTP/2 as a state machine: bytes in, events out; no I/O, no clock, no randomness.

RFC 9113 and RFC 7541, and of these what gRPC needs: no server push, no priorities, no
upgrade from HTTP/1.1. `Connection` is one end, a server's or a client's.
"""

from ztserve.transport.http2.bounds import Bounds
from ztserve.transport.http2.connection import Connection
from ztserve.transport.http2.events import (
    DataReceived,
    Ended,
    Event,
    GoingAway,
    HeadersReceived,
    PingAnswered,
    StreamReset,
    Writable,
)
from ztserve.transport.http2.fields import Block, Fields, Request, Response, encode
from ztserve.transport.http2.frames import Code

__all__ = [
    "Block",
    "Bounds",
    "Code",
    "Connection",
    "DataReceived",
    "Ended",
    "Event",
    "Fields",
    "GoingAway",
    "HeadersReceived",
    "PingAnswered",
    "Request",
    "Response",
    "StreamReset",
    "Writable",
    "encode",
]
