"""Which weights, and who signed them?

`verify_model` turns a reference into a `VerifiedModel`, or raises: the registry is
read only and not trusted; a `TrustPolicy` names the signers who count. What is
hashed is the very memory that becomes the tensors. Keys, signing and publishing are
the offline half: `ztserve.artifacts.publish`, which nothing that serves imports.
"""

from ztserve.artifacts.deployment.anchor import anchored, check_anchored
from ztserve.artifacts.deployment.floor import DeploymentFloor
from ztserve.artifacts.deployment.importing import guard, load_class
from ztserve.artifacts.deployment.judging import VerifiedDeployment, verify_deployment
from ztserve.artifacts.deployment.measuring import (
    LEFT_OUT,
    Tree,
    is_found,
    measure_packages,
    measure_tree,
    root_of,
)
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
from ztserve.artifacts.statements.deployment import (
    Code,
    Deployment,
    Part,
    canonical,
)
from ztserve.artifacts.statements.envelope import MAX_BUNDLE_BYTES
from ztserve.artifacts.statements.release import Release
from ztserve.artifacts.trust.floor import Floor
from ztserve.artifacts.trust.following import FollowedPolicy
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.artifacts.trust.signers import Role, SignedBy, Signer

__all__ = [
    "LEFT_OUT",
    "MAX_BUNDLE_BYTES",
    "Access",
    "Broker",
    "Check",
    "Code",
    "Deployment",
    "DeploymentFloor",
    "Evidence",
    "Floor",
    "FollowedPolicy",
    "Memory",
    "Part",
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
    "Tree",
    "TrustPolicy",
    "VerifiedDeployment",
    "VerifiedModel",
    "anchored",
    "canonical",
    "check_anchored",
    "guard",
    "is_found",
    "judge",
    "load_class",
    "measure_packages",
    "measure_tree",
    "open_registry",
    "read_access",
    "root_of",
    "verify_deployment",
    "verify_model",
]
