"""Records of TLS 1.3 made by hand, after a handshake that OpenSSL has done (RFC 8446).

OpenSSL sends no record that it should not; who attacks does.
"""

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from ztserve.transport import tls

ALERT, HANDSHAKE, DATA = 21, 22, 23
_SECRET = b"CLIENT_TRAFFIC_SECRET_0"


class Hand:
    """A client's end whose records are made here: `session`, once it is established."""

    def __init__(self, source, judge=lambda _peer: None) -> None:
        ends = tls.Ends(source)
        self._lines: list[bytes] = []
        context = ends._renewed.current()[1].client
        context.set_keylog_callback(lambda _, line: self._lines.append(line))
        self.session = ends.connect(judge)
        self._secret = b""
        self._count = 0

    def record(self, content: bytes, kind: int = DATA, padding: int = 0) -> bytes:
        """Return one record; the keys are those of the moment."""
        if not self._secret:
            [line] = [one for one in self._lines if one.startswith(_SECRET)]
            self._secret = bytes.fromhex(line.split()[2].decode())
        inner = content + bytes((kind,)) + bytes(padding)
        head = b"\x17\x03\x03" + struct.pack(">H", len(inner) + 16)
        iv = int.from_bytes(self._expanded(b"iv", 12)) ^ self._count
        self._count += 1
        sealed = self._cipher.encrypt(iv.to_bytes(12), inner, head)
        return head + sealed

    def update(self, *, asks: bool = False) -> bytes:
        """Return an update of our keys; it may ask the other end for its own."""
        out = self.record(bytes((24, 0, 0, 1, asks)), HANDSHAKE)
        self._secret = self._expanded(b"traffic upd", len(self._secret))
        self._count = 0
        return out

    @property
    def _name(self) -> str:
        return self.session._tls.get_cipher_name()

    @property
    def _cipher(self):
        if "CHACHA20" in self._name:
            return ChaCha20Poly1305(self._expanded(b"key", 32))
        return AESGCM(self._expanded(b"key", 16 if "128" in self._name else 32))

    def _expanded(self, label: bytes, size: int) -> bytes:
        """HKDF-Expand-Label (section 7.1), of which one block is enough."""
        digest = hashlib.sha384 if "SHA384" in self._name else hashlib.sha256
        label = b"tls13 " + label
        info = struct.pack(">HB", size, len(label)) + label + b"\0\1"
        return hmac.new(self._secret, info, digest).digest()[:size]
