"""From settings to rooms: what replica, directory and gateway have in common."""

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

from ztserve import artifacts, identity, transport
from ztserve.audit import Log
from ztserve.authorization import PolicySet
from ztserve.authorization.files import read_files
from ztserve.config import environment
from ztserve.config.deployment import file_name, is_demanded
from ztserve.config.settings import IdentitySettings, Settings
from ztserve.errors import ConfigError, IdentityError
from ztserve.types import Operation, on_clock_step

Signed: TypeAlias = artifacts.VerifiedDeployment | None
"""The deployment bundle that what is built is held against; None: there is none."""
ASK_S = 10.0
"""Longest wait of a person's command for an agent that listens and says nothing."""


def obtain_identity(
    settings: Settings, spiffe_id: identity.SpiffeId | None = None
) -> identity.LiveSource:
    """Get this process its identity from the node's agent, or from files.

    SPIFFE_ENDPOINT_SOCKET comes first, then what is configured to lie on disk (SPIFFE
    Filesystem Delivery, section 3.1), then the embedded agent.

    With the embedded agent, `spiffe_id` is registered for this process first; None
    means the identity that the agent gives to an unregistered process of this user.
    Waits, bounded, for an agent that is away; raises IdentityError then, and where the
    agent gives another identity than `spiffe_id`.
    """
    wait_s = settings.identity.wait_s
    named = environment.endpoint_socket()
    if named is not None:
        # Plain SPIRE gives all processes of one uid the same SVIDs: each takes its own.
        return identity.WorkloadSource(
            named,
            spiffe_id=spiffe_id,
            preferred=settings.developer_id,
            timeout_s=wait_s,
        )
    if settings.identity.svid_files or settings.identity.svid_folder:
        return _ours(_on_disk(settings.identity), spiffe_id)
    if not has_agent(settings):
        raise ConfigError(
            "profile production needs the node's SPIFFE agent: set "
            "SPIFFE_ENDPOINT_SOCKET=unix:///path/of/its/socket, or [identity] "
            "svid_files, svid_folder or spire_admin_socket"
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
        reconnecting=partial(identity.register_again, admin, spiffe_id, timeout_s=1.0),
    )


def has_agent(settings: Settings) -> bool:
    """Return whether this node's agent is one of ours, where no other is named."""
    return settings.profile == "development" or bool(
        settings.identity.spire_admin_socket
    )


def _on_disk(chosen: IdentitySettings) -> identity.LiveSource:
    domain, wait_s = chosen.trust_domain, chosen.wait_s
    if chosen.svid_folder:
        return identity.FolderSource(
            chosen.svid_folder, trust_domain=domain, timeout_s=wait_s
        )
    certificate, key, bundle = chosen.svid_files
    return identity.FileSource(
        certificate, key, bundle, trust_domain=domain, timeout_s=wait_s
    )


def _ours(
    source: identity.LiveSource, spiffe_id: identity.SpiffeId | None
) -> identity.LiveSource:
    given = source.current().svid.id
    if spiffe_id is not None and given != spiffe_id:
        source.close()
        raise IdentityError(
            f"{source.whence}: this process is given {given}, and it is to be "
            f"{spiffe_id}: mend its registration entry"
        )
    return source


def agent_directory(settings: Settings) -> Path:
    """Return the private directory of the embedded agent's sockets."""
    return identity.private_directory(settings.state)


def follow_federation(
    settings: Settings,
    on_event: Callable[[str, Mapping[str, object]], object],
    *,
    signed: Signed = None,
) -> identity.Federation | None:
    """Follow the bundles of those whom we federate with, and the file that names them.

    What `signed` does not sign of it is refused, now and later. Raises ConfigError or
    IdentityError where the file cannot be used.
    """
    path = settings.identity.federation
    if path is None:
        return None
    store = settings.state / "federation"
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = identity.RelationshipFile(
        path, on_event=on_event, check=file_check(settings, signed, path)
    )
    federation = identity.Federation(
        file.relationships,
        trust_domain=settings.identity.trust_domain,
        store=store,
        on_event=on_event,
    )
    file.follow(federation)
    return federation


def open_tokens(
    settings: Settings, source: identity.Source
) -> identity.JwtSource | None:
    """Get our JWT-SVIDs where calls are to bear them; None where they need not.

    Raises ConfigError where our identity does not come from an agent, IdentityError
    where that does not answer.
    """
    if not settings.identity.require_jwt:
        return None
    if not isinstance(source, identity.WorkloadSource):
        raise ConfigError(
            "[identity] require_jwt: tokens come from a SPIFFE agent, and this process "
            "has its SVID from elsewhere; set SPIFFE_ENDPOINT_SOCKET"
        )
    return identity.JwtSource(
        source.socket,
        spiffe_id=source.current().svid.id,
        timeout_s=settings.identity.wait_s,
    )


def open_quarantine(settings: Settings) -> identity.Quarantine:
    """Follow the list of those who are refused; IdentityError if it is unusable."""
    return identity.Quarantine.open(settings.identity.quarantine)


def open_log(
    settings: Settings, service: str, name: str, source: identity.Source
) -> Log:
    """Open this process's own audit file, before anything else can happen."""
    svid = source.current().svid
    log = Log(
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
    on_clock_step(partial(_tell_step, log))
    return log


def _tell_step(log: Log, seconds: float) -> None:
    # On a thread of its own: the log itself may be asking what time it is, locked.
    facts = {"seconds": round(seconds, 3)}
    threading.Thread(
        target=partial(log.event, "clock-stepped", **facts), daemon=True
    ).start()


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
    signed: Signed = None,
) -> PolicySet:
    """Read the policies that bear on one workload; refuse what is not understood.

    With `operations`, a path that none of them bears is refused too; with `signed`, a
    file whose bytes, as they are parsed here, are not those that were signed.
    """
    if signed is None and is_demanded(settings):
        raise ConfigError(
            "policies are to be read without the deployment bundle, which production "
            "demands: this is a fault of ztserve, tell its maintainers"
        )
    texts = read_files(settings.authorization.policies)
    for path, text in texts.items():
        file_check(settings, signed, Path(path))(text.encode())
    return PolicySet.parse(
        texts,
        trust_domain=settings.identity.trust_domain,
        federated=_federated(settings, signed),
        namespace=namespace,
        labels={"app": service, **(labels or {})},
        operations=operations,
    )


def file_check(
    settings: Settings, signed: Signed, path: Path | None
) -> Callable[[bytes], object]:
    """Return what refuses the bytes of a file that are not those signed."""
    if signed is None or path is None:
        return lambda _raw: None
    return partial(signed.check_file, file_name(settings, path))


def check_identity_files(settings: Settings, signed: Signed = None) -> None:
    """Raise ConfigError where entries or relationships are not understood.

    VerificationError where they are not those that were signed.
    """
    ours = settings.identity
    if ours.entries is not None:
        check = file_check(settings, signed, ours.entries)
        identity.EntryFile(ours.entries, ours.trust_domain, check=check)
    _federated(settings, signed)


def _federated(settings: Settings, signed: Signed = None) -> tuple[str, ...]:
    path = settings.identity.federation
    if path is None:
        return ()
    file = identity.RelationshipFile(path, check=file_check(settings, signed, path))
    return tuple(one.trust_domain for one in file.relationships)


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
