"""What passes the broker's socket: bounded JSON objects, and one descriptor.

An object is its length (4 bytes, big-endian) and its JSON. The request says what is
wanted and a nonce; answers are ``{"wait": true}`` while the weights are read, then
``{"refused": "why"}``, or the signed statement and behind it one byte that carries the
descriptor (SCM_RIGHTS, unix(7)).
"""

import json
import os
import socket
import struct
import time
from collections.abc import Mapping

from ztserve.artifacts.statements.strict import Malformed, Object, load_object
from ztserve.errors import VerificationError

MAX_REQUEST_BYTES = 4096
MAX_ANSWER_BYTES = 16 << 20
_LENGTH = struct.Struct(">I")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_CHUNK = 1 << 16


def peer_process(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of who opened, or listens at, the other end."""
    raw = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
    )
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def check_user(connection: socket.socket) -> int:
    """Return the pid at the other end; VerificationError if it is another user's."""
    pid, uid = peer_process(connection)
    if uid != os.geteuid():
        raise VerificationError(
            f"the process at the other end runs as uid {uid}, expected {os.geteuid()}"
        )
    return pid


def send(connection: socket.socket, message: Mapping[str, object]) -> None:
    """Send one object. Raises OSError."""
    text = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def receive(connection: socket.socket, *, limit: int, deadline: float) -> Object:
    """Receive one object of at most `limit` bytes before `deadline` (monotonic).

    Raises Malformed, ConnectionError where the other end closes, TimeoutError, OSError.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))
    if length > limit:
        raise Malformed(f"a message of {length} bytes, more than the limit of {limit}")
    return load_object(_exactly(connection, length, deadline), limit=limit)


def _exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("out of time")
        connection.settimeout(left)
        piece = connection.recv(min(size - len(received), _CHUNK))
        if not piece:
            raise ConnectionResetError("the other end closed the connection")
        received += piece
    return bytes(received)


def send_descriptor(connection: socket.socket, descriptor: int) -> None:
    """Send one descriptor. Raises OSError."""
    socket.send_fds(connection, [b"\0"], [descriptor])


def receive_descriptor(connection: socket.socket, *, deadline: float) -> int:
    """Receive exactly one descriptor, which is the caller's to close.

    Raises Malformed, ConnectionError, TimeoutError, OSError.
    """
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    data, descriptors, flags, _ = socket.recv_fds(
        connection, 1, 1, socket.MSG_CMSG_CLOEXEC
    )
    if len(descriptors) == 1 and not flags & socket.MSG_CTRUNC:
        return descriptors[0]
    for descriptor in descriptors:
        os.close(descriptor)
    if not data:
        raise ConnectionResetError("the other end closed the connection")
    raise Malformed("not one descriptor behind the statement")
