"""What only holds between settings, and where relative paths lead."""

import ipaddress
import re
from dataclasses import replace
from pathlib import Path

from ztserve.artifacts import RegistryUrl
from ztserve.config.settings import DEVELOPMENT_DOMAIN, IdentitySettings, Settings
from ztserve.errors import ConfigError, IdentityError
from ztserve.identity import SpiffeId

_SPIRES_OWN = ("entries", "federation", "bundle_port", "svid_files", "svid_folder")
_SERVICE_ID = re.compile(r"spiffe://[^/]+/ns/[^/]+/sa/[^/]+\Z")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


def coherent(settings: Settings) -> Settings:
    """Return the settings with their paths made absolute.

    Raises ConfigError where names are no names, or settings contradict each other.
    """
    _check_names(settings)
    _check_ids(settings)
    _check_profile(settings)
    _check_ports(settings)
    _check_registry(settings)
    return _located(settings)


def _check_names(settings: Settings) -> None:
    gateway = settings.gateway
    named = [
        ("[identity] namespace", settings.identity.namespace),
        ("[gateway] namespace", gateway.namespace),
        ("[gateway] service", gateway.service),
    ]
    for deployment in gateway.deployments:
        namespace, slash, service = deployment.rpartition("/")
        named.append(("[gateway] deployments", service))
        if slash:
            named.append(("[gateway] deployments", namespace))
    for where, name in named:
        if not _LABEL.match(name):
            raise ConfigError(
                f"{where}: {name!r} is not a Kubernetes-style name: at most 63 lower "
                "case letters, digits and dashes"
            )


def _check_ids(settings: Settings) -> None:
    try:
        settings.spiffe_id("check")
    except IdentityError as error:
        raise ConfigError(f"[identity] trust_domain: {error}") from error
    ours = settings.identity
    if len(ours.svid_files) not in (0, 3) or (ours.svid_files and ours.svid_folder):
        raise ConfigError(
            "[identity] svid_files: expected three paths (certificate, key, bundle), "
            "and no svid_folder beside them"
        )
    if ours.spire_admin_socket and (beside := _set(ours, *_SPIRES_OWN)):
        raise ConfigError(
            f"[identity] {beside}: not beside spire_admin_socket: entries, bundles and "
            "SVIDs are SPIRE's then; leave it out"
        )
    for where, ids in (
        ("[authorization] delegates", settings.authorization.delegates),
        ("[identity] admins", settings.identity.admins),
        ("[artifacts] registry_id", filter(None, (settings.artifacts.registry_id,))),
    ):
        for one in ids:
            try:
                SpiffeId.parse(one)
            except IdentityError as error:
                raise ConfigError(f"{where}: {error}") from error


def _set(ours: IdentitySettings, *names: str) -> str:
    return next((name for name in names if getattr(ours, name)), "")


def _check_profile(settings: Settings) -> None:
    if settings.profile == "production":
        if settings.identity.trust_domain == DEVELOPMENT_DOMAIN:
            raise ConfigError(
                "[identity] trust_domain: the development domain is refused in "
                "production; name your own"
            )
        if settings.artifacts.trust_root is None:
            raise ConfigError(
                "[artifacts] trust_root: production demands that the trust policy is "
                "signed: make a key away from here (`ztserve key new root.pem --root`),"
                " sign (`ztserve sign trust.toml --key root.pem`), name root.pub here"
            )
        return
    for table in ("transport", "directory", "gateway"):
        host = getattr(settings, table).host
        if not is_loopback(host):
            raise ConfigError(
                f"[{table}] host: {host!r} is not a loopback address, and profile "
                'development stays on this machine; set profile = "production"'
            )


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_ports(settings: Settings) -> None:
    first, last = settings.transport.first_port, settings.transport.last_port
    if first > last:
        raise ConfigError("[transport]: first_port is above last_port; name both")
    if last and not first:
        raise ConfigError(
            "[transport]: first_port 0 means any free port; name it, or leave "
            "last_port out"
        )


def _check_registry(settings: Settings) -> None:
    artifacts = settings.artifacts
    if artifacts.registry_credentials and not isinstance(
        artifacts.registry, RegistryUrl
    ):
        kind = "a folder" if isinstance(artifacts.registry, Path) else "a door"
        raise ConfigError(
            f"[artifacts] registry_credentials: {artifacts.registry} is {kind}, "
            "which asks for none; leave it out, or name a server"
        )
    if not _SERVICE_ID.match(settings.registry_id):
        raise ConfigError(
            f"[artifacts] registry_id: {settings.registry_id} has no service that "
            "policies could speak of: expected spiffe://DOMAIN/ns/NAMESPACE/sa/SERVICE"
        )


def _located(settings: Settings) -> Settings:
    base = settings.base
    artifacts, audit = settings.artifacts, settings.audit
    ours = settings.identity
    return replace(
        settings,
        identity=replace(
            ours,
            entries=ours.entries and base / ours.entries,
            federation=ours.federation and base / ours.federation,
            svid_files=tuple(base / path for path in ours.svid_files),
            svid_folder=ours.svid_folder and base / ours.svid_folder,
            quarantine=base / ours.quarantine,
            spire_admin_socket=ours.spire_admin_socket
            and base / ours.spire_admin_socket,
        ),
        artifacts=replace(
            artifacts,
            registry=base / artifacts.registry
            if isinstance(artifacts.registry, Path)
            else artifacts.registry,
            registry_credentials=artifacts.registry_credentials
            and base / artifacts.registry_credentials,
            trust_policy=base / artifacts.trust_policy,
            trust_root=artifacts.trust_root and base / artifacts.trust_root,
            deployment_bundle=base / artifacts.deployment_bundle,
        ),
        authorization=replace(
            settings.authorization,
            policies=tuple(base / path for path in settings.authorization.policies),
        ),
        audit=replace(audit, directory=base / audit.directory),
    )
