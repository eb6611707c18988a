"""A deployment as its bundle names it: class, arguments, models, options. No Ray.

What travels to a replica is a name, never the thing: the class is imported there, from
code that was held against the bundle.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ztserve.artifacts import Part, VerifiedDeployment, canonical, load_class
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import ConfigError, VerificationError
from ztserve.types import Spec

if TYPE_CHECKING:
    from ztserve.serving.deployment import ZTDeployment
    from ztserve.serving.replica import Plan

NO_ARGUMENTS = "[[],{}]"
_MEASURED = frozenset({"env_vars", "working_dir", "py_modules", "config"})
"""What a runtime_env may have: the code that it brings is on sys.path, and measured."""
_HARMLESS = frozenset({"PYTHONPATH", "ZTSERVE_CONFIG", "RAY_AUTH_MODE"})
"""Variables: what is found by the first two is measured, and held against what is
signed; the third can only be what `node.check_cluster` demands."""


@dataclass(frozen=True)
class Remote:
    """A bound deployment on its way into another's arguments.

    Serve replaces `application` by a handle; the handle is never called.
    """

    application: Any
    name: str
    service: str
    namespace: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]


def target_of(cls: type) -> str:
    """Return ``module:qualname`` of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def unimportable(cls: type) -> str:
    """Say why a replica could not import this class by its name; '' where it can."""
    if cls.__module__ in ("__main__", "__mp_main__"):
        return "is defined in the module that was started, which replicas do not have"
    if "<locals>" in cls.__qualname__:
        return "is defined within a function"
    found: object = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not cls:
        return f"is not what {target_of(cls)} names"
    return ""


def arguments_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the constructor's arguments as canonical JSON, to be signed.

    A bound deployment among them counts by its names. Raises ConfigError on what JSON
    cannot say.
    """
    try:
        return canonical([_plain(list(args)), _plain(dict(kwargs))])
    except Malformed as error:
        raise ConfigError(
            f"the arguments of the constructor cannot be signed: {error}; give "
            "numbers, texts, lists and dicts, and have the class make the rest"
        ) from error


def check_environment(runtime_env: Mapping[str, Any]) -> None:
    """Refuse what a Ray runtime_env brings into a process that nobody signed.

    `bind` refuses one in production; Serve's configuration file can name it later, for
    the application or the deployment: another agent's socket, another interpreter, a
    library to be preloaded. Raises ConfigError.
    """
    variables = runtime_env.get("env_vars") or {}
    strange = sorted(
        {*({*runtime_env} - _MEASURED), *({*variables} - _HARMLESS)}, key=str
    )
    if strange:
        raise ConfigError(
            f"the runtime_env of this replica has {', '.join(map(repr, strange))}, "
            "which nobody signed: leave it out of Serve's configuration and of "
            "ray.init; what a replica needs belongs into the node's own environment"
        )


def _plain(value: Any) -> Any:
    """Return a value as JSON says it; Malformed on what only looks like one.

    By exact type: an object of a subclass of `str` or `float` equals its text, and
    brings methods, which travel by value.
    """
    if type(value) is Remote:
        names = (value.name, value.namespace, value.service)
        return {"ztserve:deployment": "/".join(map(_plain, names))}
    if type(value) is list:
        return [_plain(item) for item in value]
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    if value is not None and type(value) not in (bool, int, float, str):
        raise Malformed(f"not JSON: {type(value).__qualname__} is none of its kinds")
    return value


def deployment_class(target: str, *, tree: str = "") -> "type[ZTDeployment]":
    """Import the user's class by its name; raises as `load_class`."""
    from ztserve.serving.deployment import ZTDeployment

    cls = load_class(target, tree=tree)
    if not issubclass(cls, ZTDeployment):
        raise ConfigError(f"{target!r} is no ZTDeployment")
    return cls


def admitted_class(
    cls: "type[ZTDeployment] | None",
    plan: "Plan",
    signed: VerifiedDeployment | None,
    arguments: Callable[[], str],
) -> tuple["type[ZTDeployment]", Part | None]:
    """Return the class of a replica, and its part of the bundle where there is one.

    With a bundle it is imported by the name that was signed, after its code was held
    against it, and must then be what was signed. Raises VerificationError, ConfigError.
    """
    if signed is None:
        return (deployment_class(plan.target) if cls is None else cls), None
    if cls is not None:
        raise VerificationError(
            f"the deployment bundle {signed.what}: the code of {target_of(cls)} came "
            "by value, and only a name can be signed: bind a class that lies at the "
            "top of a module"
        )
    signed.check_target(plan.name, plan.target, plan.service)
    named = signed.signed.parts[plan.name]
    cls = deployment_class(plan.target, tree=named.tree)
    return cls, signed.part(part_of(plan, cls, arguments()))


def part_of(
    plan: "Plan",
    cls: "type[ZTDeployment]",
    arguments: str,
    *,
    models: Mapping[str, str] | None = None,
    tree: str = "",
) -> Part:
    """Return what is about to run, as a bundle would name it. Raises ConfigError.

    `models`, `tree`: as they are to be signed; else what the plan asks for.
    """
    asked = {name: str(ref) for name, ref in plan.models.items()}
    return Part(
        name=plan.name or cls.__name__,
        target=target_of(cls),
        service=cls.service,
        labels=dict(cls.labels),
        models=asked if models is None else models,
        arguments=arguments,
        options={"max_ongoing": plan.max_ongoing, "max_queued": plan.max_queued},
        tree=tree,
    )
