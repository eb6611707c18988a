"""ztserve.toml, read once, into frozen settings.

One file, a table a room. An unknown key is an error, every limit has a default and a
unit in its name, and none can be switched off. The file is found by ZTSERVE_CONFIG,
else ``ztserve.toml`` in the working directory, else the development defaults hold; it
is never looked for in parent directories. Paths are relative to the file.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
import types as python_types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ztserve.config import environment
from ztserve.errors import ConfigError, IdentityError
from ztserve.identity import SpiffeId

FILE = "ztserve.toml"
MAX_FILE_BYTES = 256 * 1024
DEVELOPMENT_DOMAIN = "dev.ztserve.internal"


@dataclass(frozen=True, slots=True)
class IdentitySettings:
    """Who are we?"""

    trust_domain: str = DEVELOPMENT_DOMAIN
    namespace: str = "ml-inference"
    """The namespace of this project's deployments."""
    wait_s: float = 60.0
    """Longest wait for an agent that is away."""
    svid_ttl_s: float = 3600.0
    """Lifetime of the SVIDs that the development authority issues."""


@dataclass(frozen=True, slots=True)
class ArtifactSettings:
    """Which weights, and whose signature counts?"""

    registry: Path = Path(".ztserve/registry")
    trust_policy: Path = Path(".ztserve/trust.toml")
    wait_s: float = 60.0
    """Longest wait for a registry that is away."""


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
    first_port: int = 0
    """First port that replicas may listen on; 0: any free one."""
    last_port: int = 0
    max_message_bytes: int = 8 * 1024 * 1024
    max_call_s: float = 60.0
    max_body_s: float = 20.0
    max_in_flight: int = 128
    max_in_flight_per_principal: int = 64
    max_connection_age_s: float = 600.0


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """Where are the replicas?"""

    host: str = "127.0.0.1"
    port: int = 7443


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How does the outside world come in?"""

    host: str = "127.0.0.1"
    port: int = 8443
    namespace: str = "ml-api"
    service: str = "api-gateway"
    deployments: tuple[str, ...] = ()
    """The deployments that it routes to, as ``namespace/service`` or ``service``."""


@dataclass(frozen=True, slots=True)
class ValidationSettings:
    """How large may an input be?"""

    max_rows: int = 1024


@dataclass(frozen=True, slots=True)
class FilteringSettings:
    """How large may an output be?"""

    max_output_bytes: int = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """What happened, and where is it written?"""

    directory: Path = Path(".ztserve/audit")
    max_bytes: int = 4 * 1024**3
    reserve_bytes: int = 256 * 1024**2


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
    def gateway_id(self) -> SpiffeId:
        """The identity of the gateway."""
        return self.spiffe_id(self.gateway.service, self.gateway.namespace)


def load(path: Path | None = None) -> Settings:
    """Read the configuration.

    Raises ConfigError for a file that cannot be read, is writable by others, holds an
    unknown key, or a value of the wrong kind.
    """
    found = path or _find()
    if found is None:
        return _resolved(Settings(base=Path.cwd()))
    return _resolved(_parse(found))


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
    return str(settings.base / FILE) if key in settings.set_keys else "default"


def _find() -> Path | None:
    named = environment.config_file()
    if named:
        path = Path(named)
        if not path.is_file():
            raise ConfigError(
                f"ZTSERVE_CONFIG names {named}, and there is no such file"
            )
        return path
    here = Path.cwd() / FILE
    return here if here.is_file() else None


def _parse(path: Path) -> Settings:
    tree = _read(path)
    known: dict[str, Any] = {"base": path.resolve().parent}
    set_keys = set()
    hints = get_type_hints(Settings)
    for name, value in tree.items():
        if name == "profile":
            known[name] = _value(value, hints[name], f"{path}: profile")
            set_keys.add(name)
        elif is_dataclass(kind := hints.get(name)) and isinstance(value, dict):
            known[name] = _table(kind, value, f"{path}: [{name}]")
            set_keys |= {f"{name}.{key}" for key in value}
        else:
            tables = [f.name for f in fields(Settings) if is_dataclass(hints[f.name])]
            raise ConfigError(
                f"{path}: {name!r} is not a known key; expected profile or a table of "
                + ", ".join(tables)
            )
    return Settings(**known, set_keys=frozenset(set_keys))


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path}: others may write to it, and so decide who may call; run: "
            f"chmod go-w {path}"
        )
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error


def _table(kind: Any, tree: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    for key in tree:
        if key not in hints:
            raise ConfigError(
                f"{where}: {key!r} is not a known key; expected one of "
                + ", ".join(sorted(hints))
            )
    return kind(
        **{
            key: _value(value, hints[key], f"{where} {key}")
            for key, value in tree.items()
        }
    )


def _value(value: object, kind: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{where}: {value!r} is none of {get_args(kind)}")
        return value
    if origin in {Union, python_types.UnionType}:
        return _value(value, get_args(kind)[0], where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_value(item, get_args(kind)[0], where) for item in value)
    if kind is Path:
        kind, make = str, Path
    else:
        make = kind
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected a {kind.__name__}, got {value!r}")
    if kind in {int, float}:
        _bounded(value, where)
    return make(value)


def _bounded(value: Any, where: str) -> None:
    least = 0 if where.endswith("port") else 1e-3
    if not least <= value <= 2**48:
        raise ConfigError(
            f"{where}: {value!r} is out of range; no limit can be switched off"
        )


_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


def _resolved(settings: Settings) -> Settings:
    """Make paths absolute and check what only holds between keys."""
    base = settings.base
    identity = settings.identity
    try:
        settings.spiffe_id("check")
    except IdentityError as error:
        raise ConfigError(f"[identity]: {error}") from error
    if not _DNS_LABEL.match(identity.namespace):
        raise ConfigError(
            f"[identity] namespace: {identity.namespace!r} is not a Kubernetes-style "
            "name: lower case letters, digits and dashes"
        )
    development = identity.trust_domain == DEVELOPMENT_DOMAIN
    if settings.profile == "production" and development:
        raise ConfigError(
            "[identity] trust_domain: the development domain is refused in production; "
            "name your own"
        )
    if settings.transport.first_port > settings.transport.last_port:
        raise ConfigError("[transport]: first_port is above last_port")
    for delegate in settings.authorization.delegates:
        try:
            SpiffeId.parse(delegate)
        except IdentityError as error:
            raise ConfigError(f"[authorization] delegates: {error}") from error
    return replace(
        settings,
        artifacts=replace(
            settings.artifacts,
            registry=base / settings.artifacts.registry,
            trust_policy=base / settings.artifacts.trust_policy,
        ),
        authorization=replace(
            settings.authorization,
            policies=tuple(base / path for path in settings.authorization.policies),
        ),
        audit=replace(settings.audit, directory=base / settings.audit.directory),
    )
