"""HTTP/2 frames: their numbers, and how they are written (RFC 9113, 4 to 7)."""

from enum import IntEnum
from struct import Struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client sends first (section 3.4)."""
HEADER_BYTES = 9
LEAST_FRAME_BYTES = 1 << 14
"""The smallest SETTINGS_MAX_FRAME_SIZE that a peer may ask for (section 6.5.2)."""
MOST_FRAME_BYTES = (1 << 24) - 1
DEFAULT_WINDOW = (1 << 16) - 1
MOST_WINDOW = (1 << 31) - 1
MOST_STREAM_ID = (1 << 31) - 1

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(5, 10)

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITIZED = 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS = 1, 2, 3
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 4, 5, 6


class Code(IntEnum):
    """Error codes (section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


_HEAD = Struct(">HBBBI")  # of the length's three octets, the upper two and the lowest
_WORD = Struct(">I")
_SETTING = Struct(">HI")
_LAST_AND_CODE = Struct(">II")


def head(kind: int, flags: int, stream_id: int, length: int) -> bytes:
    """Return a frame's header (section 4.1)."""
    return _HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Return a whole frame."""
    return head(kind, flags, stream_id, len(payload)) + payload


def settings(values: dict[int, int]) -> bytes:
    """Return a SETTINGS frame (section 6.5)."""
    return frame(
        SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in values.items())
    )


def rst_stream(stream_id: int, code: int) -> bytes:
    """Return a RST_STREAM frame (section 6.4)."""
    return frame(RST_STREAM, 0, stream_id, _WORD.pack(code))


def window_update(stream_id: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame; stream 0 is the connection (section 6.9)."""
    return frame(WINDOW_UPDATE, 0, stream_id, _WORD.pack(increment))


def goaway(last_stream_id: int, code: int, debug: bytes = b"") -> bytes:
    """Return a GOAWAY frame (section 6.8)."""
    return frame(GOAWAY, 0, 0, _LAST_AND_CODE.pack(last_stream_id, code) + debug)


SETTINGS_ACK = frame(SETTINGS, ACK, 0)
