"""What can be told of a process, in SPIRE's form ``type:name:value``.

``unix:uid`` and ``unix:gid`` are the kernel's word. ``unix:path`` and ``unix:sha256``
are those of the program that the process executes; of a process that closed its memory
(`process.harden_process`) only root can read them, and then they hold for nobody else.
``ray:app``, ``ray:deployment`` and ``ray:node`` come from whoever knows Ray.

Only uid, gid and what root reads tell apart processes that do not trust each other: of
one uid, a process can execute another's program, or trace it (hygiene, `attestation`).
"""

import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable
from typing import TypeAlias

from ztserve.errors import IdentityError
from ztserve.identity.agent.attestation import Process

Further: TypeAlias = Callable[[Process], Iterable[str]]
"""Tells the ``ray:`` selectors of a process. Raises CannotTell where it cannot now."""

MAX_PROGRAM_BYTES = 512 * 1024 * 1024
KINDS = frozenset(
    {
        *("unix:uid", "unix:gid", "unix:path", "unix:sha256"),
        *("ray:app", "ray:deployment", "ray:node"),
    }
)
"""All that there are."""
_MAX_DIGESTS = 64
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}"
_KNOWN = re.compile(
    r"unix:[ug]id:(0|[1-9][0-9]{0,9})"
    r"|unix:path:/[^\x00-\x1f\x7f]{1,4095}"
    r"|unix:sha256:[0-9a-f]{64}"
    rf"|ray:(app|deployment|node):{_NAME}"
)


def check_selector(text: str) -> str:
    """Return `text` if it is a selector; IdentityError if not."""
    if not _KNOWN.fullmatch(text):
        raise IdentityError(
            f"selector {text!r:.200}: expected unix:uid:NUMBER, unix:gid:NUMBER, "
            "unix:path:/ABSOLUTE, unix:sha256:HEX, ray:app:NAME, ray:deployment:NAME "
            "or ray:node:NAME"
        )
    return text


def kind(selector: str) -> str:
    """Return a selector without its value, e.g. ``unix:uid``."""
    return ":".join(selector.split(":", 2)[:2])


class Selectors:
    """Tells what holds for a process. Thread-safe.

    `further` is asked for what begins ``ray:``.
    """

    def __init__(self, further: Further = lambda _process: ()) -> None:
        self._further = further
        self._digests: dict[tuple[int, ...], str] = {}
        self._lock = threading.Lock()

    def of(self, process: Process, kinds: Iterable[str]) -> frozenset[str]:
        """Return the selectors of `process`, those of `kinds` at least.

        Raises IdentityError if it has ended, CannotTell if it cannot be judged now.
        """
        wanted = set(kinds)
        found = {f"unix:uid:{process.uid}", f"unix:gid:{process.gid}"}
        if wanted & {"unix:path", "unix:sha256"}:
            found |= self._program(process, hashed="unix:sha256" in wanted)
        if any(name.startswith("ray:") for name in wanted):
            found |= {s for s in self._further(process) if s.startswith("ray:")}
        process.check_alive()  # what was read of its pid is true of it
        return frozenset(found)

    def _program(self, process: Process, *, hashed: bool) -> set[str]:
        link = f"/proc/{process.pid}/exe"
        try:
            path = os.readlink(link)  # noqa: PTH115 - as it stands
            # What cannot be written plainly is nobody's selector.
            found = {f"unix:path:{path}"} if path.isprintable() else set()
            if hashed and (digest := self._digest(link)):
                found.add(f"unix:sha256:{digest}")
        except OSError:
            # Closed to us or gone: then no selector of the program holds.
            return set()
        return found

    def _digest(self, link: str) -> str:
        # Through the link: the very file that is executed, also if it was replaced.
        with open(link, "rb", buffering=0) as program:  # noqa: PTH123
            is_ = os.fstat(program.fileno())
            if not stat.S_ISREG(is_.st_mode) or is_.st_size > MAX_PROGRAM_BYTES:
                return ""
            key = (
                is_.st_dev,
                is_.st_ino,
                is_.st_size,
                is_.st_mtime_ns,
                is_.st_ctime_ns,
            )
            with self._lock:
                known = self._digests.get(key)
            if known is None:
                known = hashlib.file_digest(program, "sha256").hexdigest()
                with self._lock:
                    if len(self._digests) >= _MAX_DIGESTS:
                        self._digests.clear()
                    self._digests[key] = known
        return known
