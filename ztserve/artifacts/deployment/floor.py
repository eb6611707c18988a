"""The newest bundle of each application that this node has seen.

As the trust policy's floor: a replica starts without memory, so an older bundle,
validly signed, would bring back what a newer one had mended. Whoever may write to the
state folder can lower it, and a new node has none: what must never return is revoked in
the trust policy by its digest.
"""

import json
import os
from pathlib import Path

from ztserve.artifacts.statements.deployment import Deployment
from ztserve.artifacts.statements.strict import Malformed, as_object, get, load_object
from ztserve.artifacts.trust.floor import locked, replace
from ztserve.artifacts.trust.signers import read_guarded
from ztserve.errors import ConfigError, VerificationError

FILE = "deployment-floor.json"
MAX_FLOOR_BYTES = 1 << 20
MAX_APPLICATIONS = 1024


class DeploymentFloor:
    """The floor of one project on one node."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def check(self, deployment: Deployment) -> None:
        """Raise VerificationError if the bundle is older than one that was seen.

        Also where a sequence has two bundles. ConfigError on an unusable file.
        """
        self._check(deployment, self._seen())

    def keep(self, deployment: Deployment) -> None:
        """Remember the bundle as the newest of its application; raises as `check`."""
        with locked(self.path, "which deployment bundles it has seen"):
            seen = self._seen()
            self._check(deployment, seen)
            now = (deployment.sequence, deployment.digest)
            if seen.get(deployment.application) != now:
                seen[deployment.application] = now
                try:
                    self._write(seen)
                except OSError as error:
                    raise ConfigError(
                        f"{self.path}: {error.strerror}: the node cannot keep which "
                        "deployment bundles it has seen; make room for it"
                    ) from error

    def newest(self, application: str) -> int:
        """Return the sequence of the newest bundle that was seen; 0: none was."""
        return self._seen().get(application, (0, ""))[0]

    def _check(self, ours: Deployment, known: dict[str, tuple[int, str]]) -> None:
        sequence, digest = known.get(ours.application, (0, ""))
        if ours.sequence < sequence:
            raise VerificationError(
                f"the deployment bundle of {ours.application} is number "
                f"{ours.sequence}, and this node has seen number {sequence} "
                f"({self.path}): an older bundle is not taken back; sign what is to "
                "run anew (`ztserve bundle sign`)"
            )
        if ours.sequence == sequence and ours.digest != digest:
            raise VerificationError(
                f"two deployment bundles of {ours.application} are number {sequence}: "
                f"{ours.digest} and, seen before, {digest} ({self.path}); sign anew "
                f"with --sequence {sequence + 1}"
            )

    def _seen(self) -> dict[str, tuple[int, str]]:
        if not os.path.lexists(self.path):
            return {}
        try:
            node = load_object(read_guarded(self.path), limit=MAX_FLOOR_BYTES)
            return {name: _entry(as_object(node[name], name)) for name in node}
        except Malformed as error:
            raise ConfigError(
                f"{self.path}: {error}; it says which deployment bundles were seen: "
                "put it back, or remove it to trust the present one"
            ) from error

    def _write(self, seen: dict[str, tuple[int, str]]) -> None:
        if len(seen) > MAX_APPLICATIONS:
            raise ConfigError(
                f"{self.path} knows {MAX_APPLICATIONS} applications: remove it, and "
                "each starts afresh with its present bundle"
            )
        node = {name: {"sequence": s, "digest": d} for name, (s, d) in seen.items()}
        replace(self.path, json.dumps(node).encode())


def _entry(node: object) -> tuple[int, str]:
    found = as_object(node, "an application")
    return get(found, "sequence", int), get(found, "digest", str)
