"""The node's own trust root, which no configuration that is sent to it can change.

A replica gets its settings from whoever deploys it, trust root included. Where the
owner of the node has put a public key at `ANCHOR`, the settings' root must be that key,
and a deployment bundle is demanded, whatever profile they name. Without one, what signs
the trust policy is what the settings say.
"""

import os
from pathlib import Path

from ztserve.artifacts.statements.keys import key_id, load_public_key
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.errors import ConfigError, IdentityError
from ztserve.identity.guarded_files import read_guarded

ANCHOR = Path("/etc/ztserve/trust-root.pem")
OWNER = 0
"""root: not the user whom the replicas run as."""
MAX_ANCHOR_BYTES = 16 << 10


def anchored() -> str | None:
    """Return the key id of the node's trust root; None: its owner has put none.

    Raises ConfigError on one that is no strong key, does not belong to root, or can be
    changed by others.
    """
    try:
        os.lstat(ANCHOR)
    except FileNotFoundError:
        return None
    except OSError as error:  # there may be one: a folder that we may not look into
        raise ConfigError(
            f"the node's trust root {ANCHOR}: {error.strerror}: whether there is one "
            f"cannot be told; have its folder readable (chmod 0755 {ANCHOR.parent})"
        ) from error
    try:
        raw = read_guarded(ANCHOR, MAX_ANCHOR_BYTES, secret=False)
        owner = ANCHOR.stat().st_uid
    except (IdentityError, OSError) as error:
        raise ConfigError(f"the node's trust root: {error}") from error
    if owner != OWNER:
        raise ConfigError(
            f"the node's trust root {ANCHOR} belongs to uid {owner}, expected {OWNER}: "
            f"whoever deploys could have written it; run chown root {ANCHOR}"
        )
    return key_id(load_public_key(raw, f"the node's trust root ({ANCHOR})"))


def check_anchored(trust: TrustPolicy) -> None:
    """Raise ConfigError where the node has a trust root, and this policy another."""
    root = anchored()
    if root is not None and trust.root != root:
        raise ConfigError(
            f"the trust policy is signed under {trust.root or 'no root'}, and this "
            f"node's trust root is {root} ({ANCHOR}): the node's counts, whatever "
            "[artifacts] trust_root says; name that root there, and have it sign"
        )
