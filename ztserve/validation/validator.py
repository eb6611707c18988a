"""A request against what its model declared."""

import re
from collections import Counter
from collections.abc import Sequence

from ztserve.errors import ConfigError, InvalidInput, NotFound
from ztserve.types import Inputs, Request, Spec, Tensor, TensorSpec, Value
from ztserve.validation.tensors import TensorCheck
from ztserve.validation.texts import TextCheck

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")


class Validator:
    """The only maker of Inputs.

    Immutable, so that threads share it. What a caller is told names the input, what
    was wrong and what was expected, by index where it helps; never what was sent.
    """

    def __init__(
        self, inputs: Sequence[Spec], *, model: str, max_rows: int, max_bytes: int
    ) -> None:
        """Prepare the checks of one deployment.

        `max_rows` bounds the batch axis, `max_bytes` the contents of all inputs
        together. Raises ConfigError for declarations that no request could meet.
        """
        names = [spec.name for spec in inputs]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"inputs {names}: expected at least one, each name once")
        if max_rows < 1 or max_bytes < 1:
            raise ConfigError("max_rows and max_bytes must be positive")
        self._model = model
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._names = frozenset(names)
        self._expected = ", ".join(map(repr, names))
        self._checks = tuple(
            TensorCheck(spec) if isinstance(spec, TensorSpec) else TextCheck(spec)
            for spec in inputs
        )

    def check(self, request: Request) -> Inputs:
        """Return the values of `request`, each checked against its spec.

        Raises NotFound for another model's name, InvalidInput for all else.
        """
        if request.model not in ("", self._model):
            raise NotFound(f"there is no such model here; expected {self._model!r}")
        given = {tensor.name: tensor for tensor in request.inputs}
        if given.keys() != self._names or len(given) != len(request.inputs):
            raise self._misnamed(request.inputs)
        self._bound(request.inputs)
        values: dict[str, Value] = {}
        rows, first = 0, ""
        for check in self._checks:
            value = values[check.name] = check.read(given[check.name])
            if isinstance(value, str):
                continue
            if not rows:
                rows, first = value.shape[0], check.name
            elif value.shape[0] != rows:
                raise InvalidInput(
                    f"input {check.name!r}: expected {rows} rows, as many as input "
                    f"{first!r}, got {value.shape[0]}"
                )
        if rows > self._max_rows:
            raise InvalidInput(
                f"input {first!r}: expected at most {self._max_rows} rows, got {rows}"
            )
        return Inputs(values, rows or 1)

    def _bound(self, tensors: Sequence[Tensor]) -> None:
        size = 0
        for tensor in tensors:
            data = tensor.data
            if isinstance(data, tuple):
                size += sum(map(len, data))
            else:
                size += data.nbytes if isinstance(data, memoryview) else len(data)
        if size > self._max_bytes:
            raise InvalidInput(
                f"inputs: expected at most {self._max_bytes} bytes in all, got {size}"
            )

    def _misnamed(self, tensors: Sequence[Tensor]) -> InvalidInput:
        counts = Counter(tensor.name for tensor in tensors)
        for name, count in counts.items():
            # A caller's own word is repeated only where it can be nothing but a name.
            shown = repr(name) if _NAME.match(name) else "(not an identifier)"
            if name not in self._names:
                return InvalidInput(f"unknown input {shown}; expected {self._expected}")
            if count > 1:
                return InvalidInput(f"input {shown}: expected once, got {count} times")
        missing = ", ".join(
            repr(check.name) for check in self._checks if check.name not in counts
        )
        return InvalidInput(f"missing input {missing}; expected {self._expected}")
