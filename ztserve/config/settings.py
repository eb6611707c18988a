"""What ztserve.toml can say: a table a room, frozen, every limit with a default.

A limit has a unit in its name and bounds in its type; none can be switched off.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeAlias

from ztserve.artifacts import RegistryUrl
from ztserve.doors import DoorAddress
from ztserve.errors import ConfigError
from ztserve.identity import SpiffeId

FILE = "ztserve.toml"
DEVELOPMENT_DOMAIN = "dev.ztserve.internal"


class Between(NamedTuple):
    """The bounds of a number, both inclusive."""

    least: float
    most: float


Port: TypeAlias = Annotated[int, Between(0, 65535)]
Count: TypeAlias = Annotated[int, Between(1, 1 << 20)]
Calls: TypeAlias = Annotated[int, Between(1, 1024)]
"""Calls at once: each may hold a thread."""
Bytes: TypeAlias = Annotated[int, Between(1, 1 << 48)]
MessageBytes: TypeAlias = Annotated[int, Between(1, 1 << 30)]
"""Of one message, which is held in memory."""
Seconds: TypeAlias = Annotated[float, Between(0.001, 30 * 86400)]


@dataclass(frozen=True, slots=True)
class IdentitySettings:
    """Who are we?"""

    trust_domain: str = DEVELOPMENT_DOMAIN
    namespace: str = "ml-inference"
    """The namespace of this project's deployments."""
    wait_s: Seconds = 60.0
    """Longest wait for an agent that is away."""
    svid_ttl_s: Annotated[float, Between(1, 86400)] = 3600.0
    """Lifetime of the SVIDs that the development authority issues."""
    require_jwt: bool = False
    """Whether each call to a replica must also bear a JWT-SVID of the caller."""
    svid_files: tuple[Path, ...] = ()
    """Certificate chain, key and our bundle (PEM), where no agent gives an SVID."""
    svid_folder: Path | None = None
    """The same as a SPIFFE credential folder."""
    entries: Path | None = None
    """Registration entries of the embedded agent; None: its own rules hold."""
    federation: Path | None = None
    """With whom the embedded agent federates; None: with nobody."""
    bundle_port: Port = 0
    """Where the embedded agent serves our trust bundle to others; 0: nowhere."""
    quarantine: Path = Path(".ztserve/quarantine.json")
    """Who is refused although their SVID holds; edited by `ztserve quarantine`."""
    spire_admin_socket: Path | None = None
    """SPIRE's admin socket: the agent of this node hands on what SPIRE issues there."""
    admins: tuple[str, ...] = ()
    """SPIFFE IDs that may edit it where there is no embedded agent."""


@dataclass(frozen=True, slots=True)
class ArtifactSettings:
    """Which weights, and whose signature counts?"""

    registry: Path | RegistryUrl | DoorAddress = Path(".ztserve/registry")
    """A folder, a server (oci+https://HOST/PATH, mlflow+https://HOST), or a door."""
    registry_id: str | None = None
    """SPIFFE ID of the registry door; None: ``ns/ztserve/sa/registry`` of ours."""
    registry_credentials: Path | None = None
    """A file of mode 0600 with what a registry's server asks for."""
    trust_policy: Path = Path(".ztserve/trust.toml")
    trust_root: Path | None = None
    """Public key (PEM) under which the trust policy is signed; None: it is not."""
    min_policy_version: Count = 1
    """An older trust policy is refused, also on a node that has seen none."""
    deployment_bundle: Path = Path(".ztserve/deployment.sig")
    """What a deployer signed of all that runs; production demands it."""
    wait_s: Seconds = 60.0
    """Longest wait for a registry that is away."""
    share_memory: bool = True
    """Whether the replicas of a node map one copy of large weights."""
    max_shared_bytes: Bytes = 64 * 1024**3
    """Most memory of all copies of a node; what does not fit, replicas read alone."""

    @property
    def folder(self) -> Path:
        """The registry as a folder to publish into; ConfigError if it is a server."""
        if isinstance(self.registry, Path):
            return self.registry
        raise ConfigError(
            f"[artifacts] registry: {self.registry} is read only; publish into a "
            "folder (--registry FOLDER), then `ztserve registry push`"
        )


@dataclass(frozen=True, slots=True)
class AuthorizationSettings:
    """Who may call?"""

    policies: tuple[Path, ...] = ()
    """Istio YAML files; none: nobody may."""
    delegates: tuple[str, ...] = ()
    """SPIFFE IDs whose word about the end user is taken."""


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """How do calls arrive?"""

    host: str = "127.0.0.1"
    first_port: Port = 0
    """First port that replicas may listen on; 0: any free one."""
    last_port: Port = 0
    max_message_bytes: MessageBytes = 8 * 1024 * 1024
    max_call_s: Seconds = 60.0
    max_body_s: Seconds = 20.0
    max_in_flight: Calls = 128
    max_in_flight_per_principal: Calls = 64
    max_connection_age_s: Seconds = 600.0


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """Where are the replicas?"""

    host: str = "127.0.0.1"
    port: Port = 7443


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How does the outside world come in?"""

    host: str = "127.0.0.1"
    port: Port = 8443
    namespace: str = "ml-api"
    service: str = "api-gateway"
    deployments: tuple[str, ...] = ()
    """The deployments that it routes to, as ``namespace/service`` or ``service``."""


@dataclass(frozen=True, slots=True)
class ValidationSettings:
    """How large may an input be?"""

    max_rows: Count = 1024


@dataclass(frozen=True, slots=True)
class FilteringSettings:
    """How large may an output be?"""

    max_output_bytes: MessageBytes = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """What happened, and where is it written?"""

    directory: Path = Path(".ztserve/audit")
    max_bytes: Bytes = 4 * 1024**3
    reserve_bytes: Bytes = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a process of ztserve is told, frozen; holds no secret."""

    profile: Literal["development", "production"] = "development"
    identity: IdentitySettings = field(default_factory=IdentitySettings)
    artifacts: ArtifactSettings = field(default_factory=ArtifactSettings)
    authorization: AuthorizationSettings = field(default_factory=AuthorizationSettings)
    transport: TransportSettings = field(default_factory=TransportSettings)
    directory: DirectorySettings = field(default_factory=DirectorySettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    filtering: FilteringSettings = field(default_factory=FilteringSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    base: Path = Path()
    """Where the file lies: paths are relative to it. Not a key of the file."""
    file: Path | None = None
    """The file itself; None: there is none, and the defaults hold."""
    set_keys: frozenset[str] = frozenset()
    """The keys that the file sets; the others hold their defaults."""

    @property
    def state(self) -> Path:
        """The project's own directory for keys, registry and audit in development."""
        return self.base / ".ztserve"

    def spiffe_id(self, service: str, namespace: str | None = None) -> SpiffeId:
        """Return the SPIFFE ID of a service of this trust domain."""
        where = namespace or self.identity.namespace
        return SpiffeId.parse(
            f"spiffe://{self.identity.trust_domain}/ns/{where}/sa/{service}"
        )

    @property
    def developer_id(self) -> SpiffeId:
        """The identity of the command line in development."""
        return self.spiffe_id("cli", "dev")

    @property
    def directory_id(self) -> SpiffeId:
        """The identity of the directory door."""
        return self.spiffe_id("directory", "ztserve")

    @property
    def registry_id(self) -> SpiffeId:
        """The identity of the registry door."""
        named = self.artifacts.registry_id
        return SpiffeId.parse(named) if named else self.spiffe_id("registry", "ztserve")

    @property
    def broker_id(self) -> SpiffeId:
        """The identity of the weights broker."""
        return self.spiffe_id("weights", "ztserve")

    @property
    def gateway_id(self) -> SpiffeId:
        """The identity of the gateway."""
        return self.spiffe_id(self.gateway.service, self.gateway.namespace)


def entries(settings: Settings) -> Iterator[tuple[str, object, str]]:
    """Yield each key, its value and where it came from, for `ztserve config show`."""
    yield "profile", settings.profile, _origin(settings, "profile")
    for table in fields(settings):
        value = getattr(settings, table.name)
        if is_dataclass(value):
            for key in fields(value):
                name = f"{table.name}.{key.name}"
                yield name, getattr(value, key.name), _origin(settings, name)


def _origin(settings: Settings, key: str) -> str:
    return str(settings.file) if key in settings.set_keys else "default"
