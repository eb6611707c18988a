"""A trust policy that is read again whenever its file, or its signature, changes."""

import hashlib
from pathlib import Path

from ztserve.artifacts.trust.floor import Floor
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.artifacts.trust.signers import read_guarded
from ztserve.errors import ConfigError


class FollowedPolicy:
    """The policy at `path`: the newest that was good, whatever lies there now.

    What cannot be read, is not signed, has expired or is older is not taken: the last
    good one holds on. So nobody undoes a revocation by breaking the file; for how long
    newer ones can be kept away is said by `expires`.
    """

    def __init__(self, path: Path, floor: Floor, *, root: Path | None = None) -> None:
        self._path = path
        self._root = root
        self._floor = floor
        self._tried = ""
        self.policy = self._load()

    def look(self) -> TrustPolicy | None:
        """Return the policy if it is another than at the last look, else None.

        Raises ConfigError, once for each change, where there is one that is not taken.
        """
        stamp = self._stamp()
        if stamp == self._tried:
            return None
        before = self.policy
        self.policy = self._load()
        return self.policy if self.policy.digest != before.digest else None

    def _load(self) -> TrustPolicy:
        self._tried = self._stamp()
        policy = TrustPolicy.load(self._path, root=self._root)
        self._floor.keep(policy)
        return policy

    def _stamp(self) -> str:
        """Name what lies there now: the policy's text and its signature's."""
        stamp = hashlib.sha256()
        for path in (self._path, self._path.with_name(self._path.name + ".sig")):
            try:
                raw = read_guarded(path)
            except ConfigError as error:
                raw = str(error).encode()
            stamp.update(b"%d " % len(raw) + raw)
        return stamp.hexdigest()
