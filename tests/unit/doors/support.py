"""A registry door in this process, and replicas that read through it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.unit.artifacts.workshop import Workshop
from ztserve import audit
from ztserve.artifacts import Registry, open_registry
from ztserve.authorization import PolicySet
from ztserve.doors import (
    DoorAddress,
    DoorRegistry,
    RegistryDoor,
    registry_methods,
    wire,
)
from ztserve.identity import SpiffeId
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Limits, Method, Server

DOMAIN = "dev.ztserve.internal"
DOOR = SpiffeId.parse(f"spiffe://{DOMAIN}/ns/ztserve/sa/registry")
DIGITS = f"spiffe://{DOMAIN}/ns/ml-inference/sa/digits"
"""Whom `POLICY` lets read the model of its name, and no other."""
STRANGER = f"spiffe://{DOMAIN}/ns/ml-inference/sa/stranger"

POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: ztserve}}
spec:
  selector: {{matchLabels: {{app: registry}}}}
  rules:
    - from: [{{source: {{principals: ["cluster.local/ns/ml-inference/sa/{who}"]}}}}]
      to: [{{operation: {{methods: ["GET"], paths: {paths}}}}}]
---
"""


def policies(rights: Mapping[str, list[str]]) -> PolicySet:
    """Parse policies that let each service of ml-inference at its paths."""
    return PolicySet.parse(
        "".join(
            POLICY.format(name=f"p{n}", who=who, paths=str(paths).replace("'", '"'))
            for n, (who, paths) in enumerate(rights.items())
        ),
        trust_domain=DOMAIN,
        namespace="ztserve",
        labels={"app": "registry"},
    )


@dataclass
class Opened:
    """A door that answers."""

    address: DoorAddress
    authority: ThrowAwayAuthority
    log: Path
    server: Server

    def registry(self, who: str = DIGITS) -> DoorRegistry:
        """The models behind it, as `who` sees them."""
        source = self.authority.source(who)
        return DoorRegistry(self.address, source=source, door_id=DOOR)

    def records(self) -> list[dict]:
        """The calls in its audit, oldest first."""
        return [r for r in audit.read(self.log) if r.get("class_uid") == 6003]


@contextmanager
def opened(
    registry: Registry,
    folder: Path,
    rights: Mapping[str, list[str]] | None = None,
    **more,
) -> Iterator[Opened]:
    """Open a door to `registry`, its audit in `folder`."""
    path = folder / "door.jsonl"
    rights = {"digits": ["/v1/registry/digits"]} if rights is None else rights
    with audit.Log(path, origin={"service": "registry"}) as log:
        door = RegistryDoor(registry, policies(rights), log)

        def told(refusal) -> None:
            who = refusal.peer.id if refusal.peer else ""
            log.refused(refusal.path, refusal.error, principal=who, address="a:1")

        methods = registry_methods(door)
        with serving(methods, on_refused=told, **more) as (address, authority, server):
            yield Opened(address, authority, path, server)


@contextmanager
def serving(
    methods: tuple[Method, ...], *, port: int = 0, **more
) -> Iterator[tuple[DoorAddress, ThrowAwayAuthority, Server]]:
    """Serve `methods` under the door's SPIFFE ID: a good door's, or a hostile one's."""
    authority = more.pop("authority", None) or ThrowAwayAuthority(DOMAIN)
    more.setdefault("limits", Limits(max_message_bytes=wire.MAX_REQUEST_BYTES))
    server = Server(methods, source=authority.source(DOOR), **more)
    host, found = server.start("127.0.0.1", port)
    try:
        yield DoorAddress(f"{host}:{found}"), authority, server
    finally:
        server.stop(0)


@contextmanager
def published(path: Path, **more) -> Iterator[tuple[Workshop, Opened]]:
    """Open a door to a registry in which digits:1 is published, filled with 1."""
    workshop = Workshop(path)
    workshop.published("one", version="1", fill=1.0)
    with opened(open_registry(workshop.registry), path, **more) as door:
        yield workshop, door
