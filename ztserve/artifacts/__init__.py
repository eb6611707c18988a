"""Which weights, and who signed them?

`verify_model` turns a reference into a `VerifiedModel`, or raises: the registry is
read only and not trusted; a `TrustPolicy` names the signers who count. What is
hashed is the very memory that becomes the tensors. Keys, signing and publishing are
the offline half: `ztserve.artifacts.publish`, which nothing that serves imports.
"""

from ztserve.artifacts.loader import verify_model
from ztserve.artifacts.model import VerifiedModel
from ztserve.artifacts.registry import Reader, Registry, Resolved, open_registry
from ztserve.artifacts.release import Release
from ztserve.artifacts.signers import Role, SignedBy, Signer
from ztserve.artifacts.trust import TrustPolicy

__all__ = [
    "Reader",
    "Registry",
    "Release",
    "Resolved",
    "Role",
    "SignedBy",
    "Signer",
    "TrustPolicy",
    "VerifiedModel",
    "open_registry",
    "verify_model",
]
