"""What runs once a node or cluster, beside the replicas: agent, directory, broker.

They are detached, named Ray actors that the first replica gets or creates, the weights
broker only where several replicas have a large model: Ray owns them, they outlive
replicas and applications, and they end with the cluster (or with ``ztserve agent
stop``). Where SPIFFE_ENDPOINT_SOCKET is set, that agent is used and none is created.
"""

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ztserve import config, identity
from ztserve.config import Settings
from ztserve.errors import ConfigError, IdentityError
from ztserve.serving import ray_private
from ztserve.serving.actors import (
    NAMESPACE,
    AgentActor,
    BrokerActor,
    DirectoryActor,
    actor_name,
)
from ztserve.serving.listing import Endpoints

START_S = 60.0
BROKER_START_S = 20.0
"""Replicas can do without the broker, so they wait less for it."""


@dataclass
class Membership:
    """A replica's ties to its node: its identity, and the directory that lists it."""

    source: identity.Source
    directory: str
    app: str
    deployment: str
    replica: str
    """Its ID, of Serve's."""
    key: str
    _actor: Any

    def pin(self, name: str, digest: str) -> str:
        """Return the digest that the first replica of a deploy resolved."""
        return str(_ask(self._actor.pin.remote(name, digest), "the directory"))

    def remind(self) -> None:
        """Have the directory follow this deployment, also after it was restarted."""
        self._actor.follow.remote(self.key, self.app, self.deployment)

    def leave(self) -> None:
        """Have the directory list this replica no longer."""
        self._actor.leave.remote(self.replica)

    def close(self) -> None:
        """Give the identity up."""
        close = getattr(self.source, "close", None)
        if close is not None:
            close()


def join(
    settings: Settings, *, service: str, app: str, deployment: str, replica: str
) -> Membership:
    """Get an identity for this process and find the directory.

    Raises ConfigError where the cluster is not fit, IdentityError where the agent
    stays away.
    """
    check_cluster(settings)
    ensure_agent(settings)
    source = config.obtain_identity(settings, settings.spiffe_id(service))
    actor = _get_or_create(DirectoryActor, "directory", settings)
    address = _ask(actor.address.remote(), "the directory")
    key = f"{settings.identity.namespace}/{service}"
    return Membership(source, address, app, deployment, replica, key, actor)


def check_cluster(settings: Settings) -> None:
    """Refuse a cluster where anybody may run code, or that development is not for."""
    if not ray_private.is_token_auth_enabled():
        raise ConfigError(
            "this Ray cluster runs without authentication, so that whoever reaches a "
            "port of it can run code in every replica; start it, and every shell that "
            "uses it, with: export RAY_AUTH_MODE=token"
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if settings.profile == "development" and len(nodes) > 1:
        raise ConfigError(
            "profile development is for one node, and this cluster has several; set "
            'profile = "production" and run a SPIFFE agent on each node'
        )


def ensure_agent(settings: Settings) -> None:
    """Start the embedded agent of this node, unless the node has one of its own."""
    if config.endpoint_socket() is None and config.has_agent(settings):
        agent = _get_or_create(AgentActor, "agent", settings)
        _ask(agent.is_up.remote(), "the identity agent")


def start_broker(settings: Settings) -> None:
    """Start the weights broker of this node, unless it runs; IdentityError."""
    broker = _get_or_create(BrokerActor, "weights", settings)
    _ask(broker.is_up.remote(), "the weights broker", BROKER_START_S)


def directory_listing(
    settings: Settings,
) -> dict[str, Endpoints]:
    """Return where replicas are, by namespace/service; empty without a directory."""
    for actor in _running(settings, "directory"):
        found: dict[str, Endpoints] = _ask(actor.listing.remote(), "the directory")
        return found
    return {}


def end(settings: Settings) -> None:
    """End broker, directory and agent of this project, with the cluster they are on."""
    for kind in ("weights", "directory", "agent"):
        for actor in _running(settings, kind):
            ray.kill(actor, no_restart=True)


def _running(settings: Settings, kind: str) -> list[Any]:
    """Return this project's actors of one kind, on whatever node."""
    prefix = actor_name(kind, settings, node="")
    return [
        ray.get_actor(known["name"], namespace=NAMESPACE)
        for known in ray.util.list_named_actors(all_namespaces=True)
        if isinstance(known, dict) and known["name"].startswith(prefix)
    ]


def _ask(answer: Any, who: str, timeout_s: float = START_S) -> Any:
    try:
        return ray.get(answer, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        # Not chained: of a traceback in a traceback, Ray shows the inmost error first.
        raise IdentityError(f"{who} could not start: {error.cause}") from None
    except ray.exceptions.RayError as error:
        raise IdentityError(f"{who} does not answer: {error}") from error


def _get_or_create(cls: type, kind: str, settings: Settings) -> Any:
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(cls)
        .options(
            name=actor_name(kind, settings, here),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=16,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(settings)
    )
