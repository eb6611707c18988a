"""Run a deployment without Ray, in this process, in under two seconds.

Everything is real: sockets, mutual TLS, policies, signatures, filter and audit. Only
the authority, the signing keys and the registry are thrown away afterwards.
"""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ztserve import audit, config, transport
from ztserve.artifacts import Role, open_registry, publish
from ztserve.doors import DoorAddress
from ztserve.errors import ConfigError
from ztserve.serving import Replica, ZTDeployment
from ztserve.serving.replica import Plan
from ztserve.testing.authority import ThrowAwayAuthority
from ztserve.types import ModelRef

STOP_S = 2.0

Directory: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class Served:
    """A running deployment."""

    address: str
    """host:port of its mTLS door."""
    server_id: str
    """Its SPIFFE ID."""
    client: transport.Client
    """A client that its policy lets in, as ns/dev/sa/cli."""
    authority: ThrowAwayAuthority
    """Issues more identities, and hostile ones on request."""
    replica: Replica
    audit: Path
    """Its audit log."""

    def records(self) -> list[dict[str, Any]]:
        """Return what the audit log holds so far, oldest first."""
        return list(audit.read(self.audit))


@contextmanager
def serve(  # noqa: PLR0913 - what one may want to say, each with a default
    deployment: type[ZTDeployment],
    *,
    model: Directory | Mapping[str, Directory] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    policies: tuple[Path, ...] = (),
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    max_ongoing: int = 32,
    max_queued: int = 64,
) -> Iterator[Served]:
    """Serve `deployment` until the block ends.

    Args:
        deployment: the class under test.
        model: directory with its weights (safetensors); signed here with a throw-away
            key. A dict of them where the class has several parts.
        args: for the class's constructor.
        kwargs: the same.
        policies: Istio YAML files instead of the default, which lets `client` in.
        tables: tables of ztserve.toml, e.g. ``{"transport": {"max_call_s": 1}}``. Where
            they name a registry door (``{"artifacts": {"registry":
            "ztserve://127.0.0.1:PORT"}}``), one is opened there.
        max_ongoing: as Ray Serve's max_ongoing_requests.
        max_queued: calls that may wait beyond those.

    Raises ConfigError for a directory that is not there, and whatever keeps a replica
    from starting, such as VerificationError.

    """
    with ExitStack() as ending:
        base = Path(
            ending.enter_context(tempfile.TemporaryDirectory(prefix="ztserve-testing-"))
        )
        settings = _settings(base, deployment, policies, tables or {})
        models = _publish(base, deployment, model)
        authority = ThrowAwayAuthority(settings.identity.trust_domain)
        if isinstance(settings.artifacts.registry, DoorAddress):
            ending.enter_context(_door(settings, authority))
        server_id = settings.spiffe_id(deployment.service)
        plan = Plan(settings, models, secrets.token_hex(4), max_ongoing, max_queued)
        replica = Replica(
            deployment, plan, authority.source(server_id), name=secrets.token_hex(4)
        )
        ending.callback(replica.stop, STOP_S)
        address = replica.start(args, kwargs or {})
        client = transport.Client(
            address,
            source=authority.source(settings.developer_id),
            server_id=server_id,
            model=replica.model_name,
        )
        ending.callback(client.close)
        log = next(settings.audit.directory.glob(f"{deployment.service}-*.jsonl"))
        yield Served(address, server_id, client, authority, replica, log)


@contextmanager
def _door(settings: config.Settings, authority: ThrowAwayAuthority) -> Iterator[None]:
    """Open the registry door that the settings name, to the throw-away registry."""
    source = authority.source(settings.registry_id)
    host, port = config.door_listener(settings)
    with config.open_log(settings, "registry", str(port), source) as log:
        registry = open_registry(settings.state / "registry")
        server = config.registry_door(settings, registry, source=source, log=log)
        server.start(host, range(port, port + 1))
        try:
            yield
        finally:
            server.stop(STOP_S)


def _settings(
    base: Path,
    deployment: type[ZTDeployment],
    policies: tuple[Path, ...],
    tables: Mapping[str, Mapping[str, Any]],
) -> config.Settings:
    chosen = {name: dict(table) for name, table in tables.items()}
    if not policies:
        namespace = chosen.get("identity", {}).get("namespace", "ml-inference")
        policies = (base / "policy.yaml",)
        policies[0].write_text(_policy(deployment.service, namespace))
        policies[0].chmod(0o600)
    chosen.setdefault("authorization", {}).setdefault(
        "policies", [str(path.resolve()) for path in policies]
    )
    chosen.setdefault("artifacts", {}).setdefault("wait_s", 1.0)
    file = base / config.FILE
    file.write_text("".join(_table(*item) for item in chosen.items()))
    file.chmod(0o600)
    return config.load(file)


def _table(name: str, values: Mapping[str, Any]) -> str:
    """Return a table of TOML, whose values JSON can write."""
    lines = (
        f"{key} = {json.dumps(value, default=str)}" for key, value in values.items()
    )
    return "\n".join((f"[{name}]", *lines, ""))


def _policy(service: str, namespace: str) -> str:
    return f"""\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: testing
  namespace: {namespace}
spec:
  selector:
    matchLabels:
      app: {service}
  rules:
    - from:
        - source:
            principals: ["cluster.local/ns/dev/sa/cli"]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: registry
  namespace: ztserve
spec:
  selector:
    matchLabels:
      app: registry
  rules:
    - from:
        - source:
            principals: ["cluster.local/ns/{namespace}/sa/{service}"]
      to:
        - operation:
            paths: ["/v1/registry/*"]
"""


def _publish(
    base: Path,
    deployment: type[ZTDeployment],
    model: Directory | Mapping[str, Directory] | None,
) -> dict[str, ModelRef]:
    """Sign and publish throw-away copies, under the names that the class asks for."""
    declared = deployment.model
    if declared is None:
        return {}
    refs = {"": declared} if isinstance(declared, ModelRef) else dict(declared)
    if model is None:
        raise ConfigError(
            f"{deployment.__name__} declares model {declared}: pass serve(..., "
            "model=directory) with its weights"
        )
    folders = model if isinstance(model, Mapping) else {"": model}
    state = base / ".ztserve"
    state.mkdir(mode=0o700)
    roles: tuple[Role, ...] = ("trainer", "deployer")
    keys = [
        publish.new_key(state / f"{role}.pem", name=f"testing {role}", roles=[role])
        for role in roles
    ]
    trust = state / "trust.toml"
    trust.write_text("version = 1\n" + "".join(key.entry for key in keys))
    trust.chmod(0o600)
    trainer, deployer = (publish.load_signer(key.private) for key in keys)
    for part, ref in refs.items():
        if part not in folders:
            raise ConfigError(f"serve(..., model=...) has no directory for {part!r}")
        folder = Path(folders[part])
        if not folder.is_dir():
            raise ConfigError(f"serve(..., model={str(folder)!r}): no such directory")
        _publish_copy(folder, base / f"copy-{part}", trainer, deployer, ref)
    return refs


def _publish_copy(
    source: Path,
    copy: Path,
    trainer: publish.SigningKey,
    deployer: publish.SigningKey,
    ref: ModelRef,
) -> None:
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.sig"))
    version = ref.version or "0"
    publish.sign_model(copy, trainer, name=ref.name)
    publish.release_model(copy, deployer, name=ref.name, version=version)
    publish.publish(
        copy,
        copy.parent / ".ztserve/registry",
        name=ref.name,
        version=version,
        aliases=(ref.alias,) if ref.alias else (),
    )
