"""Who am I, and who is my peer?

`SpiffeId` names a workload. `verify_peer` and `PeerVerifier` judge another's
certificates and are the only makers of `types.Peer`. A `Source` gives our own
`Identity`: `WorkloadSource` from any SPIFFE agent, `FixedSource` one that never
changes. `Agent` and `Authority` are the agent and the trust domain of a developer's
machine, and `register` tells that agent who this process is.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ztserve.identity.admin import admin, admin_path, register, workload_endpoint
from ztserve.identity.attestation import Rules
from ztserve.identity.authority import Authority
from ztserve.identity.peer import PeerVerifier, verify_peer
from ztserve.identity.process import harden_process, is_dumpable, private_directory
from ztserve.identity.source import FixedSource, Source
from ztserve.identity.spiffe_id import SpiffeId
from ztserve.identity.svid import Identity, Svid, dns_name

if TYPE_CHECKING:
    from ztserve.identity.agent import Agent
    from ztserve.identity.workload import WorkloadSource

_HOME = {
    "Agent": "ztserve.identity.agent",
    "WorkloadSource": "ztserve.identity.workload",
}

__all__ = [
    "Agent",
    "Authority",
    "FixedSource",
    "Identity",
    "PeerVerifier",
    "Rules",
    "Source",
    "SpiffeId",
    "Svid",
    "WorkloadSource",
    "admin",
    "admin_path",
    "dns_name",
    "harden_process",
    "is_dumpable",
    "private_directory",
    "register",
    "verify_peer",
    "workload_endpoint",
]


def __getattr__(name: str) -> object:
    # Lazy: these two need gRPC and the Workload API's messages, all others do not.
    if name not in _HOME:
        raise AttributeError(f"module 'ztserve.identity' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
