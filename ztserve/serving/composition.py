"""A bound deployment inside another: the same call syntax, over mTLS.

The inner edge is an edge like any other: it needs its own policy, and the callee
judges this deployment's identity and the caller that it acts for.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from ztserve import transport
from ztserve.errors import InferenceError
from ztserve.inference import current_calls
from ztserve.types import Caller, Spec


class Composed:
    """A client of one inner deployment, for use in `predict`.

    Each call carries the caller of the current call and its deadline; neither can be
    set. In ``async def predict``, wrap a call in ``asyncio.to_thread``.
    """

    def __init__(
        self,
        client: transport.Client,
        inputs: tuple[Spec, ...],
        outputs: tuple[Spec, ...],
    ) -> None:
        self._client = client
        self._inputs = inputs
        self._outputs = outputs

    def predict(self, **inputs: Any) -> Any:
        """Return the answer: one value, or a dict where several are declared."""
        answer = self.infer(inputs)
        if len(self._outputs) == 1:
            return answer[self._outputs[0].name]
        return answer

    def infer(self, inputs: Mapping[str, Any]) -> Any:
        """Return the answer by output name. Raises the callee's CallError."""
        caller, timeout_s = _on_behalf()
        return self._client.infer(inputs, caller=caller, timeout_s=timeout_s)

    def stream(self, inputs: Mapping[str, Any]) -> Iterator[Any]:
        """Yield the answer piece by piece."""
        caller, timeout_s = _on_behalf()
        yield from self._client.stream(inputs, caller=caller, timeout_s=timeout_s)


def _on_behalf() -> tuple[Caller | None, float]:
    calls = current_calls()
    if not calls:
        raise InferenceError("a composed deployment can be called from predict only")
    callers = {
        call.caller and (call.caller.issuer, call.caller.subject) for call in calls
    }
    if len(callers) > 1:
        raise InferenceError(
            "this batch joins calls of different callers, and a composed call acts for "
            "one; leave batch out of a deployment that calls others"
        )
    deadline = min(call.deadline for call in calls)
    return calls[0].caller, max(deadline - time.monotonic(), 0.001)
