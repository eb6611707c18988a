"""The file that the quarantine is kept in: read strictly, replaced as a whole.

::

    {"version": 1, "entries": [{"subject": "spiffe://td/ns/x/sa/y", "reason": "...",
                                "added_at": "2026-01-31T12:00:00Z", "by": "..."}]}

Whoever may write to the file or its folder decides who is shut out: both must be ours
(or root's) and closed to others' writing, and the file must be no link.
"""

import contextlib
import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.events import OnEvent
from ztserve.identity.spiffe_id import MAX_BYTES, SCHEME, workload_id

MAX_FILE_BYTES = 512 * 1024
MAX_ENTRIES = 4096
MAX_REASON = 200
"""In characters."""
MAX_SERIAL_DIGITS = 40  # RFC 5280, 4.1.2.2: 20 octets
LOCK_S = 2.0

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Entry:
    """One principal, or one certificate, that is shut out."""

    subject: str
    """A SPIFFE ID, or a certificate's serial number in lower-case hex."""
    reason: str
    added_at: str
    """RFC 3339, UTC."""
    by: str
    """Who added it."""

    def __post_init__(self) -> None:
        if subject(self.subject) != self.subject:
            raise IdentityError(f"{self.subject!r} is not written canonically")
        for name, text, most in (
            ("reason", self.reason, MAX_REASON),
            ("by", self.by, MAX_BYTES),
        ):
            if not 0 < len(text) <= most or not text.isprintable():
                raise IdentityError(
                    f"{name}: expected 1 to {most} printable characters, "
                    f"got {text!r:.60}"
                )
        _check_time(self.added_at)

    @property
    def key(self) -> str | int:
        """What a peer is looked up by: its ID, or its certificate's serial number."""
        by_id = self.subject.startswith(SCHEME)
        return self.subject if by_id else int(self.subject, 16)


def subject(text: str) -> str:
    """Return a SPIFFE ID, or a serial in hex (colons allowed), as it is kept.

    A serial shuts out that certificate, whichever authority issued it. Raises
    IdentityError.
    """
    if text.startswith(SCHEME):
        return workload_id(text)
    digits = text.replace(":", "").lower()
    if not 0 < len(digits) <= MAX_SERIAL_DIGITS or not _HEX.issuperset(digits):
        raise IdentityError(
            f"{text!r:.100} is neither a SPIFFE ID (spiffe://...) nor a certificate's "
            f"serial number (at most {MAX_SERIAL_DIGITS} hex digits)"
        )
    return f"{int(digits, 16):x}"


def parse(raw: bytes) -> tuple[Entry, ...]:
    """Return the entries in `raw`, whatever it is. Raises IdentityError."""
    try:
        document = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise IdentityError(f"is not JSON: {error!s:.100}") from None
    listed = document.get("entries") if isinstance(document, dict) else None
    if not isinstance(listed, list) or document != {"version": 1, "entries": listed}:
        raise IdentityError('expected {"version": 1, "entries": [...]} and no more')
    if len(listed) > MAX_ENTRIES:
        raise IdentityError(f"{len(listed)} entries, at most {MAX_ENTRIES} are allowed")
    entries = tuple(_entry(number, one) for number, one in enumerate(listed))
    if len({entry.subject for entry in entries}) < len(entries):
        raise IdentityError("a subject is listed twice")
    return entries


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


_NAMES = tuple(field.name for field in fields(Entry))


def _entry(number: int, item: object) -> Entry:
    if not isinstance(item, dict) or set(item) != set(_NAMES):
        raise IdentityError(f"entry {number}: expected just {', '.join(_NAMES)}")
    if not all(isinstance(value, str) for value in item.values()):
        raise IdentityError(f"entry {number}: expected texts only")
    try:
        return Entry(**item)
    except IdentityError as error:
        raise IdentityError(f"entry {number}: {error}") from None


def _check_time(text: str) -> None:
    try:
        offset = datetime.fromisoformat(text).utcoffset()
    except ValueError:
        offset = None
    if offset is None or offset:
        raise IdentityError(f"added_at: {text!r:.60} is no time in UTC (RFC 3339)")


def read(path: Path) -> tuple[Entry, ...] | None:
    """Return the entries of the file at `path`; None: there has never been one.

    Raises IdentityError, which names the file, for one that is gone or not as it should
    be.
    """
    try:
        raw = _bytes(path)
        if raw is None and _begun(path).exists():
            raise IdentityError(
                "is gone, and with it who was shut out; put it back, or, to let all in "
                f"again, remove {_begun(path)} too"
            )
        return None if raw is None else parse(raw)
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}") from error
    except IdentityError as error:
        raise IdentityError(f"{path}: {error}") from error


def _begun(path: Path) -> Path:
    """Return the file that says that there has been a list."""
    return path.with_name(f"{path.name}.begun")


def _bytes(path: Path) -> bytes | None:
    # Not through a link, and not blocking: a pipe in its place must hang nobody.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if path.is_symlink():
        raise IdentityError("is a symbolic link, expected the file itself")
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise IdentityError("is not a regular file")
        _check_owned(found, "the file")
        _check_owned(path.parent.stat(), "its folder")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(raw) > MAX_FILE_BYTES:
        raise IdentityError(f"is larger than {MAX_FILE_BYTES} bytes")
    return raw


def _check_owned(found: os.stat_result, what: str) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise IdentityError(f"{what} belongs to uid {found.st_uid}, expected ours")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise IdentityError(
            f"others may write to {what} (mode {stat.S_IMODE(found.st_mode):04o}): "
            "look for who did, then run chmod go-w"
        )


def add(path: Path, text: str, *, reason: str, by: str, on_event: OnEvent) -> Entry:
    """Shut the SPIFFE ID or serial `text` out, in the file at `path`.

    `on_event` is told just before: what it raises stops the change. Raises
    IdentityError where it is listed already, or the file cannot be used.
    """
    now = types.now().strftime("%Y-%m-%dT%H:%M:%SZ")
    new = Entry(subject(text), reason, now, by)

    def changed(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        if any(one.subject == new.subject for one in entries):
            raise IdentityError(f"{new.subject} is in quarantine already")
        _document(path, (*entries, new))  # what does not fit is not told either
        on_event("quarantine-add", asdict(new))
        return (*entries, new)

    _edit(path, changed)
    return new


def remove(path: Path, text: str, *, by: str, on_event: OnEvent) -> str:
    """Let the SPIFFE ID or serial `text` in again; return how it was listed.

    `on_event` and IdentityError are as for `add`.
    """
    gone = subject(text)

    def changed(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        left = tuple(one for one in entries if one.subject != gone)
        if len(left) == len(entries):
            raise IdentityError(f"{gone} is not in quarantine")
        on_event("quarantine-remove", {"subject": gone, "by": by})
        return left

    _edit(path, changed)
    return gone


def _edit(
    path: Path, changed: Callable[[tuple[Entry, ...]], tuple[Entry, ...]]
) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent) as folder:
            found = os.fstat(folder)
            _check_owned(found, str(path.parent))
            if found.st_uid != os.geteuid():
                raise IdentityError(
                    f"{path.parent} belongs to uid {found.st_uid}, who could not read "
                    f"what uid {os.geteuid()} writes there: run this as that user"
                )
            entries = changed(read(path) or ())
            _begun(path).touch(mode=0o600)
            _replace(path, entries, folder)
    except OSError as error:
        raise IdentityError(f"{path}: cannot be written: {error.strerror}") from error


def _document(path: Path, entries: tuple[Entry, ...]) -> bytes:
    document = {"version": 1, "entries": [asdict(entry) for entry in entries]}
    raw = json.dumps(document, indent=1).encode() + b"\n"
    if len(raw) > MAX_FILE_BYTES or len(entries) > MAX_ENTRIES:
        raise IdentityError(
            f"{path}: full ({MAX_ENTRIES} entries, {MAX_FILE_BYTES} bytes): remove "
            "serials of SVIDs that have expired"
        )
    return raw


def _replace(path: Path, entries: tuple[Entry, ...], folder: int) -> None:
    """Write the file anew beside the old one, sync it, and put it in its place."""
    raw = _document(path, entries)
    descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(descriptor)
        Path(new).replace(path)
    except BaseException:
        Path(new).unlink()
        raise
    os.fsync(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock, so that no edit undoes another; give its descriptor."""
    # A private file: the folder itself could be locked by all who may read it.
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(folder / ".quarantine.lock", flags, 0o600)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    until = time.monotonic() + LOCK_S
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise IdentityError(
                        f"{folder}: locked by another edit for {LOCK_S:g} s"
                    ) from None
                time.sleep(0.01)
        yield descriptor
    finally:
        os.close(descriptor)
        os.close(lock)
