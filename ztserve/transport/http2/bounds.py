"""What a peer may have us hold, and how often it may have us do little things."""

from dataclasses import dataclass

from ztserve.transport.http2 import frames
from ztserve.transport.http2.errors import calm

HARD = 2
MAX_SETTINGS = 32
"""In one frame; RFC 9113 knows six."""
OF_STREAM, OF_DATA = 8, 2
"""Frames that carry nothing, for a stream and for a frame of data: stock clients send
so many, to widen windows by as little as they have read."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of one connection. Raises ValueError for what RFC 9113 does not allow."""

    max_streams: int = 128
    """Streams of the peer's at once."""
    max_header_bytes: int = 16 * 1024
    """A block as it is sent, and its fields with 32 bytes for each (section 6.5.2); a
    larger one ends its stream, one of over `HARD` times that the connection."""
    max_continuations: int = 16
    """CONTINUATION frames of one block."""
    max_frame_bytes: int = 256 * 1024
    stream_window: int = 512 * 1024
    """Bytes of one stream that may be on their way to us."""
    connection_window: int = 8 * 1024 * 1024
    settings: int = 16
    """SETTINGS frames between two calls of `refresh`; so are all that follow."""
    pings: int = 40
    resets: int = 400
    """Streams that the peer resets, or has us reset (rapid reset, CVE-2023-44487)."""
    idle_frames: int = 1000
    """Frames that carry nothing: empty DATA, PRIORITY, unknown ones, updates of a
    window by less than a kibibyte, and late ones. Each stream that begins, and each
    frame of data, lets there be some more."""

    def __post_init__(self) -> None:
        least = frames.DEFAULT_WINDOW  # which a peer may use before it knows better
        for name in ("stream_window", "connection_window"):
            if not least <= getattr(self, name) <= frames.MOST_WINDOW:
                raise ValueError(f"{name}: expected {least} to {frames.MOST_WINDOW}")
        most = frames.MOST_FRAME_BYTES
        if not frames.LEAST_FRAME_BYTES <= self.max_frame_bytes <= most:
            raise ValueError(
                f"max_frame_bytes: expected {frames.LEAST_FRAME_BYTES} to {most}"
            )


class Allowance:
    """Counts down what may happen only so often; `refresh` begins anew."""

    __slots__ = ("_bounds", "_idle", "_pings", "_resets", "_settings")

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self.refresh()

    def refresh(self) -> None:
        """Allow the whole number again."""
        bounds = self._bounds
        self._settings, self._pings = bounds.settings, bounds.pings
        self._resets, self._idle = bounds.resets, bounds.idle_frames

    def settings(self, values: int) -> None:
        """Count a SETTINGS frame. Raises FatalError, as all of these."""
        if values > MAX_SETTINGS:  # each may touch every stream (CVE-2020-11080)
            raise calm("too many settings in one frame")
        self._settings -= 1
        if self._settings < 0:
            raise calm("too many SETTINGS frames")

    def ping(self) -> None:
        """Count a PING frame."""
        self._pings -= 1
        if self._pings < 0:
            raise calm("too many PING frames")

    def reset(self) -> None:
        """Count a stream that was reset."""
        self._resets -= 1
        if self._resets < 0:
            raise calm("too many streams were reset")

    def earn(self, count: int) -> None:
        """Allow some more frames that carry nothing, for one that carries something."""
        self._idle = min(self._idle + count, self._bounds.idle_frames)

    def idle(self) -> None:
        """Count a frame that carries nothing."""
        self._idle -= 1
        if self._idle < 0:
            raise calm("too many frames that carry nothing")
