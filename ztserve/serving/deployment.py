"""What a user writes: a class that says what the model is.

Nothing here imports Ray: the class runs under ``ztserve.testing.serve`` without it,
and on a Ray cluster through `bind`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ztserve import config
from ztserve.errors import ConfigError
from ztserve.inference import current_call, current_calls
from ztserve.types import Batch, Call, ModelRef, Spec, TensorSpec, TextSpec

if TYPE_CHECKING:
    from ztserve.serving.binding import Bindable

_SERVICE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class ZTDeployment:
    """Subclass it, never decorate it::

        class Digits(ZTDeployment):
            model = ModelRef("digits@production")
            inputs = (TensorSpec("pixels", "FP32", (-1, 64), low=0, high=16),)
            outputs = (TensorSpec("probabilities", "FP32", (-1, 10), low=0, high=1),)

            def load(self, model):
                self.net = ...                       # model.tensors(), model.read(name)

            def predict(self, pixels):
                return self.net(pixels)

        app = Digits.bind()

    `predict` gets its declared inputs by name (tensors on `self.device` with the batch
    axis first, texts as str) and returns one value or a dict by output name. It may be
    sync, async, a generator or async generator, or return one. `load` is the only way
    to weights; it may be async and slow.

    The class is checked when it is made: ConfigError says what is wrong with it.
    """

    model: ClassVar[ModelRef | Mapping[str, ModelRef] | None] = None
    """Which weights; a dict where a model has several parts; None: it has none."""
    lazy_weights: ClassVar[bool] = False
    """Whether weights are read, and verified, only when `load` asks for them: for ranks
    that hold a part of a model (``model.rows``, ``model.tensors(prefix=...)``). What is
    never asked for is not verified."""
    service: ClassVar[str] = ""
    """The `sa` of its SPIFFE ID and its label `app`; default: the class's name in kebab
    case."""
    labels: ClassVar[Mapping[str, str]] = {}
    """More labels, for the selectors of policies."""
    inputs: ClassVar[tuple[Spec, ...]] = ()
    outputs: ClassVar[tuple[Spec, ...]] = ()
    batch: ClassVar[Batch | None] = None

    device: Any = "cpu"
    """The torch device that the inputs are on: CUDA where the replica has a GPU."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "service" not in vars(cls):
            cls.service = _HUMP.sub("-", cls.__name__).lower().replace("_", "-")
        cls.inputs, cls.outputs = tuple(cls.inputs), tuple(cls.outputs)
        _check(cls)

    def load(self, model: Any) -> Any:
        """Take the verified weights; called once, before the first call."""

    predict: Callable[..., Any]
    """Answers: define it with the declared inputs as parameters."""

    @property
    def call(self) -> Call:
        """The call that `predict` serves: peer, caller, deadline, cancelled, id."""
        return current_call()

    @property
    def calls(self) -> tuple[Call, ...]:
        """All calls that a batch serves."""
        return current_calls()

    @classmethod
    def options(cls, **options: Any) -> Bindable:
        """Say how much: Ray Serve's deployment options, and `model` to pin another.

        ``Digits.options(num_replicas=2, model="digits:3").bind()``
        """
        config.before_ray()
        from ztserve.serving.binding import Bindable

        return Bindable(cls, options)

    @classmethod
    def bind(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the Ray Serve application; its arguments go to ``__init__``.

        Reads ztserve.toml and nothing else. A bound ZTDeployment among the arguments
        arrives as a client that speaks mTLS to it.
        """
        return cls.options().bind(*args, **kwargs)


def _check(cls: type[ZTDeployment]) -> None:
    here = f"class {cls.__name__}: "
    if not _SERVICE.match(cls.service):
        raise ConfigError(
            here + f"service {cls.service!r} must be lower case letters, digits, dashes"
        )
    if not isinstance(cls.model, ModelRef | Mapping | None):
        raise ConfigError(
            here + f"model must be a ModelRef or a dict of them, got {cls.model!r}; "
            f"write model = ModelRef({cls.model!r})"
        )
    if not isinstance(cls.lazy_weights, bool):
        raise ConfigError(
            here + f"lazy_weights must be True or False, got {cls.lazy_weights!r}"
        )
    for kind, specs in (("inputs", cls.inputs), ("outputs", cls.outputs)):
        _check_specs(here + kind, specs)
    if hasattr(cls, "predict"):
        _check_predict(cls, here)
    if cls.batch is not None and not all(
        isinstance(spec, TensorSpec) for spec in cls.inputs + cls.outputs
    ):
        raise ConfigError(
            here + "batch joins tensors on axis 0; texts cannot be joined"
        )


def _check_specs(here: str, specs: tuple[Spec, ...]) -> None:
    for spec in specs:
        if not isinstance(spec, TensorSpec | TextSpec):
            raise ConfigError(f"{here} must hold TensorSpec or TextSpec, got {spec!r}")
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ConfigError(f"{here} name something twice: {', '.join(names)}")


def _check_predict(cls: type[ZTDeployment], here: str) -> None:
    if not cls.inputs or not cls.outputs:
        raise ConfigError(
            here + "declare inputs and outputs, tuples of TensorSpec or TextSpec"
        )
    parameters = list(inspect.signature(cls.predict).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    takes = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}
    needs = {p.name for p in parameters if p.default is p.empty} & takes
    declared = {spec.name for spec in cls.inputs}
    if not needs <= declared <= takes:
        raise ConfigError(
            here + f"predict takes {', '.join(sorted(takes)) or 'nothing'}, and the "
            f"declared inputs are {', '.join(sorted(declared))}; name them alike"
        )
