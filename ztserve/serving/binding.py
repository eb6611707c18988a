"""`bind` and `options`: from a user's class to a Ray Serve application.

Runs at import, and again in every replica: it reads ztserve.toml and nothing else,
opens no socket, starts no process, calls no Ray.
"""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve

from ztserve import config
from ztserve.errors import ConfigError
from ztserve.serving import ray_private
from ztserve.serving.deployment import ZTDeployment
from ztserve.serving.replica import Plan
from ztserve.serving.shell import Shell
from ztserve.types import ModelRef, Spec

_DEFAULTS: Mapping[str, Any] = {
    "max_constructor_retry_count": 1,
    "max_surge_percent": 100,
    "max_ongoing_requests": 32,
    "health_check_period_s": 1,
}
"""A bad update must not hurt: the new replica comes up beside the old, and what failed
to verify is not tried again. Serve notices a death only at the next health check, and
replaces no replica before."""

MAX_QUEUED = 64


@dataclass(frozen=True)
class Remote:
    """A bound deployment on its way into another's arguments.

    Serve replaces `application` by a handle; the handle is never called.
    """

    application: Any
    service: str
    namespace: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]


class Bindable:
    """A deployment with its options; `bind` makes the application."""

    def __init__(self, cls: type[ZTDeployment], options: Mapping[str, Any]) -> None:
        self._cls = cls
        self._options = dict(options)

    def options(self, **options: Any) -> "Bindable":
        """Return a copy with more options."""
        return Bindable(self._cls, {**self._options, **options})

    def bind(self, *args: Any, **kwargs: Any) -> ray_private.Application:
        """Return the application.

        Raises ConfigError for a class without predict, for options that do not fit,
        and for plain Ray applications among the arguments.
        """
        if not hasattr(self._cls, "predict"):
            raise ConfigError(f"class {self._cls.__name__} has no predict to be bound")
        settings = config.load()
        options = {**_DEFAULTS, "name": self._cls.__name__, **self._options}
        plan = Plan(
            settings=settings,
            models=_models(self._cls.model, options.pop("model", None)),
            deploy=secrets.token_hex(8),
            max_ongoing=options["max_ongoing_requests"],
            max_queued=options.pop("max_queued", MAX_QUEUED),
        )
        shell = type(
            self._cls.__name__,
            (Shell,),
            {"_ztserve_deployment": self._cls, "__doc__": self._cls.__doc__},
        )
        namespace = settings.identity.namespace
        deployment: Any = serve.deployment(shell)
        application: ray_private.Application = deployment.options(**options).bind(
            plan,
            tuple(_argument(value, namespace) for value in args),
            {name: _argument(value, namespace) for name, value in kwargs.items()},
        )
        return application


def is_ours(value: Any) -> bool:
    """Tell whether this is an application of a ZTDeployment."""
    return isinstance(value, ray_private.Application) and _shell(value) is not None


def plans(application: ray_private.Application) -> Iterator[Plan]:
    """Yield the plans of an application: its own, and those of what is bound to it."""
    bound: tuple[Any, ...] = ray_private.deployment_of(application).init_args
    plan, args, kwargs = bound
    yield plan
    for value in (*args, *kwargs.values()):
        if isinstance(value, Remote):
            yield from plans(value.application)


def _shell(application: ray_private.Application) -> type[Shell] | None:
    found = ray_private.deployment_of(application).func_or_class
    return found if isinstance(found, type) and issubclass(found, Shell) else None


def _models(
    declared: ModelRef | Mapping[str, ModelRef] | None,
    chosen: ModelRef | str | Mapping[str, ModelRef | str] | None,
) -> dict[str, ModelRef]:
    models = chosen if chosen is not None else declared
    if models is None:
        return {}
    if isinstance(models, Mapping):
        return {part: _ref(ref) for part, ref in models.items()}
    return {"": _ref(models)}


def _ref(ref: ModelRef | str) -> ModelRef:
    return ref if isinstance(ref, ModelRef) else ModelRef(ref)


def _argument(value: Any, namespace: str) -> Any:
    if not isinstance(value, ray_private.Application):
        return value
    shell = _shell(value)
    if shell is None:
        raise ConfigError(
            "a plain Ray Serve application cannot be passed to a ZTDeployment: calls "
            "to it would be plaintext and unauthenticated; make it a ZTDeployment too"
        )
    cls = shell.deployment()
    return Remote(value, cls.service, namespace, cls.inputs, cls.outputs)
