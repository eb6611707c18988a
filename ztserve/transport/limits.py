"""What a server lets the outside take: bytes, time, and calls at once."""

from dataclasses import dataclass, fields

from ztserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one server. Each has a default, a unit in its name, and no "off".

    Those before authentication (handshake, metadata, streams, connections) hold for
    anyone; the others for callers whose certificate was verified.
    """

    max_message_bytes: int = 16 << 20
    """One request message; a larger one is InvalidInput."""
    max_metadata_bytes: int = 16 << 10
    """All metadata of one call."""
    max_connections: int = 1024
    max_streams_per_connection: int = 128
    """Calls at once on one connection; more wait at the client."""
    max_in_flight: int = 64
    """Calls at once on this server; the next is Overloaded. At most a thread each."""
    max_in_flight_per_principal: int = 48
    """Calls at once of one SPIFFE ID."""
    max_handshakes: int = 256
    """Handshakes at once; where one more begins, another is ended, chosen at random."""
    max_requests_bytes: int = 1 << 30
    """Of all request messages that are on their way to those who answer."""
    handshake_s: float = 5.0
    """From accepted connection to the end of the TLS handshake."""
    body_s: float = 10.0
    """From the start of reading a request message to its last byte."""
    max_call_s: float = 60.0
    """Longest deadline that a call can ask for; also that of one without any."""
    stream_idle_s: float = 60.0
    """Between two request messages of a stream, and for one reply to be taken.

    Until it is taken, its call is in flight.
    """
    max_stream_s: float = 600.0
    """One stream, whatever it carries."""
    max_stream_messages: int = 10_000
    """Request messages of one stream."""
    max_connection_age_s: float = 600.0
    """A connection ends after this long, an idle one too; calls on it may finish."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, bool) or not 0 < value < 1 << 31:
                raise ConfigError(
                    f"transport limit {one.name} = {value!r}: expected a positive "
                    "number below 2147483648; no limit can be switched off"
                )
        if self.max_in_flight > 1024:
            raise ConfigError(
                f"transport limit max_in_flight = {self.max_in_flight}: at most 1024, "
                "because each call in flight may hold a thread; add replicas instead"
            )
