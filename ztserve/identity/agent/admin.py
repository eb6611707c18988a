"""The agent's admin socket: one line of JSON there, one line back.

Requests: ``{"op": "register", "id": "spiffe://..."}`` gives the connecting process its
identity, once in its life; ``{"op": "whoami"}`` tells the one that it registered, or
null; ``{"op": "status"}``. For admins alone: ``{"op": "stop"}``, and what the agent was
given besides. An answer is ``{"ok": true, ...}`` or ``{"ok": false, "error": "..."}``.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from ztserve.errors import IdentityError

MAX_REQUEST_BYTES = 4096
MAX_ANSWER_BYTES = 1024 * 1024
REQUEST_TIMEOUT_S = 5.0
_RETRY_S = 0.1


def workload_endpoint(directory: Path) -> str:
    """Return the endpoint of the agent in `directory`, for `WorkloadSource`."""
    return f"unix://{directory / 'workload.sock'}"


def admin_path(directory: Path) -> Path:
    """Return the admin socket of the agent in `directory`, for `register`."""
    return directory / "admin.sock"


def register(
    admin_socket: str | os.PathLike[str], spiffe_id: str, *, timeout_s: float = 10.0
) -> None:
    """Have the agent name this process `spiffe_id`, before it opens a source.

    Waits for an agent that is away, up to `timeout_s`. Raises IdentityError with the
    agent's reason if it refuses, at once.
    """
    admin(admin_socket, {"op": "register", "id": spiffe_id}, timeout_s=timeout_s)


def register_again(
    admin_socket: str | os.PathLike[str], spiffe_id: str, *, timeout_s: float = 10.0
) -> None:
    """Have an agent that may have been started anew name this process `spiffe_id`.

    One that knows it already is not asked twice: that would be an alert. Raises
    IdentityError as `register` does.
    """
    deadline = time.monotonic() + timeout_s
    known = admin(admin_socket, {"op": "whoami"}, timeout_s=timeout_s)["id"]
    if known != spiffe_id:
        register(admin_socket, spiffe_id, timeout_s=_left(deadline))


def admin(
    admin_socket: str | os.PathLike[str],
    request: Mapping[str, object],
    *,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> dict[str, object]:
    """Return the agent's answer to one request.

    Waits for an agent that is away, up to `timeout_s`. Raises IdentityError if there
    is none or it refuses.
    """
    path = os.fspath(admin_socket)
    deadline = time.monotonic() + timeout_s
    line = json.dumps(dict(request)).encode() + b"\n"
    if len(line) > MAX_REQUEST_BYTES:
        raise IdentityError(f"request to the agent of over {MAX_REQUEST_BYTES} bytes")
    answer = read_object(_exchange(path, line, deadline))
    if answer.get("ok") is not True:
        raise IdentityError(f"the agent at {path} refuses: {answer.get('error')}")
    return answer


def read_object(line: bytes) -> dict[str, object]:
    """Return the JSON object in `line`; IdentityError if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IdentityError("expected one line of JSON") from error
    if not isinstance(value, dict):
        raise IdentityError("expected one JSON object")
    return value


def _exchange(path: str, line: bytes, deadline: float) -> bytes:
    with _connect(path, deadline) as connection:
        try:
            connection.sendall(line)
            return _read_line(connection, deadline)
        except OSError as error:
            raise IdentityError(f"the agent at {path} does not answer") from error


def _connect(path: str, deadline: float) -> socket.socket:
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_left(deadline))
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            if time.monotonic() + _RETRY_S > deadline:
                raise IdentityError(
                    f"no identity agent at {path} ({error.strerror or error}): start "
                    "the application, which starts the agent, or check the path"
                ) from error
            time.sleep(_RETRY_S)
        else:
            return connection


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        connection.settimeout(_left(deadline))
        piece = connection.recv(65536)
        if not piece or len(received) + len(piece) > MAX_ANSWER_BYTES:
            raise IdentityError("the identity agent's answer is cut short or too long")
        received += piece
    return bytes(received)


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())
