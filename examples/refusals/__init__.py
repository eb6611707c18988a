"""What happens to attackers? Each attack on a running server is a small function."""

from examples.refusals import weights, wire
from examples.refusals.outcome import LetInError, Refusal
from examples.refusals.weights import tamper
from examples.refusals.wire import Door

__all__ = ["Door", "LetInError", "Refusal", "tamper", "weights", "wire"]
