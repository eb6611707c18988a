"""The actors of a node: the identity agent, the directory door, the weights broker."""

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import ray

from ztserve import config, identity, transport
from ztserve.config import Settings
from ztserve.errors import ConfigError
from ztserve.serving import ray_private
from ztserve.serving.actor_table import ActorTable
from ztserve.serving.listing import Endpoints, Listing, Place
from ztserve.types import Call

NAMESPACE = "ztserve"
"""Where they are named, in Ray."""


def actor_name(kind: str, settings: Settings, node: str) -> str:
    """Return how Ray knows an actor: its kind is agent, directory or weights."""
    project = hashlib.sha256(str(settings.state).encode()).hexdigest()[:12]
    return f"ztserve-{kind}-{project}-{node}"


class AgentActor:
    """The identity agent: the development authority, or what SPIRE issues."""

    def __init__(self, settings: Settings) -> None:
        identity.harden_process()
        self._quarantine = settings.identity.quarantine
        self._bundle_url = ""
        table = _actor_table(settings)
        authority = self._authority(settings, table)
        self._log = config.open_log(
            settings, "agent", str(os.getpid()), _own_source(settings, authority)
        )
        signed = config.admit(settings, self._log)
        self._federation = config.follow_federation(settings, self._tell, signed=signed)
        self._agent = identity.Agent(
            authority,
            config.agent_directory(settings),
            identity.Rules(
                trust_domain=settings.identity.trust_domain,
                worker_namespaces=(settings.identity.namespace,),
                worker_parent=os.getppid(),
                worker_ids=(settings.directory_id, settings.broker_id),
                local_ids=(
                    settings.gateway_id,
                    settings.developer_id,
                    *_own_ids(settings, settings.registry_id),
                    # No policy names it: an identity to try refusals with.
                    settings.spiffe_id("stranger", "dev"),
                ),
                default_id=settings.developer_id,
            ),
            ttl_s=settings.identity.svid_ttl_s,
            admin_ids=(settings.developer_id,),
            entries=settings.identity.entries,
            check_entries=config.file_check(
                settings, signed, settings.identity.entries
            ),
            selectors=table.selectors,
            check=table.check,
            federation=self._federation,
            extra_ops=identity.quarantine_operations(self._quarantine, self._tell),
            extra_status=self._status,
            on_event=self._tell,
            on_stop=self._stop,
        )
        self._agent.start()
        if settings.identity.bundle_port and isinstance(authority, identity.Authority):
            spiffe_id = settings.spiffe_id("bundle", "ztserve")
            host, port = identity.BundleEndpoint(
                authority.trust_bundle, identity.renewing(authority, spiffe_id)
            ).start(settings.transport.host, settings.identity.bundle_port)
            self._bundle_url = f"https://{host}:{port}/"

    def _authority(
        self, settings: Settings, table: ActorTable
    ) -> identity.Authority | identity.Delegation:
        ours = settings.identity
        if ours.spire_admin_socket is None:
            return identity.Authority(ours.trust_domain).start()
        return identity.Delegation(
            f"unix://{ours.spire_admin_socket}",
            ours.trust_domain,
            further=table.selectors,
            timeout_s=ours.wait_s,
            on_event=self._tell,
        )

    def is_up(self) -> bool:
        """Answer once the agent listens."""
        return True

    def _status(self) -> Mapping[str, object]:
        found: dict[str, object] = {"quarantine": str(self._quarantine)}
        if self._bundle_url:
            found["bundle_endpoint"] = self._bundle_url
        if self._federation is not None:
            found["federation"] = self._federation.status()
            found["federation_problem"] = self._federation.problem
        return found

    def _tell(self, kind: str, fields: Mapping[str, object]) -> None:
        self._log.event(kind, **fields)

    def _stop(self) -> None:
        self._agent.stop()
        self._log.close()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def _own_source(
    settings: Settings, authority: identity.Authority | identity.Delegation
) -> identity.Source:
    name = _agent_id(settings)
    if isinstance(authority, identity.Delegation):
        return authority.own(name)
    svid = authority.issue(name)
    return identity.FixedSource(identity.Identity(svid, authority.bundles))


def _actor_table(settings: Settings) -> ActorTable:
    here = ray.get_runtime_context().get_node_id()
    return ActorTable(
        here,
        namespace=NAMESPACE,
        named={
            settings.directory_id: actor_name("directory", settings, here),
            settings.broker_id: actor_name("weights", settings, here),
            _agent_id(settings): actor_name("agent", settings, here),
        },
    )


def _own_ids(settings: Settings, *ids: identity.SpiffeId) -> Iterator[str]:
    """Yield those IDs that are of our own trust domain: no others are ours to give."""
    ours = settings.identity.trust_domain
    yield from (one for one in ids if one.trust_domain == ours)


def _agent_id(settings: Settings) -> identity.SpiffeId:
    return settings.spiffe_id("agent", "ztserve")


class BrokerActor:
    """The weights broker: hashes each large model once for all replicas of its node.

    It runs none of the user's code.
    """

    def __init__(self, settings: Settings) -> None:
        identity.harden_process()
        source = config.obtain_identity(settings, settings.broker_id)
        log = config.open_log(settings, "weights", str(os.getpid()), source)
        config.admit(settings, log)
        self._broker = config.weights_broker(
            settings, source, log, config.open_quarantine(settings)
        )
        self._broker.start()

    def is_up(self) -> bool:
        """Answer once the broker listens."""
        return True


class DirectoryActor:
    """The directory door: where the replicas are, for those who may ask.

    Also keeps what each deploy resolved its aliases to.
    """

    def __init__(self, settings: Settings) -> None:
        identity.harden_process()
        self._settings = settings
        self._pins: dict[str, str] = {}
        self._listing = Listing()
        self._followed: dict[tuple[str, Place], Any] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._source = config.obtain_identity(settings, settings.directory_id)
        self._log = config.open_log(
            settings, "directory", str(os.getpid()), self._source
        )
        signed = config.admit(settings, self._log)
        self._policies = config.load_policies(
            settings,
            service="directory",
            namespace="ztserve",
            operations=(transport.WATCH,),
            signed=signed,
        )
        self._server = transport.Server(
            transport.directory_methods(self),
            source=self._source,
            limits=config.limits(settings),
            on_refused=lambda refusal: config.record_refusal(self._log, refusal),
            on_handshake_refused=self._log.refused_handshakes,
            quarantine=config.open_quarantine(settings),
        )
        port = settings.directory.port
        host = settings.directory.host
        try:
            host, port = self._server.start(host, range(port, port + 1))
        except ConfigError:
            # Not chained: of a traceback in a traceback, Ray shows the inmost error
            # first, which names keys of the replicas' ports.
            raise ConfigError(
                f"{host}:{port} is taken, by another project's directory perhaps: "
                "choose another [directory] port"
            ) from None
        self._address = f"{host}:{port}"

    def address(self) -> str:
        """Return where the door answers."""
        return self._address

    def pin(self, name: str, digest: str) -> str:
        """Keep the first digest that a deploy resolved; return it ever after."""
        with self._lock:
            return self._pins.setdefault(name, digest)

    def follow(self, key: str, app: str, deployment: str) -> None:
        """Follow a deployment's replicas from now on.

        Several deployments may bear one identity; their replicas are listed together.
        """
        place = (app, deployment)
        with self._lock:
            if (key, place) not in self._followed:
                update = partial(self._listing.update, key, place)
                self._followed[key, place] = ray_private.follow(
                    app, deployment, update, self._loop
                )

    def leave(self, replica: str) -> None:
        """List a replica no longer; it says so itself, before Serve knows."""
        self._listing.leave(replica)

    def listing(self) -> dict[str, Endpoints]:
        """Return all that is known, by namespace/service."""
        return self._listing.all()

    def watch(self, call: Call, deployment: str) -> Iterator[Endpoints]:
        """Yield where a deployment's replicas are, now and at each change."""
        with self._log.record(call) as record:
            record.rule = self._policies.authorize(call).rule
            record.described()
        yield from self._listing.watch(
            deployment,
            lambda: not call.cancelled() and time.monotonic() < call.deadline,
        )
