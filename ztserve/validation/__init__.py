"""Is this input what the model takes?"""

from ztserve.validation.validator import Validator

__all__ = ["Validator"]
