"""Refused handshakes, counted by cause.

gRPC has no hook for a handshake that fails, but its core writes one line for each to
the process's standard error, at its default verbosity. The line tells the cause and no
address, and reads alike where this process was the client of a failed handshake.
"""

import atexit
import faulthandler
import fcntl
import logging
import os
import re
import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

_LOG = logging.getLogger(__name__)

Report: TypeAlias = Callable[[str, int], object]

CAUSES = {
    "WRONG_VERSION_NUMBER": "not TLS",
    "HTTP_REQUEST": "not TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no client certificate",
    "CERTIFICATE_VERIFY_FAILED": "certificate not trusted",
    "UNSUPPORTED_PROTOCOL": "TLS version too old",
    "NO_SHARED_CIPHER": "no common cipher",
}
"""What the core's words mean; all others are "other": a stranger chooses them."""
OTHER = "other"
EVERY_S = 1.0

_LINE = re.compile(
    rb"^[IWE]\d{4} [\d:.]+ +\d+ ssl_transport_security\.cc:\d+\] "
    rb"Handshake failed with error "
    rb"[^\r\n]{0,200}?OPENSSL_internal:([A-Z0-9_]{1,80})"
)
_NAME = re.compile(rb"ssl_transport_security\.cc:\d+\] No match found for server name")
OTHER_NAME = "server of another name expected"
_CORE = re.compile(rb"[IWE]\d{4} ")  # how a line of the core begins
_PIPE_BYTES = 1 << 20
_READ_BYTES = 1 << 16


def watch_handshakes(report: Report) -> Callable[[], None]:
    """Have `report(cause, count)` told of refused handshakes; return how to end that.

    It is called on a thread of its own, at most once a second for each cause, for
    all servers of this process. Meanwhile file descriptor 2 is a pipe: these lines are
    taken out of it, so that strangers cannot fill a log, and all else is passed on to
    the real standard error. The core writes the lines unless the process was started
    with ``GRPC_VERBOSITY`` set to ``ERROR`` or ``NONE``; nothing needs to be set.
    """
    global _tap
    with _lock:
        if _tap is None:
            _tap = _Tap()
        _tap.reports.append(report)
    ended = threading.Event()

    def end() -> None:
        if not ended.is_set():
            ended.set()
            _remove(report)

    return end


def _remove(report: Report) -> None:
    global _tap
    with _lock:
        if _tap is not None:
            _tap.reports.remove(report)
            if not _tap.reports:
                _tap.close()
                _tap = None


class _Tap:
    """The pipe in the place of standard error, and the thread that reads it."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self._counts: Counter[str] = Counter()
        self._rest = b""
        self._closed = False
        self._real = os.dup(2)
        self._read, write = os.pipe()
        # Room enough that a burst never makes a writer wait for the thread below.
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.dup2(write, 2)
        os.close(write)
        if faulthandler.is_enabled():  # a crash must not end in the pipe
            faulthandler.enable(self._real)
        self._thread = threading.Thread(
            target=self._follow, name="ztserve-handshakes", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)  # or the last words before the exit would be lost

    def close(self) -> None:
        """Give standard error back. May be called again."""
        atexit.unregister(self.close)
        if self._closed:
            return
        self._closed = True
        os.dup2(self._real, 2)
        if faulthandler.is_enabled():
            faulthandler.enable(2)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * EVERY_S)

    def _follow(self) -> None:
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        due = time.monotonic() + EVERY_S
        while True:
            pause_s = max(due - time.monotonic(), 0)
            if poll.poll(pause_s * 1000):
                chunk = os.read(self._read, _READ_BYTES)
                if not chunk:  # no writer is left: this tap was closed
                    break
                self._take(chunk)
            if time.monotonic() >= due:
                self._tell()
                due = time.monotonic() + EVERY_S
        self._pass_on(self._rest)
        self._tell()
        os.close(self._read)
        os.close(self._real)

    def _take(self, chunk: bytes) -> None:
        *lines, rest = (self._rest + chunk).split(b"\n")
        self._pass_on(b"".join(line + b"\n" for line in lines if not self._is(line)))
        # A line of the core comes in one piece; whatever else has no end yet, such as
        # a progress bar, is shown at once.
        if _CORE.match(rest) and len(rest) < _READ_BYTES:
            self._rest = rest
        else:
            self._rest = b""
            self._pass_on(rest)

    def _is(self, line: bytes) -> bool:
        if found := _LINE.search(line):
            cause = CAUSES.get(found[1].decode(), OTHER)
        elif _NAME.search(line):
            cause = OTHER_NAME
        else:
            return False
        self._counts[cause] += 1
        return True

    def _pass_on(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._real, data) :]
            except OSError:
                return  # standard error is gone; there is nobody to tell

    def _tell(self) -> None:
        counts, self._counts = self._counts, Counter()
        for cause, count in counts.items():
            for report in tuple(self.reports):
                try:
                    report(cause, count)
                except Exception:  # noqa: BLE001 - logged; the next one is told
                    _LOG.exception("a report of refused handshakes failed")


_lock = threading.Lock()
_tap: _Tap | None = None
