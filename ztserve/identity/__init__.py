"""Who am I, and who is my peer?

`SpiffeId` names a workload. `verify_peer` and `PeerVerifier` judge another's
certificates and are the only makers of `types.Peer`. `Quarantine` refuses some of them
all the same. A `Source` gives our own `Identity`: `WorkloadSource` from any SPIFFE
agent, `FileSource` and `FolderSource` from files that another writes, `FixedSource` one
that never changes. `Agent` and `Authority` are the agent and the trust domain of a
developer's machine; with a `Delegation` the agent hands on what SPIRE issues.
`register` tells it who this process is. `Federation` holds the bundles of other trust
domains, and `BundleEndpoint` gives them ours.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ztserve.identity.agent.admin import (
    admin,
    admin_path,
    register,
    register_again,
    workload_endpoint,
)
from ztserve.identity.agent.attestation import Rules
from ztserve.identity.authority.development import Authority
from ztserve.identity.bundle import TrustBundle, parse_bundle_map
from ztserve.identity.file_source import FileSource, FolderSource
from ztserve.identity.jwt.replay import ReplayWindow
from ztserve.identity.jwt.svid import (
    JwtSvid,
    bearer_token,
    sign_jwt_svid,
    verify_jwt_svid,
)
from ztserve.identity.peer import PeerVerifier, verify_peer
from ztserve.identity.process import harden_process, is_dumpable, private_directory
from ztserve.identity.quarantine.check import Quarantine
from ztserve.identity.source import FixedSource, LiveSource, Source
from ztserve.identity.spiffe_id import SpiffeId
from ztserve.identity.svid import Identity, Svid, dns_name

if TYPE_CHECKING:
    from ztserve.identity.agent.delegation import Delegation
    from ztserve.identity.agent.embedded import Agent
    from ztserve.identity.agent.entry_file import EntryFile
    from ztserve.identity.agent.quarantine import quarantine_operations
    from ztserve.identity.federation.bundles import Federation
    from ztserve.identity.federation.endpoint import BundleEndpoint, renewing
    from ztserve.identity.federation.relationship import (
        Relationship,
        read_relationships,
    )
    from ztserve.identity.federation.relationship_file import RelationshipFile
    from ztserve.identity.jwt.proof import JwtProof
    from ztserve.identity.jwt.source import JwtSource
    from ztserve.identity.workload import WorkloadSource

_HOME = {
    "Agent": "ztserve.identity.agent.embedded",
    "BundleEndpoint": "ztserve.identity.federation.endpoint",
    "Delegation": "ztserve.identity.agent.delegation",
    "EntryFile": "ztserve.identity.agent.entry_file",
    "Federation": "ztserve.identity.federation.bundles",
    "JwtProof": "ztserve.identity.jwt.proof",
    "JwtSource": "ztserve.identity.jwt.source",
    "Relationship": "ztserve.identity.federation.relationship",
    "RelationshipFile": "ztserve.identity.federation.relationship_file",
    "WorkloadSource": "ztserve.identity.workload",
    "quarantine_operations": "ztserve.identity.agent.quarantine",
    "read_relationships": "ztserve.identity.federation.relationship",
    "renewing": "ztserve.identity.federation.endpoint",
}

__all__ = [
    "Agent",
    "Authority",
    "BundleEndpoint",
    "Delegation",
    "EntryFile",
    "Federation",
    "FileSource",
    "FixedSource",
    "FolderSource",
    "Identity",
    "JwtProof",
    "JwtSource",
    "JwtSvid",
    "LiveSource",
    "PeerVerifier",
    "Quarantine",
    "Relationship",
    "RelationshipFile",
    "ReplayWindow",
    "Rules",
    "Source",
    "SpiffeId",
    "Svid",
    "TrustBundle",
    "WorkloadSource",
    "admin",
    "admin_path",
    "bearer_token",
    "dns_name",
    "harden_process",
    "is_dumpable",
    "parse_bundle_map",
    "private_directory",
    "quarantine_operations",
    "read_relationships",
    "register",
    "register_again",
    "renewing",
    "sign_jwt_svid",
    "verify_jwt_svid",
    "verify_peer",
    "workload_endpoint",
]


def __getattr__(name: str) -> object:
    # Lazy: these need gRPC or HTTP, all others do not.
    if name not in _HOME:
        raise AttributeError(f"module 'ztserve.identity' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
