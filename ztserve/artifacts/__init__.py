"""Which weights, and who signed them?

`verify_model` turns a reference into a `VerifiedModel`, or raises: the registry is
read only and not trusted; a `TrustPolicy` names the signers who count. What is
hashed is the very memory that becomes the tensors. Keys, signing and publishing are
the offline half: `ztserve.artifacts.publish`, which nothing that serves imports.
"""

from ztserve.artifacts.loading.judging import Check, Evidence, judge
from ztserve.artifacts.loading.loader import verify_model
from ztserve.artifacts.loading.memory import Memory
from ztserve.artifacts.loading.model import VerifiedModel
from ztserve.artifacts.loading.progress import Progress
from ztserve.artifacts.loading.shared.borrowing import SharedMemory
from ztserve.artifacts.loading.shared.broker import Broker
from ztserve.artifacts.registry.address import Access, RegistryUrl, read_access
from ztserve.artifacts.registry.protocol import (
    Reader,
    Registry,
    Resolved,
    open_registry,
)
from ztserve.artifacts.statements.release import Release
from ztserve.artifacts.trust.floor import Floor
from ztserve.artifacts.trust.following import FollowedPolicy
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.artifacts.trust.signers import Role, SignedBy, Signer

__all__ = [
    "Access",
    "Broker",
    "Check",
    "Evidence",
    "Floor",
    "FollowedPolicy",
    "Memory",
    "Progress",
    "Reader",
    "Registry",
    "RegistryUrl",
    "Release",
    "Resolved",
    "Role",
    "SharedMemory",
    "SignedBy",
    "Signer",
    "TrustPolicy",
    "VerifiedModel",
    "judge",
    "open_registry",
    "read_access",
    "verify_model",
]
