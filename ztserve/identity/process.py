"""What others on this machine may see of this process."""

import ctypes
import hashlib
import os
import resource
import stat
import tempfile
from pathlib import Path

from ztserve.errors import IdentityError

_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4


def harden_process() -> None:
    """Close this process's memory to others of its uid; call it before holding a key.

    Clears the dumpable flag (prctl(2): no ptrace, no /proc/PID/mem, no core dump) and
    sets the core limit to 0. A child process inherits both until it executes another
    program, which sets the flag again. Root and the kernel see everything as before.
    Raises IdentityError where the system has no such call.
    """
    _prctl(_PR_SET_DUMPABLE, 0)
    if is_dumpable():
        raise IdentityError("this process could not be made non-dumpable")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def is_dumpable() -> bool:
    """Return whether other processes of this uid may read this one's memory."""
    return _prctl(_PR_GET_DUMPABLE, 0) != 0


def _prctl(option: int, value: int) -> int:
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except AttributeError:
        raise IdentityError(
            "processes that hold keys are protected by Linux's prctl(2), which this "
            "system does not have"
        ) from None
    zero = ctypes.c_ulong(0)
    result = int(prctl(option, ctypes.c_ulong(value), zero, zero, zero))
    if result < 0:
        raise IdentityError(f"prctl({option}): {os.strerror(ctypes.get_errno())}")
    return result


def private_directory(state_dir: str | os.PathLike[str]) -> Path:
    """Return the directory of the sockets that belong to `state_dir`, made if need be.

    It lies under the system's directory for temporary files, because the path of a
    unix socket may have 107 bytes at most; its name is derived from the uid and the
    absolute path of `state_dir`. Raises IdentityError where it is not a directory of
    ours that nobody else may enter.
    """
    name = hashlib.sha256(os.fsencode(Path(state_dir).absolute())).hexdigest()[:12]
    directory = Path(tempfile.gettempdir()) / f"ztserve-{os.geteuid()}-{name}"
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise IdentityError(f"{directory}: {error.strerror}") from error
    check_private(directory)
    return directory


def check_private(directory: Path) -> None:
    """Raise IdentityError unless `directory` is one, ours, and closed to others."""
    try:
        found = directory.lstat()
    except OSError as error:
        raise IdentityError(f"{directory}: {error.strerror}") from error
    advice = "remove it, and look for who made it"
    if not stat.S_ISDIR(found.st_mode):
        raise IdentityError(f"{directory} is not a directory (a link?): {advice}")
    if found.st_uid != os.geteuid():
        raise IdentityError(f"{directory} belongs to uid {found.st_uid}: {advice}")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise IdentityError(
            f"{directory} has mode {mode:04o}, expected 0700: others can reach the "
            "sockets in it; remove it, or chmod it if you trust what is in it"
        )
