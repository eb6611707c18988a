"""What arrived on an HTTP/2 connection."""

from typing import NamedTuple, TypeAlias

from ztserve.transport.http2.fields import Fields, Request, Response


class HeadersReceived(NamedTuple):
    """The head of a request or response, or trailers (`Fields`)."""

    stream_id: int
    head: Request | Response | Fields
    ended: bool
    """Whether the peer sends nothing more on this stream."""


class DataReceived(NamedTuple):
    """A piece of a body; to be told to `Connection.consumed` when it is dealt with."""

    stream_id: int
    data: bytes
    ended: bool


class StreamReset(NamedTuple):
    """A stream ended before its time, by the peer or because of what it sent.

    In the second case it may be one that no other event told of.
    """

    stream_id: int
    code: int
    reason: str
    """Empty: the peer ended it."""


class Writable(NamedTuple):
    """All that had to wait for a window has gone into `outgoing`."""

    stream_id: int


class PingAnswered(NamedTuple):
    """The peer answered a ping of ours."""

    opaque: bytes


class GoingAway(NamedTuple):
    """The peer takes no streams after `last_stream_id`; those have not run."""

    last_stream_id: int
    code: int
    debug: bytes


class Ended(NamedTuple):
    """The connection is over: send what is `outgoing` and close it."""

    code: int
    reason: str


Event: TypeAlias = (
    HeadersReceived
    | DataReceived
    | StreamReset
    | Writable
    | PingAnswered
    | GoingAway
    | Ended
)
