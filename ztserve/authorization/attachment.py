"""Which of the policies that were read count for a workload."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ztserve.authorization.resource import Policy, Resource, resources
from ztserve.authorization.rule import CompiledRule, compile_rule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ztserve.authorization.workload import Workload


class Attached(NamedTuple):
    """A policy that counts for the workload, compiled."""

    id: str
    action: str
    shadow: bool
    rules: tuple[CompiledRule, ...]


def attach(texts: Mapping[str, str], workload: Workload) -> list[Attached]:
    """Return the policies in `texts` (by file name) that select `workload`.

    All the others are read and compiled too: ConfigError if any of them is unsound.
    """
    found = [one for name, text in texts.items() for one in resources(text, name)]
    _check_names(found)
    _check_peers([one for one in found if isinstance(one, Resource)], workload)
    elsewhere = replace(workload, operations=None)
    attached = []
    for policy in found:
        if isinstance(policy, Policy):
            ours = workload.selected_by(policy.resource)
            rules = tuple(
                compile_rule(rule, index, policy, workload if ours else elsewhere)
                for index, rule in enumerate(policy.rules)
            )
            if ours:
                identity = policy.resource.id
                attached.append(Attached(identity, policy.action, policy.shadow, rules))
    return attached


def _check_names(found: Iterable[Resource | Policy]) -> None:
    seen: set[tuple[str, str]] = set()
    for one in found:
        resource = one.resource if isinstance(one, Policy) else one
        if (resource.kind, resource.id) in seen:
            raise resource.node.error(f"{resource.id} is declared twice")
        seen.add((resource.kind, resource.id))


def _check_peers(found: Iterable[Resource], workload: Workload) -> None:
    """Refuse two PeerAuthentications at one scope.

    Istio takes the older one; a file has no age.
    """
    seen: set[tuple[str, ...]] = set()
    for resource in found:
        labels = resource.labels
        scope = (resource.namespace, *sorted(map("=".join, labels.items())))
        if labels and workload.selected_by(resource):
            scope = (resource.namespace, "the workload itself")
        if scope in seen:
            raise resource.node.error(
                f"PeerAuthentication {resource.name!r} is the second one for the same "
                "workloads; keep one"
            )
        seen.add(scope)
