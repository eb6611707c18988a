"""Run it: how do checked inputs pass through the model, one step at a time?"""

from ztserve.inference.context import current_call, current_calls
from ztserve.inference.runner import Runner

__all__ = ["Runner", "current_call", "current_calls"]
