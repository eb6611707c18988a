"""Whose policies these are: what Istio knows of a workload, and what selects it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from ztserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ztserve.authorization.resource import Resource
    from ztserve.types import Operation

CLUSTER = "cluster.local"
"""Istio's name for whatever the local trust domain is."""

_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}\Z")


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload, as policies see it. ConfigError for trust domains that clash."""

    trust_domain: str
    namespace: str
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    root_namespace: str = "istio-system"
    aliases: tuple[str, ...] = ()
    """Other names of the local trust domain."""
    federated: tuple[str, ...] = ()
    """Foreign trust domains whose members can connect."""
    operations: tuple[Operation, ...] | None = None
    """What the workload does; None: not known."""

    def __post_init__(self) -> None:
        for name in (*self.local, *self.federated):
            if not _DOMAIN.match(name):
                raise ConfigError(f"{name!r} is not the name of a trust domain")
        for name in self.federated:
            if name == CLUSTER or name in self.local:
                raise ConfigError(
                    f"federated trust domain {name!r}: policies take this name for "
                    "the local trust domain, so its members would pass for ours"
                )

    @property
    def local(self) -> tuple[str, ...]:
        """The names of the local trust domain."""
        return (self.trust_domain, *self.aliases)

    def is_local(self, principal: str) -> bool:
        """Tell whether a SPIFFE ID lies in the local trust domain."""
        domain = principal.removeprefix("spiffe://").partition("/")[0]
        return domain in self.local

    def selected_by(self, resource: Resource) -> bool:
        """Tell whether a resource is attached to this workload."""
        return resource.namespace in {self.namespace, self.root_namespace} and all(
            self.labels.get(key) == value for key, value in resource.labels.items()
        )
