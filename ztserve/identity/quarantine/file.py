"""The file that the quarantine is kept in: read strictly, replaced as a whole.

Whoever may write to the file, its folder or one above decides who is shut out: all must
be ours (or root's) and closed to others' writing (`guarded_files`).
"""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.guarded_files import MissingFileError, read_guarded
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
        raw = read_guarded(path, MAX_FILE_BYTES, secret=False)
    except MissingFileError:
        if not _had_begun(path):
            return None
        try:  # the first list may have come between the two looks
            raw = read_guarded(path, MAX_FILE_BYTES, secret=False)
        except MissingFileError:
            raise IdentityError(
                f"{path} is gone, and with it who was shut out; put it back, or, to let"
                f" all in again, remove {_begun(path)} too"
            ) from None
    try:
        return parse(raw)
    except IdentityError as error:
        raise IdentityError(f"{path}: {error}") from error


def _had_begun(path: Path) -> bool:
    try:
        # A link that leads nowhere is a volume that has lost its list.
        return _begun(path).exists() or path.is_symlink()
    except OSError as error:
        raise IdentityError(f"{_begun(path)}: {error.strerror}") from error


def _begun(path: Path) -> Path:
    """Return the file that says that there has been a list."""
    return path.with_name(f"{path.name}.begun")


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
            if found.st_uid != os.geteuid():
                raise IdentityError(
                    f"{path.parent} belongs to uid {found.st_uid}, who could not read "
                    f"what uid {os.geteuid()} writes there: run this as that user"
                )
            if path.is_symlink():
                raise IdentityError(f"{path} is a link: edit what it leads to")
            entries = changed(read(path) or ())
            _replace(path, entries, folder)
            # After it: who looked in between would take the list for lost.
            _begun(path).touch(mode=0o600)
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
