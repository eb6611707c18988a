"""A trust policy that is read again whenever its file, or its signature, changes."""

import hashlib
from contextlib import suppress
from pathlib import Path

from ztserve.artifacts.trust.floor import Floor
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.artifacts.trust.signers import read_guarded
from ztserve.errors import ConfigError


class FollowedPolicy:
    """The policy at `path`: the newest that was good, whatever lies there now.

    What cannot be read, is not signed, has expired or is older is not taken: the last
    good one holds on. So nobody undoes a revocation by breaking the file; for how long
    newer ones can be kept away is said by `expires`. Nor by filling the disk: a newer
    policy that the node cannot remember is in force here all the same. Its trust root
    never changes.
    """

    def __init__(
        self,
        path: Path,
        floor: Floor,
        *,
        root: Path | None = None,
        trust_domain: str = "",
    ) -> None:
        self._path = path
        self._root = root
        self._trust_domain = trust_domain
        self._floor = floor
        self._tried = self._stamp()
        self._unkept = ""
        """What has kept the floor from remembering `policy`, where something has."""
        self.policy = self._load()
        floor.keep(self.policy)

    def look(self) -> TrustPolicy | None:
        """Return the policy if it is another than at the last look, else None.

        Raises ConfigError, once for each change, where there is one that is not taken;
        and, once for each cause, where one that was taken cannot be remembered.
        """
        before, stamp = self.policy, self._stamp()
        if stamp != self._tried:
            self._tried = stamp
            self._take()
        elif self._unkept:
            self._keep_again()
        return self.policy if self.policy.digest != before.digest else None

    def _take(self) -> None:
        policy = self._load()
        if policy.root != self.policy.root:
            raise ConfigError(
                f"{self._path} is signed under {policy.root or 'no root'} now, and was "
                f"under {self.policy.root or 'no root'}: what runs keeps its trust root"
            )
        self._floor.check(policy)
        self.policy, self._unkept = policy, "not tried"
        with suppress(ConfigError):  # tried again, and told, at the next look
            self._floor.keep(policy)
            self._unkept = ""

    def _load(self) -> TrustPolicy:
        return TrustPolicy.load(
            self._path, root=self._root, trust_domain=self._trust_domain
        )

    def _keep_again(self) -> None:
        told, self._unkept = self._unkept, ""
        try:
            self._floor.keep(self.policy)
        except ConfigError as error:
            self._unkept = str(error)
            if self._unkept != told:
                raise

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
