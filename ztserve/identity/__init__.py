"""Who am I, and who is my peer?

`SpiffeId` names a workload. `verify_peer` and `PeerVerifier` judge another's
certificates and are the only makers of `types.Peer`. `Quarantine` refuses some of them
all the same. A `Source` gives our own `Identity`: `WorkloadSource` from any SPIFFE
agent, `FileSource` and `FolderSource` from files that another writes, `FixedSource` one
that never changes. `Agent` and `Authority` are the agent and the trust domain of a
developer's machine, and `register` tells that agent who this process is. `Federation`
holds the bundles of other trust domains, and `BundleEndpoint` gives them ours.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ztserve.identity.admin import (
    admin,
    admin_path,
    register,
    register_again,
    workload_endpoint,
)
from ztserve.identity.attestation import Rules
from ztserve.identity.authority import Authority
from ztserve.identity.bundle import TrustBundle, parse_bundle_map
from ztserve.identity.file_source import FileSource, FolderSource
from ztserve.identity.jwt_svid import (
    JwtSvid,
    bearer_token,
    sign_jwt_svid,
    verify_jwt_svid,
)
from ztserve.identity.peer import PeerVerifier, verify_peer
from ztserve.identity.process import harden_process, is_dumpable, private_directory
from ztserve.identity.quarantine import Quarantine, quarantine_operations
from ztserve.identity.replay import ReplayWindow
from ztserve.identity.source import FixedSource, LiveSource, Source
from ztserve.identity.spiffe_id import SpiffeId
from ztserve.identity.svid import Identity, Svid, dns_name

if TYPE_CHECKING:
    from ztserve.identity.agent import Agent
    from ztserve.identity.bundle_endpoint import BundleEndpoint, renewing
    from ztserve.identity.federation import Federation
    from ztserve.identity.jwt_proof import JwtProof
    from ztserve.identity.jwt_source import JwtSource
    from ztserve.identity.relationship import Relationship, read_relationships
    from ztserve.identity.relationship_file import RelationshipFile
    from ztserve.identity.workload import WorkloadSource

_HOME = {
    "Agent": "ztserve.identity.agent",
    "BundleEndpoint": "ztserve.identity.bundle_endpoint",
    "Federation": "ztserve.identity.federation",
    "JwtProof": "ztserve.identity.jwt_proof",
    "JwtSource": "ztserve.identity.jwt_source",
    "Relationship": "ztserve.identity.relationship",
    "RelationshipFile": "ztserve.identity.relationship_file",
    "WorkloadSource": "ztserve.identity.workload",
    "read_relationships": "ztserve.identity.relationship",
    "renewing": "ztserve.identity.bundle_endpoint",
}

__all__ = [
    "Agent",
    "Authority",
    "BundleEndpoint",
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
