"""A file that nobody else can change or bend: who owns it, and what lies above it.

It may lie in a Kubernetes volume, whose files are links into a directory that is
replaced as a whole (``NAME`` -> ``..data/NAME``, ``..data`` -> ``..TIMESTAMP``). No
other links are followed in the file's own directory.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ztserve.errors import IdentityError

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_SECRET = _WRITABLE | stat.S_IROTH
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_MAX_LINKS = 40
_VERSION = re.compile(r"\.\.[0-9A-Za-z_-][0-9A-Za-z_.-]*")


class MissingFileError(IdentityError):
    """A file is not there: not yet, not now, or not any more."""


def read_guarded(path: Path, most: int, *, secret: bool) -> bytes:
    """Return the at most `most` bytes of a file that only we and root can change.

    With `secret`, others must not be able to read it either (its group may). Raises
    IdentityError; MissingFileError where it is not there.
    """
    forbidden = _SECRET if secret else _WRITABLE
    try:
        with _opened(path) as file:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise IdentityError(f"{path} is not a regular file")
            _check_mode(path, found, forbidden)
            text = bytearray()
            while piece := os.read(file, most + 1 - len(text)):
                text += piece
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL, or what is no file name in our encoding
        raise IdentityError(f"{str(path)!r:.200}: {error}") from error
    if len(text) > most:
        raise IdentityError(f"{path}: over {most} bytes")
    return bytes(text)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file, through the links of a Kubernetes volume and no others."""
    _check_ancestors(path)
    with _closing(os.open(path.parent, _FOLDER)) as folder:
        try:
            file = os.open(path.name, _FLAGS, dir_fd=folder)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            _follow(path, path.name, f"..data/{path.name}".__eq__, folder)
            version = _follow(path, "..data", _VERSION.fullmatch, folder)
            flags = _FOLDER | os.O_NOFOLLOW
            with _closing(os.open(version, flags, dir_fd=folder)) as inner:
                _check_mode(path.parent / version, os.fstat(inner), _WRITABLE)
                file = os.open(path.name, _FLAGS, dir_fd=inner)
        with _closing(file):
            yield file


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _follow(
    path: Path, name: str, allowed: Callable[[str], object], folder: int
) -> str:
    target = os.readlink(name, dir_fd=folder)
    if not allowed(target):
        raise IdentityError(
            f"{path}: {name} is a link to {target[:200]!r}; only those of a Kubernetes "
            "volume are followed (NAME -> ..data/NAME, ..data -> ..TIMESTAMP)"
        )
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    _check_owner(path.parent / name, found)
    return target


def _check_ancestors(path: Path) -> None:
    """Refuse a path that somebody else can bend: each directory and link on its way."""
    place = Path("/")
    _check_place(place)
    ahead = list(reversed(path.parent.absolute().parts[1:]))
    links = 0
    while ahead:
        name = ahead.pop()
        here = place.parent if name == ".." else place / name
        target = _check_place(here)
        if target is None:
            place = here
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        place = Path("/") if target.is_absolute() else place
        ahead.extend(reversed(target.parts[target.is_absolute() :]))


def _check_place(place: Path) -> Path | None:
    """Check a directory or a link; return where the latter leads."""
    found = place.lstat()
    _check_owner(place, found)
    if stat.S_ISLNK(found.st_mode):
        return place.readlink()
    # In a sticky directory nobody can rename what is another's.
    if stat.S_ISDIR(found.st_mode) and not found.st_mode & stat.S_ISVTX:
        _check_mode(place, found, _WRITABLE)
    return None


def _check_mode(path: Path, found: os.stat_result, forbidden: int) -> None:
    _check_owner(path, found)
    if found.st_mode & forbidden:
        readers = " or read it" if forbidden & stat.S_IROTH else ""
        raise IdentityError(
            f"{path} has mode {stat.S_IMODE(found.st_mode):04o}: others can change it"
            f"{readers}; expected none of {forbidden:04o}: look for who did, then chmod"
        )


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise IdentityError(
            f"{path} belongs to uid {found.st_uid}, expected {os.geteuid()} or root"
        )
