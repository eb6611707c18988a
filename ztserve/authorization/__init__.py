"""May this peer, for this caller, do this?

Policies are Istio's own YAML (AuthorizationPolicy and PeerAuthentication), so the file
that a mesh enforces is the file that is enforced here. Without one, nobody may.
"""

from ztserve.authorization.policy import PolicySet
from ztserve.authorization.request import AccessRequest, Decision

__all__ = ["AccessRequest", "Decision", "PolicySet"]
