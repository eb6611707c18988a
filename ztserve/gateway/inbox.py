"""What a client has sent and nobody has taken yet; no I/O."""

from ztserve.gateway.head import END, Malformed


class Inbox:
    """Plain bytes of one connection, taken out as heads and bodies."""

    def __init__(self, max_header_bytes: int) -> None:
        self._most = max_header_bytes
        self._bytes = bytearray()
        self._scanned = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def add(self, data: bytes) -> None:
        """Take what has arrived."""
        self._bytes += data

    def head(self) -> bytes | None:
        """Take out a request's head, if it is all there. Raises Malformed: too long."""
        end = self._bytes.find(END, max(self._scanned - len(END), 0))
        self._scanned = len(self._bytes)
        if max(end, self._scanned if end < 0 else 0) > self._most:
            raise Malformed(431, f"the header is larger than {self._most} bytes")
        if end < 0:
            return None
        head = self.body(end)
        del self._bytes[: len(END)]
        self._scanned = 0
        return head

    def body(self, length: int) -> bytes | None:
        """Take out `length` bytes, if they are all there."""
        if len(self._bytes) < length:
            return None
        body = bytes(self._bytes[:length])
        del self._bytes[:length]
        return body
