"""numpy on the outside, torch on the inside: one turns into the other only here."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ztserve.errors import InferenceError
from ztserve.types import Array, Inputs, Outputs, Spec, TensorSpec, Value

if TYPE_CHECKING:
    import torch


def to_model(
    inputs: Inputs, specs: Sequence[Spec], device: "torch.device | str"
) -> dict[str, Any]:
    """Return the arguments of `predict`: tensors on `device`, texts as str.

    Each tensor is the model's own: writable, and shared with nobody.
    """
    return {
        spec.name: _to_torch(value, spec, device)
        if isinstance(spec, TensorSpec)
        else value
        for spec in specs
        for value in (inputs.values[spec.name],)
    }


def _to_torch(value: Value, spec: TensorSpec, device: "torch.device | str") -> Any:
    import torch

    array = np.asarray(value)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if spec.datatype == "BF16":
        tensor = tensor.view(torch.bfloat16)
    return tensor if device == "cpu" else tensor.to(device, non_blocking=True)


def from_model(result: object, specs: Sequence[Spec]) -> Outputs:
    """Return what `predict` gave, by output name, as copies.

    A dict is taken by name; one value is the sole output. A model may write the next
    caller's answer where it wrote this one: call it while it cannot run. Raises
    InferenceError for anything that is neither tensor, array nor text.
    """
    if isinstance(result, Mapping):
        return Outputs({str(k): _value(str(k), v) for k, v in result.items()})
    if len(specs) != 1:
        raise InferenceError(
            f"predict returned one {type(result).__name__} for {len(specs)} declared "
            "outputs; return a dict by output name"
        )
    return Outputs({specs[0].name: _value(specs[0].name, result)})


def _value(name: str, value: object) -> Value:
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray):
        return value.copy()
    if hasattr(value, "detach"):
        return _from_torch(value)
    raise InferenceError(
        f"output {name!r}: predict gave a {type(value).__name__}; "
        "expected a torch tensor, a numpy array or a str"
    )


def _from_torch(value: Any) -> Array:
    import torch

    tensor = value.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.contiguous().view(torch.uint16)
    copied = tensor.device.type != "cpu"
    array: Array = tensor.cpu().numpy()
    return array if copied else array.copy()
