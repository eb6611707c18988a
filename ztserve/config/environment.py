"""The environment: read here and nowhere else.

Of ours there are two variables, ZTSERVE_CONFIG and SPIFFE_ENDPOINT_SOCKET; the others
belong to libraries.
"""

import os
import sys
from collections.abc import Mapping


def config_file() -> str | None:
    """Return ZTSERVE_CONFIG, if set."""
    return os.environ.get("ZTSERVE_CONFIG") or None


def endpoint_socket() -> str | None:
    """Return SPIFFE_ENDPOINT_SOCKET of this node, if set: it is used unchanged."""
    return os.environ.get("SPIFFE_ENDPOINT_SOCKET") or None


def process_environment() -> dict[str, str]:
    """Return the environment for a process that we start."""
    return dict(os.environ)


def before_ray() -> None:
    """Set what Ray reads when it is imported, where the user has not.

    Without token authentication whoever reaches a port of Ray can run code in every
    replica; without the variable a second shell cannot attach.
    """
    default_environment({"RAY_USAGE_STATS_ENABLED": "0"})
    if "ray" not in sys.modules:
        # Ray reads it once. Set later it would reach Ray's children only, which could
        # not talk to this process then; `ray.init` sees to it in time by itself.
        default_environment({"RAY_AUTH_MODE": "token"})


def default_environment(values: Mapping[str, str]) -> None:
    """Set environment variables of libraries, before they are imported, if unset."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def ray_auth_mode() -> str:
    """Return RAY_AUTH_MODE as this process has it, '' where it is not set."""
    return os.environ.get("RAY_AUTH_MODE", "")
