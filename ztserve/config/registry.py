"""The registry of models: as this project's processes read it, and the door to it."""

from dataclasses import replace

from ztserve import artifacts, identity, transport
from ztserve.audit import Log
from ztserve.config.coherence import is_loopback
from ztserve.config.rooms import (
    Signed,
    limits,
    load_policies,
    obtain_identity,
    open_quarantine,
    record_refusal,
)
from ztserve.config.settings import Settings
from ztserve.doors import (
    MAX_REQUEST_BYTES,
    DoorAddress,
    DoorRegistry,
    RegistryDoor,
    registry_methods,
)
from ztserve.errors import ConfigError

DOOR = DoorAddress("127.0.0.1:7444")
"""Where a door listens that nobody gave an address."""
MAX_IN_FLIGHT = 64
"""Calls at once of a door: each may hold an answer of megabytes."""
MAX_IN_FLIGHT_EACH = 48
"""Of these, of one principal: so that there is room for others."""


def open_registry(
    settings: Settings,
    source: identity.Source | None = None,
    quarantine: identity.Quarantine | None = None,
) -> artifacts.Registry:
    """Open the registry of models, read only.

    A folder, a server with our credentials for it, or a door: that one judges us by
    the identity of `source` (default: the developer's), and is to be closed again.
    Raises RegistryError where there is nothing, ConfigError where the credentials are
    unusable, IdentityError where a door is meant and we have no identity.
    """
    chosen = settings.artifacts
    if isinstance(chosen.registry, DoorAddress):
        return DoorRegistry(
            chosen.registry,
            source=source or obtain_identity(settings),
            door_id=settings.registry_id,
            quarantine=quarantine or open_quarantine(settings),
        )
    path = chosen.registry_credentials
    access = artifacts.read_access(path) if path else None
    return artifacts.open_registry(chosen.registry, access)


def registry_door(
    settings: Settings,
    registry: artifacts.Registry,
    *,
    source: identity.Source,
    log: Log,
    quarantine: identity.Quarantine | None = None,
    signed: Signed = None,
) -> transport.Server:
    """Return the server of a door to `registry`, to be started.

    Raises ConfigError where no policy lets anybody read, VerificationError where
    policies are not those that were `signed`.
    """
    _, _, namespace, _, service = settings.registry_id.path.split("/")
    policies = None
    if settings.authorization.policies:
        policies = load_policies(
            settings,
            service=service,
            namespace=namespace,
            # Which models there are is for the registry to say.
            operations=None,
            signed=signed,
        )
    shadow = "(shadow)"
    if policies is None or not any(
        one.startswith("ALLOW") and not one.endswith(shadow)
        for one in policies.attached
    ):
        named = ", ".join(map(str, settings.authorization.policies)) or "none are named"
        raise ConfigError(
            f"no policy lets anybody read models ([authorization] policies: {named}): "
            f"add an AuthorizationPolicy in namespace {namespace} for app: {service} "
            "that allows GET /v1/registry/NAME"
        )
    usual = limits(settings)
    return transport.Server(
        registry_methods(RegistryDoor(registry, policies, log)),
        source=source,
        limits=replace(
            usual,
            max_message_bytes=MAX_REQUEST_BYTES,
            max_in_flight=min(usual.max_in_flight, MAX_IN_FLIGHT),
            max_in_flight_per_principal=min(
                usual.max_in_flight_per_principal, MAX_IN_FLIGHT_EACH
            ),
        ),
        on_refused=lambda refusal: record_refusal(log, refusal),
        on_handshake_refused=log.refused_handshakes,
        quarantine=quarantine,
    )


def door_listener(settings: Settings, text: str | None = None) -> tuple[str, int]:
    """Return host and port that a door listens on: those of `text`, as HOST:PORT.

    By default those of ztserve.toml's registry, where that is a door. Raises
    ConfigError for no address, and one beyond this machine in development.
    """
    named = settings.artifacts.registry
    address = named if isinstance(named, DoorAddress) else DOOR
    if text is not None:
        address = DoorAddress.parse(f"ztserve://{text}")
    host, port = address.host_port
    if settings.profile == "development" and not is_loopback(host):
        raise ConfigError(
            f"{address}: not a loopback address, and profile development stays on this "
            'machine; set profile = "production"'
        )
    return host, port
