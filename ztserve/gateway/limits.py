"""What the gateway lets the outside take: connections, bytes, time, calls at once."""

from dataclasses import dataclass, fields

from ztserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one gateway. Each has a default, a unit in its name, and no "off".

    Those on connections, headers and handshakes hold before anyone is authenticated.
    """

    max_connections: int = 1024
    max_connections_per_address: int = 256
    max_header_bytes: int = 16 << 10
    """Request line and header fields of one request."""
    max_headers: int = 64
    max_body_bytes: int = 8 << 20
    """One request's body."""
    max_bodies_bytes: int = 128 << 20
    """All bodies that are being read or answered; one that does not fit has to wait."""
    max_in_flight: int = 256
    """Requests of verified peers at once; the next is refused (429)."""
    max_in_flight_per_peer: int = 64
    """Requests of one SPIFFE ID at once."""
    handshake_s: float = 5.0
    header_s: float = 5.0
    """From a request's first byte to the end of its header."""
    body_s: float = 10.0
    """From the header's end, or `100 Continue`, to the body's last byte."""
    idle_s: float = 60.0
    """Between two requests on one connection."""
    write_s: float = 10.0
    """For a client to take what was sent to it."""
    max_call_s: float = 60.0
    """One call; longer, it is ended."""
    max_stream_s: float = 600.0
    """One streamed answer."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, bool) or not 0 < value < 1 << 40:
                raise ConfigError(
                    f"gateway limit {one.name} = {value!r}: expected a positive "
                    "number; no limit can be switched off"
                )
