"""The newest trust policy that this node has seen, kept outside any replica.

A replica starts without memory, so it would take an old policy, validly signed, that
knows nothing of a revocation. The floor is a file in the project's state folder.
Whoever may write there can lower it; a new node has none yet: `min_policy_version` in
the configuration is the floor that travels with a deployment.
"""

import fcntl
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ztserve.artifacts.statements.strict import Malformed, get, load_object, only
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.artifacts.trust.signers import read_guarded
from ztserve.errors import ConfigError

FILE = "trust-floor.json"
MAX_FLOOR_BYTES = 4096
LOCK_S = 2.0
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Seen:
    """A version of the policy, and the digest of its text."""

    version: int
    digest: str


class Floor:
    """The floor of one project on one node."""

    def __init__(self, folder: Path, *, least: int = 1) -> None:
        self.path = folder / FILE
        self._least = least

    def check(self, policy: TrustPolicy) -> None:
        """Raise ConfigError if the policy is older than one that was seen.

        Under a trust root also where a version has two texts: who edits raises it.
        """
        if policy.version < self._least:
            raise ConfigError(
                f"the trust policy is version {policy.version}, and [artifacts] "
                f"min_policy_version is {self._least}: fetch the newer policy"
            )
        seen = self.seen()
        if seen is None:
            return
        if policy.version < seen.version:
            raise ConfigError(
                f"the trust policy is version {policy.version}, and this node has seen "
                f"version {seen.version} ({self.path}): an older policy is not taken "
                "back; fetch the newer one, or raise the version of this one"
            )
        same = policy.version == seen.version
        if policy.root and same and policy.digest != seen.digest:
            raise ConfigError(
                f"two trust policies are signed as version {policy.version}: "
                f"{policy.digest} and, seen before, {seen.digest} ({self.path}); "
                "raise the version with each change and sign again"
            )

    def keep(self, policy: TrustPolicy) -> None:
        """Remember the policy as the newest; ConfigError as `check`."""
        now = Seen(policy.version, policy.digest)
        with self._locked():
            self.check(policy)
            if self.seen() == now:
                return
            try:
                self._write(now)
            except OSError as error:
                raise ConfigError(
                    f"{self.path}: {error.strerror}: the node cannot keep which trust "
                    "policy it has seen; make room for it"
                ) from error

    def seen(self) -> Seen | None:
        """Return what was kept last; None where nothing was; ConfigError."""
        check_folder(self.path.parent)
        if not os.path.lexists(self.path):
            return None
        try:
            node = load_object(read_guarded(self.path), limit=MAX_FLOOR_BYTES)
            only(node, ("version", "digest"), "the floor")
            seen = Seen(get(node, "version", int), get(node, "digest", str))
            if seen.version < 1 or not _DIGEST.match(seen.digest):
                raise Malformed("not a version and a digest")
        except Malformed as error:
            raise ConfigError(
                f"{self.path}: {error}; it says which trust policy was seen last: put "
                "it back, or remove it to trust the present policy"
            ) from error
        return seen

    def _write(self, seen: Seen) -> None:
        content = json.dumps({"version": seen.version, "digest": seen.digest}).encode()
        replace(self.path, content)

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.path, "which trust policy it has seen")


def replace(path: Path, content: bytes) -> None:
    """Write a file of ours through a temporary one: readers see old or new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".floor-")
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock beside a file for the block; ConfigError, also after 2 s."""
    lock = path.with_suffix(".lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(lock, flags, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{lock}: {error.strerror}: the node cannot keep {what}; make the folder "
            "writable to this user"
        ) from error
    try:
        _lock(descriptor, lock)
        yield
    finally:
        os.close(descriptor)


def check_folder(folder: Path) -> None:
    """Raise ConfigError where others could remove the floor, and so lower it."""
    try:
        status = folder.stat()
    except OSError:
        return  # nothing is kept there yet
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid not in {0, os.geteuid()} or (
        others and not status.st_mode & stat.S_ISVTX
    ):
        raise ConfigError(
            f"{folder}: others may remove what this node has seen of trust policies "
            f"(uid {status.st_uid}, mode {status.st_mode & 0o7777:o}): run chmod go-w "
            f"{folder}, as its owner"
        )


def _lock(descriptor: int, path: Path) -> None:
    until = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise ConfigError(f"{path} is locked by another process") from error
            time.sleep(0.01)
