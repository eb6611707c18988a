"""What Ray Serve instantiates: a shell that hides the user's class.

Serve keeps placement, health, scaling, rolling update and drain, through the hooks
below. Handles and proxies reach nothing: every attribute that they ask for is refused.
That is hygiene, not a boundary: whoever holds the cluster's token can run code in any
replica of it.
"""

import asyncio
import gc
import logging
import os
import traceback
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from ray import serve
from ray.util import metrics

from ztserve import config, transport
from ztserve.errors import ConfigError, Denied, VerificationError, ZTServeError
from ztserve.identity import harden_process
from ztserve.serving import node, ray_private
from ztserve.serving.composition import Composed
from ztserve.serving.parts import Remote, arguments_of, check_environment
from ztserve.serving.replica import Plan, Replica

if TYPE_CHECKING:
    from ztserve.serving.deployment import ZTDeployment

_LOG = logging.getLogger("ray.serve")  # what Serve shows of a replica

_HEARD_S = 0.5
"""How long callers have to hear from the directory that a replica is leaving."""


class Shell:
    """One replica as Serve sees it."""

    _ztserve_deployment: ClassVar["type[ZTDeployment] | None"] = None
    """The user's class where it travels with this one, by value; None: the plan names
    it, and the replica imports it."""

    def __getattribute__(self, name: str) -> Any:
        if name != "__class__" and ray_private.is_serve_request():
            known = object.__getattribute__(self, "__dict__")
            plan = known.get("_plan")
            refusal = Denied(
                f"{plan.name if plan else 'this'} answers only verified callers over "
                "mTLS, not Ray handles or Serve's proxy: use ztserve.Client"
                f"('<namespace>/{plan.service if plan else '<service>'}', ...), the "
                "gateway, or `ztserve predict`"
            )
            replica = known.get("_replica")
            if replica is not None:
                replica.refused(f"Ray handle: {name}", refusal)
            raise refusal
        return object.__getattribute__(self, name)

    @classmethod
    def deployment(cls) -> "type[ZTDeployment] | None":
        """Return the user's class, where it travels with this one."""
        return cls._ztserve_deployment

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._plan = plan
        # Serve prints the constructor's traceback from the top: a cause without one
        # comes first, so that the message begins with our sentence.
        try:
            self._replica, self._node = await asyncio.to_thread(
                _start, self.deployment(), plan, args, kwargs
            )
            self._meter = Meter(self._node.key)
            _LOG.info(
                "%s answers verified callers over mTLS at %s; Serve's own proxy "
                "reaches nothing of it",
                self._node.key,
                self._replica.address,
            )
        except ZTServeError as error:
            traceback.print_exc()
            raise StartupRefused(str(error)) from error.with_traceback(None)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Tell the directory, through Serve, where this replica answers."""
        description = self._replica.description
        return {
            "ztserve": True,
            "address": self._replica.address,
            "model": description.model if description else "",
            "version": description.version if description else "",
            "digest": description.digest if description else "",
            "pid": os.getpid(),
            "replica": self._node.replica,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Let Serve's default policy scale on direct traffic, running plus queued."""
        return {"running_requests": float(self._replica.ongoing)}

    async def check_health(self) -> None:
        """Raise where this replica cannot answer."""
        try:
            self._replica.check_health()
        except VerificationError:
            self._node.leave()  # again: the directory may be another by now
            raise
        self._node.remind()
        self._meter.read(self._replica.outcomes)

    async def __del__(self) -> None:
        replica = self.__dict__.get("_replica")
        if replica is not None:
            _, grace_s = ray_private.replica_options()
            await asyncio.sleep(min(_HEARD_S, grace_s / 2))
            await asyncio.to_thread(replica.stop, max(grace_s - 2 * _HEARD_S, 0.1))
            await asyncio.to_thread(self._node.close)


class Meter:
    """Ray's own metrics: ``ztserve_calls``, by deployment and outcome."""

    def __init__(self, deployment: str) -> None:
        self._calls = metrics.Counter(
            "ztserve_calls",
            description="Calls by outcome.",
            tag_keys=("deployment", "outcome"),
        )
        self._calls.set_default_tags({"deployment": deployment})
        self._told: dict[str, int] = {}

    def read(self, outcomes: Mapping[str, int]) -> None:
        """Add what has come since the last reading."""
        for outcome, count in dict(outcomes).items():
            new = count - self._told.get(outcome, 0)
            if new > 0:
                self._calls.inc(new, tags={"outcome": outcome})
                self._told[outcome] = count


class StartupRefused(ConfigError):
    """A replica refused to start; its message says why and what to do."""


def _shares(plan: Plan) -> bool:
    """Tell whether to share weights: a broker for one replica is a process too many."""
    return plan.settings.artifacts.share_memory and ray_private.most_replicas() > 1


def _start(
    cls: "type[ZTDeployment] | None",
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Replica, node.Membership]:
    harden_process()
    if config.is_demanded(plan.settings):
        check_environment(ray.get_runtime_context().runtime_env)
    context = serve.get_replica_context()
    member = node.join(
        plan.settings,
        service=plan.service,
        app=context.app_name,
        deployment=context.deployment,
        replica=context.replica_id.unique_id,
    )

    def compose(value: Any) -> Any:
        if not isinstance(value, Remote):
            return value
        client = transport.Client(
            f"{value.namespace}/{value.service}",
            source=member.source,
            directory=member.directory,
            directory_id=plan.settings.directory_id,
            quarantine=replica.quarantine,
            tokens=replica.tokens,
        )
        return Composed(client, value.inputs, value.outputs)

    replica = Replica(
        cls,
        replace(plan, name=context.deployment),
        member.source,
        name=context.replica_id.unique_id,
        pin=lambda part, digest: member.pin(
            f"{plan.deploy}/{plan.service}/{part}", digest
        ),
        on_withdrawn=member.leave,
        summon=partial(node.start_broker, plan.settings) if _shares(plan) else None,
        arguments=lambda: arguments_of(args, kwargs),
    )
    replica.start(
        tuple(compose(value) for value in args),
        {name: compose(value) for name, value in kwargs.items()},
    )
    member.remind()
    # What start-up made stays: the collector need not look at it during calls, nor
    # so often (5 percent of the CPU time of a small model's call).
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    return replica, member
