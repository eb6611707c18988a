"""From settings to rooms: what replica, directory and gateway have in common."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from ztserve import identity, transport
from ztserve.audit import Log
from ztserve.authorization import PolicySet
from ztserve.config import environment
from ztserve.config.settings import Settings
from ztserve.errors import ConfigError, IdentityError
from ztserve.types import Operation

ASK_S = 10.0
"""Longest wait of a person's command for an agent that listens and says nothing."""


def obtain_identity(
    settings: Settings, spiffe_id: identity.SpiffeId | None = None
) -> identity.WorkloadSource:
    """Get this process its identity from the node's agent.

    With the embedded agent, `spiffe_id` is registered for this process first; None
    means the identity that the agent gives to an unregistered process of this user.
    Waits, bounded, for an agent that is away; raises IdentityError then, and where the
    agent gives another identity than `spiffe_id`.
    """
    wait_s = settings.identity.wait_s
    named = environment.endpoint_socket()
    if named is not None:
        source = identity.WorkloadSource(named, timeout_s=wait_s)
        _check_ours(source, spiffe_id)
        return source
    if settings.profile == "production":
        raise ConfigError(
            "profile production needs the node's SPIFFE agent: set "
            "SPIFFE_ENDPOINT_SOCKET=unix:///path/of/its/socket"
        )
    folder = agent_directory(settings)
    endpoint, admin = identity.workload_endpoint(folder), identity.admin_path(folder)
    if spiffe_id is None:
        if not (folder / "workload.sock").exists():
            raise IdentityError(
                f"nothing is running for the project in {settings.base}, so there "
                "is no agent to give an identity: start it: `ztserve run module:app`"
            )
        return identity.WorkloadSource(endpoint, timeout_s=min(wait_s, ASK_S))
    identity.register(admin, spiffe_id, timeout_s=wait_s)
    return identity.WorkloadSource(
        endpoint,
        timeout_s=wait_s,
        # An agent that was started anew knows nobody.
        reconnecting=partial(identity.register, admin, spiffe_id, timeout_s=1.0),
    )


def _check_ours(
    source: identity.WorkloadSource, spiffe_id: identity.SpiffeId | None
) -> None:
    given = source.current().svid.id
    if spiffe_id is not None and given != spiffe_id:
        source.close()
        raise IdentityError(
            f"the SPIFFE agent at {source.socket} gives this process {given}, and it "
            f"is to be {spiffe_id}: mend its registration entry"
        )


def agent_directory(settings: Settings) -> Path:
    """Return the private directory of the embedded agent's sockets."""
    return identity.private_directory(settings.state)


def open_log(
    settings: Settings, service: str, name: str, source: identity.Source
) -> Log:
    """Open this process's own audit file, before anything else can happen."""
    svid = source.current().svid
    return Log(
        settings.audit.directory / f"{service}-{name}.jsonl",
        origin={
            "service": service,
            "replica": name,
            "spiffe_id": str(svid.id),
            "serial": f"{svid.serial:x}",
        },
        max_bytes=settings.audit.max_bytes,
        reserve_bytes=settings.audit.reserve_bytes,
    )


def record_refusal(log: Log, refusal: transport.Refusal) -> None:
    """Audit a call that was refused before there was a `types.Call`."""
    log.refused(
        refusal.path,
        refusal.error,
        principal=refusal.peer.id if refusal.peer else "",
        address=f"{refusal.source_ip}:{refusal.source_port}",
    )


def load_policies(
    settings: Settings,
    *,
    service: str,
    namespace: str,
    labels: Mapping[str, str] | None = None,
    operations: Iterable[Operation] | None,
) -> PolicySet:
    """Read the policies that bear on one workload; refuse what is not understood.

    With `operations`, a path that none of them bears is refused too.
    """
    return PolicySet.load(
        settings.authorization.policies,
        trust_domain=settings.identity.trust_domain,
        namespace=namespace,
        labels={"app": service, **(labels or {})},
        operations=operations,
    )


def limits(settings: Settings) -> transport.Limits:
    """Return the transport's limits as configured."""
    chosen = settings.transport
    return transport.Limits(
        max_message_bytes=chosen.max_message_bytes,
        max_call_s=chosen.max_call_s,
        body_s=chosen.max_body_s,
        max_in_flight=chosen.max_in_flight,
        max_in_flight_per_principal=chosen.max_in_flight_per_principal,
        max_connection_age_s=chosen.max_connection_age_s,
    )
