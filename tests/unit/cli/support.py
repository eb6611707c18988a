"""Deployments and their directory, without Ray, in the project of a test."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ztserve import config, transport
from ztserve.identity import Authority, FixedSource, Identity
from ztserve.serving import Replica
from ztserve.serving.replica import Plan
from ztserve.types import Call, ModelRef


class Doors:
    """Replicas of the project, and the directory door that names them."""

    def __init__(self, project: Path, authority: Authority) -> None:
        port = _free_port()
        toml = project / config.FILE
        toml.write_text(toml.read_text().replace("port = 7443", f"port = {port}"))
        self._settings = config.load()
        self._authority = authority
        self._endpoints: dict[str, tuple[transport.Endpoint, ...]] = {}
        self._replicas: list[Replica] = []
        self._server = transport.Server(
            transport.directory_methods(self),
            source=self._source(self._settings.directory_id),
        )
        self._server.start("127.0.0.1", port)

    def __enter__(self) -> "Doors":
        return self

    def __exit__(self, *_: object) -> None:
        for replica in self._replicas:
            replica.stop(0.5)
        self._server.stop(0.5)

    def serve(self, deployment: Any) -> str:
        """Start a replica, have the directory name it, return its address."""
        models = (
            {"": deployment.model} if isinstance(deployment.model, ModelRef) else {}
        )
        server_id = self._settings.spiffe_id(deployment.service)
        replica = Replica(
            deployment,
            Plan(self._settings, models, "deploy"),
            self._source(server_id),
            name="r1",
        )
        self._replicas.append(replica)
        address = replica.start()
        key = f"{self._settings.identity.namespace}/{deployment.service}"
        self._endpoints[key] = (transport.Endpoint(address),)
        return address

    def watch(
        self, call: Call, deployment: str
    ) -> Iterator[tuple[transport.Endpoint, ...]]:
        """Name the replicas, once."""
        yield self._endpoints.get(deployment, ())
        while not call.cancelled() and time.monotonic() < call.deadline:
            time.sleep(0.05)

    def _source(self, spiffe_id: str) -> FixedSource:
        bundles = {self._authority.trust_domain: self._authority.bundle}
        return FixedSource(Identity(self._authority.issue(spiffe_id), bundles))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
