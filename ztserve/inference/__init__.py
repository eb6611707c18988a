"""Run it: how do checked inputs pass through the model, one step at a time?"""

from ztserve.inference.context import current_call, current_calls
from ztserve.inference.runner import Place, Runner

__all__ = ["Place", "Runner", "current_call", "current_calls"]
