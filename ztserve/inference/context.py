"""Which call is the model's code working for?"""

import sys
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar

from ztserve.types import Call

_calls: ContextVar[tuple[Call, ...]] = ContextVar("ztserve_calls", default=())


class working_for:  # noqa: N801 - a context, by hand: each piece of a stream has one
    """Make `calls` current while the model's code runs."""

    __slots__ = ("_given", "_token")

    def __init__(self, calls: tuple[Call, ...]) -> None:
        self._given = calls

    def __enter__(self) -> None:
        self._token = _calls.set(self._given)

    def __exit__(self, *_: object) -> None:
        _calls.reset(self._token)


def inference_mode() -> AbstractContextManager[object]:
    """Run this thread without autograd, where torch is loaded at all."""
    # A thread that is just importing it makes it visible before it is whole.
    mode = getattr(sys.modules.get("torch"), "inference_mode", nullcontext)
    entered: AbstractContextManager[object] = mode()
    return entered


def current_calls() -> tuple[Call, ...]:
    """Return the calls that the running step of `predict` serves; () outside one."""
    return _calls.get()


def current_call() -> Call:
    """Return the one call that `predict` serves.

    Raises RuntimeError outside of `predict`, and in a batch that joined several.
    """
    calls = _calls.get()
    if len(calls) != 1:
        where = "outside of predict" if not calls else f"a batch of {len(calls)} calls"
        raise RuntimeError(
            f"self.call names one call, and this is {where}; self.calls names them all"
        )
    return calls[0]
