"""What runs once a node or cluster, beside the replicas: the agent and the directory.

Both are detached, named Ray actors that the first replica gets or creates: Ray owns
them, they outlive replicas and applications, and they end with the cluster (or with
``ztserve agent stop``). Where SPIFFE_ENDPOINT_SOCKET is set, that agent is used and
none is created.
"""

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ztserve import config, identity, transport
from ztserve.config import Settings
from ztserve.errors import ConfigError, IdentityError
from ztserve.serving import ray_private
from ztserve.types import Call

NAMESPACE = "ztserve"
START_S = 60.0


@dataclass
class Membership:
    """A replica's ties to its node: its identity, and the directory that lists it."""

    source: identity.Source
    directory: str
    app: str
    deployment: str
    key: str
    _actor: Any

    def pin(self, name: str, digest: str) -> str:
        """Return the digest that the first replica of a deploy resolved."""
        return str(_ask(self._actor.pin.remote(name, digest), "the directory"))

    def remind(self) -> None:
        """Have the directory follow this deployment, also after it was restarted."""
        self._actor.follow.remote(self.key, self.app, self.deployment)

    def close(self) -> None:
        """Give the identity up."""
        close = getattr(self.source, "close", None)
        if close is not None:
            close()


def join(settings: Settings, *, service: str, app: str, deployment: str) -> Membership:
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
    return Membership(source, address, app, deployment, key, actor)


def check_cluster(settings: Settings) -> None:
    """Refuse a cluster in which anybody may run code, or which development is not for."""
    if not ray_private.is_token_auth_enabled():
        raise ConfigError(
            "this Ray cluster runs without authentication, so that whoever reaches a "
            "port of it can run code in every replica; start it, and every shell that "
            "uses it, with: export RAY_AUTH_MODE=token"
        )
    if settings.profile == "development" and len(ray.nodes()) > 1:
        raise ConfigError(
            "profile development is for one node, and this cluster has several; set "
            'profile = "production" and run a SPIFFE agent on each node'
        )


def ensure_agent(settings: Settings) -> None:
    """Start the embedded agent of this node, unless the node has one of its own."""
    if config.endpoint_socket() is None and settings.profile == "development":
        agent = _get_or_create(AgentActor, "agent", settings)
        _ask(agent.is_up.remote(), "the identity agent")


def directory_listing(
    settings: Settings,
) -> dict[str, tuple[transport.Endpoint, ...]]:
    """Return where the replicas are, by namespace/service; empty without a directory."""
    for name in ray.util.list_named_actors(all_namespaces=True):
        if name["name"].startswith(f"ztserve-directory-{_project(settings)}-"):
            actor = ray.get_actor(name["name"], namespace=NAMESPACE)
            found: dict[str, tuple[transport.Endpoint, ...]] = _ask(
                actor.listing.remote(), "the directory"
            )
            return found
    return {}


def end(settings: Settings) -> None:
    """End the directory and the agent of this project, with the cluster they are on."""
    for kind in ("directory", "agent"):
        for name in ray.util.list_named_actors(all_namespaces=True):
            if name["name"].startswith(f"ztserve-{kind}-{_project(settings)}-"):
                actor = ray.get_actor(name["name"], namespace=NAMESPACE)
                ray.kill(actor, no_restart=True)


def _project(settings: Settings) -> str:
    return hashlib.sha256(str(settings.state).encode()).hexdigest()[:12]


def _ask(answer: Any, who: str) -> Any:
    try:
        return ray.get(answer, timeout=START_S)
    except ray.exceptions.RayTaskError as error:
        raise IdentityError(f"{who} could not start: {error.cause}") from error.cause
    except ray.exceptions.RayError as error:
        raise IdentityError(f"{who} does not answer: {error}") from error


def _get_or_create(cls: type, kind: str, settings: Settings) -> Any:
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(cls)
        .options(
            name=f"ztserve-{kind}-{_project(settings)}-{here}",
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


class AgentActor:
    """The development authority and its Workload API front."""

    def __init__(self, settings: Settings) -> None:
        identity.harden_process()
        authority = identity.Authority(settings.identity.trust_domain)
        self._agent = identity.Agent(
            authority,
            config.agent_directory(settings),
            identity.Rules(
                trust_domain=settings.identity.trust_domain,
                worker_namespaces=(settings.identity.namespace,),
                worker_parent=os.getppid(),
                worker_ids=(settings.directory_id,),
                local_ids=(
                    settings.gateway_id,
                    settings.developer_id,
                    # No policy names it: an identity to try refusals with.
                    settings.spiffe_id("stranger", "dev"),
                ),
                default_id=settings.developer_id,
            ),
            ttl_s=settings.identity.svid_ttl_s,
            on_stop=self._stop,
        )
        self._agent.start()

    def is_up(self) -> bool:
        """Answer once the agent listens."""
        return True

    def _stop(self) -> None:
        self._agent.stop()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class DirectoryActor:
    """The directory door: where the replicas are, for those who may ask.

    Also keeps what each deploy resolved its aliases to.
    """

    def __init__(self, settings: Settings) -> None:
        identity.harden_process()
        self._settings = settings
        self._pins: dict[str, str] = {}
        self._targets: dict[str, tuple[transport.Endpoint, ...]] = {}
        self._followed: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._source = config.obtain_identity(settings, settings.directory_id)
        self._log = config.open_log(
            settings, "directory", str(os.getpid()), self._source
        )
        self._policies = config.load_policies(
            settings,
            service="directory",
            namespace="ztserve",
            operations=(transport.WATCH,),
        )
        self._server = transport.Server(
            transport.directory_methods(self),
            source=self._source,
            limits=config.limits(settings),
            on_refused=lambda refusal: config.record_refusal(self._log, refusal),
            on_handshake_refused=self._log.refused_handshakes,
        )
        port = settings.directory.port
        host, port = self._server.start(settings.directory.host, range(port, port + 1))
        self._address = f"{host}:{port}"

    def address(self) -> str:
        """Return where the door answers."""
        return self._address

    def pin(self, name: str, digest: str) -> str:
        """Keep the first digest that a deploy resolved; return it ever after."""
        with self._changed:
            return self._pins.setdefault(name, digest)

    def follow(self, key: str, app: str, deployment: str) -> None:
        """Follow a deployment's replicas from now on."""
        with self._changed:
            if key in self._followed:
                return
            self._followed[key] = ray_private.follow(
                app,
                deployment,
                lambda replicas: self._update(key, replicas),
                self._loop,
            )

    def listing(self) -> dict[str, tuple[transport.Endpoint, ...]]:
        """Return all that is known, by namespace/service."""
        with self._changed:
            return dict(self._targets)

    def _update(self, key: str, replicas: Sequence[Mapping[str, Any]]) -> None:
        with self._changed:
            self._targets[key] = tuple(
                transport.Endpoint(r["address"], r["model"], r["version"], r["digest"])
                for r in replicas
                if r.get("ztserve")
            )
            self._changed.notify_all()

    def watch(
        self, call: Call, deployment: str
    ) -> Iterator[tuple[transport.Endpoint, ...]]:
        """Yield where a deployment's replicas are, now and at each change."""
        with self._log.record(call) as record:
            record.rule = self._policies.authorize(call).rule
            record.described()
        seen: tuple[transport.Endpoint, ...] | None = None
        while not call.cancelled() and time.monotonic() < call.deadline:
            with self._changed:
                current = self._targets.get(deployment, ())
                if current == seen:
                    self._changed.wait(1.0)
                    continue
            seen = current
            yield current
