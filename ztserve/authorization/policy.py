"""The policies of one workload: parsed once, asked for every call.

Istio's semantics (``security.istio.io/v1``), and five differences, all of them
refusals: without an ALLOW policy nobody may; what cannot be enforced is refused when it
is read; PeerAuthentication is STRICT; an ALLOW that names no trust domain means the
local one, and is refused under federation; a value that can match nothing is refused.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypedDict, Unpack

from ztserve.authorization.attachment import attach
from ztserve.authorization.fields import always
from ztserve.authorization.files import read_files
from ztserve.authorization.match import SCHEME
from ztserve.authorization.request import AccessRequest, Decision
from ztserve.authorization.workload import Workload
from ztserve.errors import Denied

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from ztserve.authorization.attachment import Attached
    from ztserve.authorization.fields import Test
    from ztserve.types import Call, Operation

_MAX_PEERS = 1024
_NOBODY = Decision(allowed=False, rule="no identity", action="DENY")
_NOTHING = Decision(allowed=False, rule="no operation", action="DENY")


class _Options(TypedDict, total=False):
    """What `PolicySet.parse` takes beside the text."""

    trust_domain: str
    namespace: str
    labels: Mapping[str, str]
    root_namespace: str
    aliases: Collection[str]
    federated: Collection[str]
    operations: Iterable[Operation] | None


_Outcome: TypeAlias = "tuple[Decision, Test]"


class _Shadow(NamedTuple):
    """What is left of an AUDIT policy or a dry run for one peer."""

    action: str
    policy: str
    rules: tuple[tuple[str, Test], ...]


class _View(NamedTuple):
    """What is left of all rules for one peer."""

    enforced: tuple[_Outcome, ...]
    """DENY rules first."""
    shadow: tuple[_Shadow, ...]


class PolicySet:
    """The policies attached to one workload. Safe to use from several threads."""

    def __init__(self, attached: Sequence[Attached], digest: str) -> None:
        self._attached = tuple(attached)
        self._views: dict[str, _View] = {}
        self._otherwise = _otherwise(attached)
        self.digest = digest
        """SHA-256 (hex) of the source text."""

    @classmethod
    def parse(  # noqa: PLR0913 - what Istio knows of a workload
        cls,
        yaml_text: str | Mapping[str, str],
        *,
        trust_domain: str,
        namespace: str,
        labels: Mapping[str, str] = MappingProxyType({}),
        root_namespace: str = "istio-system",
        aliases: Collection[str] = (),
        federated: Collection[str] = (),
        operations: Iterable[Operation] | None = None,
    ) -> PolicySet:
        """Parse Istio YAML (several documents) for the workload so described.

        `yaml_text` may also be several texts, by the names of their files. `aliases`
        are other names of the local trust domain, `federated` the foreign ones whose
        members can connect. Where `operations` says what the workload does, a path that
        none of them bears is refused. ConfigError on anything that is not understood or
        cannot be enforced, with its line and field.
        """
        workload = Workload(
            trust_domain,
            namespace,
            labels,
            root_namespace,
            tuple(aliases),
            tuple(sorted(federated)),
            None if operations is None else tuple(operations),
        )
        texts = {"policy": yaml_text} if isinstance(yaml_text, str) else yaml_text
        attached = attach(texts, workload)
        digest = sha256("\n---\n".join(texts.values()).encode()).hexdigest()
        return cls(attached, digest)

    @classmethod
    def load(
        cls, paths: Iterable[Path | str], **options: Unpack[_Options]
    ) -> PolicySet:
        """Parse the policies of several files, all of which count, as `parse` does.

        ConfigError also for a file that is too large or that others may write.
        """
        return cls.parse(read_files(paths), **options)

    @property
    def attached(self) -> tuple[str, ...]:
        """The policies that count for this workload, ``ACTION ns[..]-policy[..]``."""
        return tuple(
            f"{policy.action} {policy.id}{' (shadow)' * policy.shadow}"
            for policy in self._attached
        )

    def decide(self, request: AccessRequest) -> Decision:
        """Judge one request: any DENY that matches, else any ALLOW, else deny."""
        if not request.path:
            return _NOTHING
        view = self._views.get(request.principal) or self._narrow(request.principal)
        decision = self._otherwise
        for possible, test in view.enforced:
            if test(request):
                decision = possible
                break
        if view.shadow:
            return replace(decision, shadow=tuple(_shadows(view.shadow, request)))
        return decision

    def authorize(self, call: Call) -> Decision:
        """Judge a call under all names of its operation; Denied if it may not be."""
        caller, operation = call.caller, call.operation
        claims = None
        if caller is not None:
            claims = {**caller.claims, "iss": caller.issuer, "sub": caller.subject}
        decision = self.decide(
            AccessRequest(
                call.peer.id,
                operation.method,
                operation.names,
                call.host,
                call.port,
                call.source_ip,
                call.headers,
                claims,
            )
        )
        if decision.allowed:
            return decision
        raise Denied(
            "this identity may not do this",
            f"{call.peer.id} may not {operation.method} {operation.title}: "
            f"{decision.rule}",
        )

    def _narrow(self, principal: str) -> _View:
        """Work out once per peer which rules can concern it, and what is left."""
        if not principal or not principal.startswith(SCHEME):
            return _View(((_NOBODY, always),), ())
        deny, allow, shadow = list[_Outcome](), list[_Outcome](), list[_Shadow]()
        for policy in self._attached:
            left = [(rule.id, rule.narrowed(principal)) for rule in policy.rules]
            tests = [(name, test) for name, test in left if test is not None]
            if policy.shadow:
                shadow.append(_Shadow(policy.action, policy.id, tuple(tests)))
            else:
                allowed = policy.action == "ALLOW"
                (allow if allowed else deny).extend(
                    (Decision(allowed, name, policy.action), test)
                    for name, test in tests
                )
        if len(self._views) >= _MAX_PEERS:
            self._views.clear()
        view = self._views[principal] = _View((*deny, *allow), tuple(shadow))
        return view


def _otherwise(attached: Sequence[Attached]) -> Decision:
    """Return the decision where no rule matches: deny."""
    enforced = [policy for policy in attached if not policy.shadow]
    allowing = [policy.id for policy in enforced if policy.action == "ALLOW"]
    if allowing:
        more = f" and {len(allowing) - 3} more" if len(allowing) > 3 else ""
        rule = f"no ALLOW rule matches ({', '.join(allowing[:3])}{more})"
    else:
        rule = "no ALLOW policy" if enforced else "no policy"
    return Decision(allowed=False, rule=rule, action="DENY")


def _shadows(shadow: Iterable[_Shadow], request: AccessRequest) -> Iterable[str]:
    for action, policy, rules in shadow:
        matched = next((name for name, test in rules if test(request)), None)
        if matched is not None:
            yield f"{action} {matched}"
        elif action == "ALLOW":
            yield f"ALLOW {policy}: no rule matches"
