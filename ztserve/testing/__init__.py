"""What do users' tests and ours need?

Throw-away authorities and doubles that are public, real where it matters, and never
imported by what ships.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztserve.testing.authority import ForgedSource, ThrowAwayAuthority
    from ztserve.testing.hostile_agent import HostileAgent
    from ztserve.testing.serving import Served, serve
    from ztserve.testing.simulated_spire import SimulatedSpire

_HOME = {
    "ForgedSource": "ztserve.testing.authority",
    "HostileAgent": "ztserve.testing.hostile_agent",
    "Served": "ztserve.testing.serving",
    "SimulatedSpire": "ztserve.testing.simulated_spire",
    "ThrowAwayAuthority": "ztserve.testing.authority",
    "serve": "ztserve.testing.serving",
}

__all__ = [
    "ForgedSource",
    "HostileAgent",
    "Served",
    "SimulatedSpire",
    "ThrowAwayAuthority",
    "serve",
]


def __getattr__(name: str) -> object:
    # Lazy, so that a test pays only for the rooms that it uses.
    if name not in _HOME:
        raise AttributeError(f"module 'ztserve.testing' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
