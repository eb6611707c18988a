"""Compile a rule into closures: what depends on the peer alone, and what does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ztserve.authorization import fields, match, peer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ztserve.authorization.document import Node
    from ztserve.authorization.fields import Test
    from ztserve.authorization.resource import Block, Condition, Policy, Rule
    from ztserve.authorization.workload import Workload
    from ztserve.types import Operation

_UNSEEN = ("destination.ip", "connection.sni")


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule, ready to be narrowed to one peer."""

    id: str
    sources: tuple[tuple[tuple[match.StringTest, ...], Test], ...]
    rest: Test

    def narrowed(self, principal: str) -> Test | None:
        """Return what is left to test once the peer is known; None: no match."""
        left = [
            test
            for peers, test in self.sources
            if all(admits(principal) for admits in peers)
        ]
        return fields.all_of((fields.any_of(left), self.rest)) if left else None


def compile_rule(
    rule: Rule, index: int, policy: Policy, workload: Workload
) -> CompiledRule:
    """Compile one rule; ConfigError where a value can't be enforced."""
    compiler = _Compiler(policy, workload)
    for condition in rule.when:
        compiler.condition(condition)
    anyone: tuple[tuple[Node, Block], ...] = ((rule.node, {}),)
    sources = [compiler.source(*source) for source in rule.sources or anyone]
    operations = [compiler.operation(block) for _, block in rule.operations]
    called = fields.any_of(operations or [fields.always])
    rest = fields.all_of((called, *compiler.common))
    return CompiledRule(f"{policy.resource.id}-rule[{index}]", tuple(sources), rest)


class _Compiler:
    """Compiles one rule; its conditions first, as they hold for every source."""

    def __init__(self, policy: Policy, workload: Workload) -> None:
        self.workload = workload
        self.allows = policy.action == "ALLOW"
        self.of_peer = peer.makers(workload, policy.resource.namespace)
        self.peers: list[match.StringTest] = []
        self.common: list[Test] = []
        self.pinned = False

    def source(
        self, node: Node, block: Block
    ) -> tuple[tuple[match.StringTest, ...], Test]:
        """Return the tests of one source, those on the peer alone apart."""
        peer.check_source(node, block)
        peers = list(self.peers)
        for field, make in self.of_peer.items():
            peers += fields.two_ways(block, field, make)
        if self.allows and not self.pinned:
            named = (block.get("principals", ()), block.get("trustDomains", ()))
            if not any(map(peer.pins, named)):
                peers.append(peer.unpinned(node, self.workload))
        tests: list[Test] = []
        for field in ("requestPrincipals", "ipBlocks", "remoteIpBlocks"):
            tests += self._tests(block, field, field)
        return tuple(peers), fields.all_of(tests)

    def operation(self, block: Block) -> Test:
        """Return the test of one operation."""
        if self.workload.operations is not None:
            _check_borne(block, self.workload.operations)
        tests: list[Test] = []
        for field in ("methods", "paths", "ports", "hosts"):
            tests += self._tests(block, field, field)
        return fields.all_of(tests)

    def condition(self, condition: Condition) -> None:
        """Add the tests of one ``when`` entry."""
        node, block = condition.key, condition.block
        key = node.text()
        field = fields.KEYS.get(key, "")
        if key in _UNSEEN and self.workload.operations is not None:
            raise node.error(f"{key} is not known of a call, so it can't be enforced")
        if field in self.of_peer:
            self.peers += fields.two_ways(block, "values", self.of_peer[field])
            if field in {"principals", "trustDomains"}:
                self.pinned |= peer.pins(block.get("values", ()))
        elif field:
            self.common += self._tests(block, "values", field)
        else:
            self.common += fields.two_ways(block, "values", fields.other(node))

    def _tests(self, block: Block, name: str, field: str) -> list[Test]:
        """Return the tests of the values under `name`, which mean `field`."""
        if field in fields.ADDRESSES:
            get = fields.ADDRESSES[field]
            return fields.addresses(block, name, get, allows=self.allows)
        return fields.two_ways(block, name, fields.MAKERS[field])


def _check_borne(block: Block, operations: Sequence[Operation]) -> None:
    """Refuse a path that no operation bears: it is a mistake, and in a DENY a hole."""
    methods = match.strings(fields.texts(block.get("methods", ())))
    for node in (*block.get("paths", ()), *block.get("notPaths", ())):
        borne = match.paths([node])
        bearers = [one for one in operations if any(map(borne, one.names))]
        if not bearers:
            raise node.error(
                f"no operation here bears {node.text()!r}; there is "
                f"{_listed(operations)}"
            )
        if "methods" in block and not any(methods(one.method) for one in bearers):
            raise node.error(
                f"no call has this path and one of these methods; it is "
                f"{_listed(bearers)}"
            )


def _listed(operations: Sequence[Operation]) -> str:
    return ", ".join(
        f"{one.method} {name}" for one in operations for name in sorted(one.names)
    )
