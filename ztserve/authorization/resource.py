"""The two Istio kinds that are enforced here, read from YAML and nothing left over.

Sources: ``security/v1beta1/*.proto`` of istio/api and Istio's own validation
(``pkg/config/validation``). What Istio would accept and ignore is refused here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ztserve.authorization.document import Node, read

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

VERSIONS = ("security.istio.io/v1", "security.istio.io/v1beta1")
DRY_RUN = "istio.io/dry-run"

SOURCE = (
    "principals",
    "requestPrincipals",
    "namespaces",
    "serviceAccounts",
    "trustDomains",
    "ipBlocks",
    "remoteIpBlocks",
)
OPERATION = ("hosts", "ports", "methods", "paths")

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")
_TARGETS = (
    "targetRefs are not supported: a policy is attached by its namespace and "
    "selector.matchLabels"
)
_REFUSED_KINDS = {
    "RequestAuthentication": "tokens are not verified by this version, so a policy "
    "that relies on them cannot be enforced; callers prove themselves by mutual TLS",
}

Block: TypeAlias = "Mapping[str, tuple[Node, ...]]"
"""The fields of one source, operation or condition, each a list of strings."""


def negated(field: str) -> str:
    """Return the name of a field's negation: ``paths`` -> ``notPaths``."""
    return f"not{field[0].upper()}{field[1:]}"


def _with_negations(fields: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for field in fields for name in (field, negated(field)))


@dataclass(frozen=True, slots=True)
class Condition:
    """One entry of a rule's ``when``."""

    key: Node
    block: Block


@dataclass(frozen=True, slots=True)
class Rule:
    """(OR of sources) AND (OR of operations) AND (all conditions); none: any."""

    node: Node
    sources: tuple[tuple[Node, Block], ...]
    operations: tuple[tuple[Node, Block], ...]
    when: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Resource:
    """What every kind has: where it stands and which workloads it selects."""

    node: Node
    kind: str
    namespace: str
    name: str
    labels: Mapping[str, str]

    @property
    def id(self) -> str:
        """The name by which Istio's logs know it."""
        return f"ns[{self.namespace}]-policy[{self.name}]"


@dataclass(frozen=True, slots=True)
class Policy:
    """An AuthorizationPolicy."""

    resource: Resource
    action: str
    shadow: bool
    """Evaluated and recorded, but without effect: AUDIT, or a dry run."""
    rules: tuple[Rule, ...]


def resources(text: str, source: str) -> Iterator[Resource | Policy]:
    """Yield what `text` declares; ConfigError on anything not understood."""
    for document in read(text, source):
        top = document.fields(("apiVersion", "kind", "metadata", "spec"))
        kind = _required(document, top, "kind")
        if (name := kind.text()) in _REFUSED_KINDS:
            raise kind.error(f"{name} is refused: {_REFUSED_KINDS[name]}")
        kind.one_of(("AuthorizationPolicy", "PeerAuthentication"))
        _required(document, top, "apiVersion").one_of(VERSIONS)
        spec = top.get("spec")
        if spec is None or spec.kind == "null":
            spec = Node("map", {}, document.line, document.source, "spec")
        metadata = _required(document, top, "metadata")
        read_spec = _peer if name == "PeerAuthentication" else _authorization
        yield read_spec(document, metadata, spec)


def _required(parent: Node, fields: Mapping[str, Node], name: str) -> Node:
    if name not in fields:
        raise parent.error(f"the field {name!r} is missing")
    return fields[name]


def _strings(node: Node) -> dict[str, str]:
    return {key: value.text() for key, value in node.mapping().items()}


def _annotations(metadata: Node) -> bool:
    fields = metadata.mapping()
    for name in ("labels", "annotations"):
        for key, value in fields[name].mapping().items() if name in fields else ():
            value.text()
            if key.startswith("istio.io/") and key != DRY_RUN:
                raise value.error(f"{key} has no meaning here; leave it out")
    if "annotations" not in fields:
        return False
    dry_run = fields["annotations"].mapping().get(DRY_RUN)
    return dry_run is not None and dry_run.one_of(("true", "false")) == "true"


def _resource(kind: str, document: Node, metadata: Node, spec: Node) -> Resource:
    allowed = ("name", "namespace", "labels", "annotations")
    fields = metadata.fields(
        allowed, hint=" (write the file that you apply, not the cluster's copy)"
    )
    for name in ("name", "namespace"):
        # Without a namespace the policy would attach to whatever is current.
        node = _required(metadata, fields, name)
        if not _NAME.match(node.text()):
            raise node.error(f"{node.text()!r} is not a Kubernetes name")
    labels: dict[str, str] = {}
    if (selector := spec.mapping().get("selector")) is not None:
        inner = selector.fields(("matchLabels",))
        if "matchLabels" in inner:
            labels = _strings(inner["matchLabels"])
        if "*" in "".join((*labels, *labels.values())):
            raise selector.error("labels are compared exactly; '*' is not allowed")
    name, namespace = fields["name"].text(), fields["namespace"].text()
    return Resource(document, kind, namespace, name, labels)


def _peer(document: Node, metadata: Node, spec: Node) -> Resource:
    fields = spec.fields(("selector", "mtls", "portLevelMtls"))
    if _annotations(metadata):
        raise metadata.error(f"{DRY_RUN} has no meaning for PeerAuthentication")
    resource = _resource("PeerAuthentication", document, metadata, spec)
    if "mtls" in fields:
        _strict(fields["mtls"])
    if (ports := fields.get("portLevelMtls")) is not None:
        if not resource.labels:
            raise ports.error("portLevelMtls needs a selector with matchLabels")
        if not ports.mapping():
            raise ports.error("portLevelMtls needs at least one port")
        for port, mtls in ports.mapping().items():
            if not port.isdecimal() or not 1 <= int(port) <= 65535:
                raise mtls.error(f"{port!r} is not a port (1 to 65535)")
            _strict(mtls)
    return resource


def _strict(mtls: Node) -> None:
    mode = mtls.fields(("mode",)).get("mode")
    if mode is None or mode.text() in {"STRICT", "UNSET"}:
        return
    if mode.text() in {"DISABLE", "PERMISSIVE"}:
        raise mode.error(
            f"{mode.text()} is refused: every connection is mutual TLS; write STRICT"
        )
    raise mode.error(f"{mode.text()!r} is not a mode; write STRICT")


def _authorization(document: Node, metadata: Node, spec: Node) -> Policy:
    for target in ("targetRef", "targetRefs"):
        if target in spec.mapping():
            raise spec.mapping()[target].error(_TARGETS)
    fields = spec.mapping()
    if "action" in fields and fields["action"].text() == "CUSTOM":
        raise fields["action"].error(
            "CUSTOM is refused: no external authorizer is asked here; write ALLOW, "
            "DENY or AUDIT"
        )
    fields = spec.fields(("selector", "action", "rules"))
    action = "ALLOW"
    if "action" in fields:
        action = fields["action"].one_of(("ALLOW", "DENY", "AUDIT"))
    # Without rules nothing matches: for ALLOW that is a meaning (nobody may).
    rules = fields["rules"].sequence(empty=True) if "rules" in fields else ()
    if not rules and action != "ALLOW":
        raise spec.error(
            f"{action} without rules never matches; write 'rules: [{{}}]' to match "
            "every request"
        )
    resource = _resource("AuthorizationPolicy", document, metadata, spec)
    shadow = _annotations(metadata) or action == "AUDIT"
    return Policy(resource, action, shadow, tuple(map(_rule, rules)))


def _rule(node: Node) -> Rule:
    fields = node.fields(("from", "to", "when"))
    sources = _blocks(fields.get("from"), "source", SOURCE)
    operations = _blocks(fields.get("to"), "operation", OPERATION)
    when = fields["when"].sequence() if "when" in fields else ()
    return Rule(node, sources, operations, tuple(map(_condition, when)))


def _blocks(
    node: Node | None, inner: str, names: tuple[str, ...]
) -> tuple[tuple[Node, Block], ...]:
    found: list[tuple[Node, Block]] = []
    for item in node.sequence() if node is not None else ():
        block = _required(item, item.fields((inner,)), inner)
        values = block.fields(_with_negations(names))
        if not values:
            raise block.error(f"an empty {inner} means nothing; name what it matches")
        found.append((block, _lists(values)))
    return tuple(found)


def _lists(fields: Mapping[str, Node]) -> Block:
    lists = {name: node.sequence() for name, node in fields.items()}
    for values in lists.values():
        for value in values:
            value.text()
    return lists


def _condition(node: Node) -> Condition:
    fields = node.fields(("key", "values", "notValues"))
    key = _required(node, fields, "key")
    key.text()
    block = _lists({name: value for name, value in fields.items() if name != "key"})
    if not block:
        raise node.error("a condition needs values or notValues")
    return Condition(key, block)
