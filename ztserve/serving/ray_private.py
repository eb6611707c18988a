"""Every private import of Ray, and nothing else.

Each name is held to by ``tests/contract/test_ray_private.py``, which says on which
Ray versions it ran.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray import cloudpickle
from ray._private.authentication.authentication_token_setup import _enable_token_auth
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.state import state as _state
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
from ray.serve.context import _get_serve_request_context
from ray.serve.deployment import Application, Deployment

__all__ = [
    "ASK_ERRORS",
    "Actor",
    "Application",
    "actor_of",
    "controller_is_up",
    "deployment_of",
    "enable_token_auth",
    "follow",
    "is_serve_request",
    "is_token_auth_enabled",
    "most_replicas",
    "replica_options",
    "replica_place",
    "travels_by_value",
]

ASK_ERRORS = (ray.exceptions.RayError, RuntimeError)
"""What asking the control plane raises when it does not answer."""


class Actor(NamedTuple):
    """An actor as the control plane knows it."""

    name: str
    namespace: str


def enable_token_auth() -> None:
    """Have this process prove itself with a token, also if it knew Ray before.

    Ray reads RAY_AUTH_MODE when it is imported, and not again.
    """
    if not is_token_auth_enabled():
        _enable_token_auth()


def is_serve_request() -> bool:
    """Tell whether this code runs on behalf of a Serve handle or proxy."""
    return bool(_get_serve_request_context().request_id)


def deployment_of(application: Application) -> Deployment:
    """Return the deployment that `bind` wrapped."""
    deployment: Deployment = application._bound_deployment  # noqa: SLF001
    return deployment


def travels_by_value(cls: type) -> bool:
    """Tell whether Ray would send the code of a class, not its name."""
    parts = cls.__module__.split(".")
    names = {".".join(parts[: n + 1]) for n in range(len(parts))}
    by_value: set[str] = cloudpickle.list_registry_pickle_by_value()  # type: ignore[no-untyped-call]
    return bool(names & by_value)


def replica_options() -> tuple[int, float]:
    """Return this replica's max_ongoing_requests and graceful_shutdown_timeout_s."""
    config = ray.serve.get_replica_context()._deployment_config  # noqa: SLF001
    return config.max_ongoing_requests, config.graceful_shutdown_timeout_s


def most_replicas() -> int:
    """Return how many replicas this one's deployment may have at once."""
    config = ray.serve.get_replica_context()._deployment_config  # noqa: SLF001
    scaling = config.autoscaling_config
    return int(scaling.max_replicas if scaling else config.num_replicas or 1)


def controller_is_up() -> bool:
    """Tell whether this cluster runs Serve."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def follow(
    app: str,
    deployment: str,
    changed: Callable[[Sequence[Mapping[str, Any]]], None],
    loop: asyncio.AbstractEventLoop,
) -> LongPollClient:
    """Call `changed` with the metadata of all running replicas, now and ever after.

    Raises ValueError where Serve does not run.
    """
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)

    def updated(targets: Any) -> None:
        changed([info.replica_metadata or {} for info in targets.running_replicas])

    key: Any = (LongPollNamespace.DEPLOYMENT_TARGETS, DeploymentID(deployment, app))
    return LongPollClient(
        controller, {key: updated}, call_in_event_loop=loop, client_id="ztserve"
    )


def actor_of(pid: int, node_id: str) -> Actor | None:
    """Return the actor that process `pid` of a node runs or is about to; None: none.

    Ray notes the worker's pid before it has the worker make the actor. Raises one of
    `ASK_ERRORS`.
    """
    accessor = _state._connect_and_get_accessor()  # noqa: SLF001
    for phase in ("ALIVE", "PENDING_CREATION", "RESTARTING"):
        for row in accessor.get_actor_table(None, phase):
            actor = ActorTableData.FromString(row)
            if actor.pid == pid and actor.address.node_id.hex() == node_id:
                return Actor(actor.name, actor.ray_namespace)
    return None


def replica_place(actor: Actor) -> tuple[str, str] | None:
    """Return the app and deployment that `actor` is a replica of; None: of none."""
    if actor.namespace != SERVE_NAMESPACE or not ReplicaID.is_full_id_str(actor.name):
        return None
    try:
        place = ReplicaID.from_full_id_str(actor.name).deployment_id
    except ValueError:  # somebody's own actor, named a little like one
        return None
    return place.app_name, place.name
