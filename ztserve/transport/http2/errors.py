"""What a peer did wrong, and how much of the connection it costs (RFC 9113, 5.4)."""

from ztserve.transport.http2.frames import Code


class StreamError(Exception):
    """What ends one stream: the code that is sent, and why."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(f"{code.name}: {reason}")
        self.code, self.reason = code, reason


class FatalError(Exception):
    """What ends the connection: the code that is sent, and why."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(f"{code.name}: {reason}")
        self.code, self.reason = code, reason


def offence(reason: str) -> FatalError:
    """Return the end of a connection whose peer breaks the protocol."""
    return FatalError(Code.PROTOCOL_ERROR, reason)


def calm(reason: str) -> FatalError:
    """Return the end of a connection whose peer asks too much of us."""
    return FatalError(Code.ENHANCE_YOUR_CALM, reason)


def missized(reason: str) -> FatalError:
    """Return the end of a connection over a frame of the wrong size."""
    return FatalError(Code.FRAME_SIZE_ERROR, reason)
