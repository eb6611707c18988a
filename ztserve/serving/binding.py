"""`bind` and `options`: from a user's class to a Ray Serve application.

Runs at import, and again in every replica: it reads ztserve.toml and nothing else,
opens no socket, starts no process, calls no Ray.
"""

import secrets
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ray import serve

from ztserve import config
from ztserve.errors import ConfigError
from ztserve.serving import ray_private
from ztserve.serving.deployment import ZTDeployment
from ztserve.serving.parts import (
    Remote,
    arguments_of,
    deployment_class,
    target_of,
    unimportable,
)
from ztserve.serving.replica import Plan
from ztserve.serving.shell import Shell
from ztserve.types import ModelRef

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


class Bound(NamedTuple):
    """A deployment of an application, as it was bound."""

    plan: Plan
    cls: type[ZTDeployment]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


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
        and for plain Ray applications among the arguments; in production also for a
        class or arguments whose code would travel by value.
        """
        if not hasattr(self._cls, "predict"):
            raise ConfigError(f"class {self._cls.__name__} has no predict to be bound")
        settings = config.load()
        options = {**_DEFAULTS, "name": self._cls.__name__, **self._options}
        carrier, fault = _carrier(self._cls)
        plan = Plan(
            name=options["name"],
            target="" if fault else target_of(self._cls),
            service=self._cls.service,
            settings=settings,
            models=_models(self._cls.model, options.pop("model", None)),
            deploy=secrets.token_hex(8),
            max_ongoing=options["max_ongoing_requests"],
            max_queued=options.pop("max_queued", MAX_QUEUED),
        )
        namespace = settings.identity.namespace
        args = tuple(_argument(value, namespace) for value in args)
        kwargs = {name: _argument(value, namespace) for name, value in kwargs.items()}
        if settings.profile == "production":
            _check_signable(self._cls, fault, options, args, kwargs)
        deployment: Any = serve.deployment(carrier)
        application: ray_private.Application = deployment.options(**options).bind(
            plan, args, kwargs
        )
        return application


def is_ours(value: Any) -> bool:
    """Tell whether this is an application of a ZTDeployment."""
    return isinstance(value, ray_private.Application) and _shell(value) is not None


def bound(application: ray_private.Application) -> Iterator[Bound]:
    """Yield the deployments of an application: its own, and what is bound to it."""
    given: tuple[Any, ...] = ray_private.deployment_of(application).init_args
    plan, args, kwargs = given
    yield Bound(plan, _class(application), args, kwargs)
    for value in (*args, *kwargs.values()):
        if isinstance(value, Remote):
            yield from bound(value.application)


def _class(application: ray_private.Application) -> type[ZTDeployment]:
    plan: Plan = ray_private.deployment_of(application).init_args[0]
    carrier = _shell(application)
    if carrier is None:
        raise ConfigError("a plain Ray Serve application has no class of ours")
    return carrier.deployment() or deployment_class(plan.target)


def _carrier(cls: type[ZTDeployment]) -> tuple[type[Shell], str]:
    """Return what Ray carries, and why that has to be the class's own code.

    One shell that replicas import, with a plan that names the class; where they could
    not import that, a shell of its own, which travels by value.
    """
    fault = unimportable(cls)
    if not fault and ray_private.travels_by_value(cls):
        fault = "is registered to be pickled by value"
    if not fault:
        return Shell, ""
    known = {"_ztserve_deployment": cls, "__doc__": cls.__doc__}
    return type(cls.__name__, (Shell,), known), fault


def _check_signable(
    cls: type[ZTDeployment],
    fault: str,
    options: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    if fault or ray_private.travels_by_value(Shell):
        raise ConfigError(
            f"class {cls.__name__} {fault or 'is carried by a module pickled by value'}"
            ": in production no code travels by value, replicas import what was "
            "signed; put the class at the top of a module, and bind it from there"
        )
    if "runtime_env" in (options.get("ray_actor_options") or {}):
        raise ConfigError(
            f"class {cls.__name__}: ray_actor_options has a runtime_env, which brings "
            "code and variables that nobody signed; leave it out in production"
        )
    arguments_of(args, kwargs)


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
    cls = _class(value)
    name = ray_private.deployment_of(value).name
    return Remote(value, name, cls.service, namespace, cls.inputs, cls.outputs)
