"""Run a deployment without Ray, in this process, in under two seconds.

Everything is real: sockets, mutual TLS, policies, signatures, filter and audit. Only
the authority, the signing keys and the registry are thrown away afterwards.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ztserve import config, transport
from ztserve.artifacts import publish
from ztserve.errors import ConfigError
from ztserve.serving import Replica, ZTDeployment
from ztserve.serving.replica import Plan
from ztserve.testing.authority import ThrowAwayAuthority
from ztserve.types import ModelRef

if TYPE_CHECKING:
    import os

STOP_S = 2.0


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
        lines = self.audit.read_text().splitlines()
        return [json.loads(line) for line in lines]


@contextmanager
def serve(
    deployment: type[ZTDeployment],
    *,
    model: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
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
        tables: tables of ztserve.toml, e.g. ``{"transport": {"max_call_s": 1}}``.
        max_ongoing: as Ray Serve's max_ongoing_requests.
        max_queued: calls that may wait beyond those.

    """
    with tempfile.TemporaryDirectory(prefix="ztserve-testing-") as folder:
        base = Path(folder)
        settings = _settings(base, deployment, policies, tables or {})
        models = _publish(base, deployment, model)
        authority = ThrowAwayAuthority(settings.identity.trust_domain)
        server_id = settings.spiffe_id(deployment.service)
        plan = Plan(settings, models, secrets.token_hex(4), max_ongoing, max_queued)
        replica = Replica(
            deployment, plan, authority.source(server_id), name=secrets.token_hex(4)
        )
        address = replica.start(args, kwargs or {})
        client = transport.Client(
            address,
            source=authority.source(settings.developer_id),
            server_id=server_id,
            model=replica.model_name,
        )
        log = next(settings.audit.directory.glob("*.jsonl"))
        try:
            yield Served(address, server_id, client, authority, replica, log)
        finally:
            client.close()
            replica.stop(STOP_S)


def _settings(
    base: Path,
    deployment: type[ZTDeployment],
    policies: tuple[Path, ...],
    tables: Mapping[str, Mapping[str, Any]],
) -> config.Settings:
    if not policies:
        policies = (base / "policy.yaml",)
        policies[0].write_text(_policy(deployment.service))
        policies[0].chmod(0o600)
    chosen = {name: dict(table) for name, table in tables.items()}
    chosen.setdefault("authorization", {}).setdefault(
        "policies", [str(path.resolve()) for path in policies]
    )
    chosen.setdefault("artifacts", {}).setdefault("wait_s", 1.0)
    text = "".join(
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items())
        for name, table in chosen.items()
    )
    file = base / config.FILE
    file.write_text(text)
    file.chmod(0o600)
    return config.load(file)


def _policy(service: str) -> str:
    return f"""\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: testing
  namespace: ml-inference
spec:
  selector:
    matchLabels:
      app: {service}
  rules:
    - from:
        - source:
            principals: ["cluster.local/ns/dev/sa/cli"]
"""


def _publish(
    base: Path,
    deployment: type[ZTDeployment],
    model: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None,
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
    key = publish.new_key(
        state / "testing.pem", name="testing", roles=["trainer", "deployer"]
    )
    trust = state / "trust.toml"
    trust.write_text(f"version = 1\n{key.entry}")
    trust.chmod(0o600)
    signer = publish.load_signer(key.private)
    for part, ref in refs.items():
        if part not in folders:
            raise ConfigError(f"serve(..., model=...) has no directory for {part!r}")
        _publish_copy(Path(folders[part]), base / f"copy-{part}", signer, ref)
    return refs


def _publish_copy(
    source: Path, copy: Path, signer: publish.SigningKey, ref: ModelRef
) -> None:
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.sig"))
    version = ref.version or "0"
    publish.sign_model(copy, signer, name=ref.name)
    publish.release_model(copy, signer, name=ref.name, version=version)
    publish.publish(
        copy,
        copy.parent / ".ztserve/registry",
        name=ref.name,
        version=version,
        aliases=(ref.alias,) if ref.alias else (),
    )
