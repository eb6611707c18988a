"""The file that the quarantine is kept in: read strictly, replaced as a whole.

Whoever may write to the file or its folder decides who is shut out: both must be ours
(or root's) and closed to others' writing, and the file must be no link.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.quarantine.entry import (
    MAX_FILE_BYTES,
    Entry,
    document,
    parse,
    subject,
)
from ztserve.identity.subscribers import OnEvent

LOCK_S = 2.0


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
        document((*entries, new))  # what does not fit is not told either
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


def _replace(path: Path, entries: tuple[Entry, ...], folder: int) -> None:
    """Write the file anew beside the old one, sync it, and put it in its place."""
    raw = document(entries)
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
