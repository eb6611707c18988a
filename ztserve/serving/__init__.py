"""How do replicas run, and where are they? The only room that knows Ray."""

from ztserve.serving.composition import Composed
from ztserve.serving.deployment import ZTDeployment
from ztserve.serving.replica import Replica

__all__ = ["Composed", "Replica", "ZTDeployment"]
