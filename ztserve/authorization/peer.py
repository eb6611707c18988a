"""The tests of a rule that depend on the peer's SPIFFE ID alone.

Trust domains as in Istio (``pilot/pkg/security/trustdomain``): ``cluster.local``, the
local trust domain and its aliases are one. Unlike Istio, an ALLOW whose source names no
trust domain means the local one, and is refused once there is federation.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from ztserve.authorization import match
from ztserve.authorization.workload import CLUSTER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ztserve.authorization.document import Node
    from ztserve.authorization.resource import Block
    from ztserve.authorization.workload import Workload


def makers(
    workload: Workload, namespace: str
) -> dict[str, Callable[[Sequence[Node]], match.StringTest]]:
    """Return how to make the test of each field that looks at the peer alone."""
    return {
        "principals": partial(_principals, workload),
        "namespaces": match.namespaces,
        "serviceAccounts": partial(match.service_accounts, namespace=namespace),
        "trustDomains": partial(_trust_domains, workload),
    }


def check_source(node: Node, block: Block) -> None:
    """Refuse a source whose fields exclude each other."""
    if "serviceAccounts" in block and {"principals", "namespaces"} & set(block):
        raise node.error("serviceAccounts can't stand beside principals or namespaces")


def pins(values: Sequence[Node]) -> bool:
    """Tell whether every principal or trust domain in `values` is named in full."""
    return bool(values) and not any(
        "*" in value.text().partition("/")[0] for value in values
    )


def unpinned(node: Node, workload: Workload) -> match.StringTest:
    """Return the test of an ALLOW whose source names no trust domain: local only."""
    if workload.federated:
        raise node.error(
            "this ALLOW names no trust domain, so it would also admit "
            f"{', '.join(workload.federated)}; add principals or trustDomains"
        )
    return workload.is_local


def _principals(workload: Workload, values: Sequence[Node]) -> match.StringTest:
    expanded: list[str] = []
    for node in values:
        text = node.text()
        if not re.fullmatch(r"[A-Za-z0-9._/*:-]+", text):
            raise node.error(f"{text!r} is no principal: no SPIFFE ID has such letters")
        if "://" in text:
            raise node.error(f"{text!r}: leave out the scheme 'spiffe://'")
        if text.count("*") > 1 or "*" in text[1:-1]:
            raise node.error(f"{text!r}: one '*' may stand, at the start or the end")
        domain, _, path = text.partition("/")
        if domain not in {CLUSTER, *workload.local}:
            expanded.append(text)
        elif text.count("/") == 4:
            expanded += [f"{name}/{path}" for name in workload.local]
        elif domain == workload.trust_domain and not workload.aliases:
            expanded.append(text)
        else:
            # Istio knows the other names of the local domain only in IDs of the form
            # TD/ns/NS/sa/SA; elsewhere they match nothing, which in a DENY is a hole.
            raise node.error(
                f"{text!r} leaves out names of the local trust domain; write "
                f"{domain}/ns/NAMESPACE/sa/SERVICE, where SERVICE may be *"
            )
    return match.strings(expanded, prefix=match.SCHEME)


def _trust_domains(workload: Workload, values: Sequence[Node]) -> match.StringTest:
    patterns: list[str] = []
    for node in values:
        text = node.text()
        if not re.fullmatch(r"[a-z0-9._*-]+", text) or text == CLUSTER:
            raise node.error(f"{text!r} is not the name of a trust domain")
        names = workload.local if text in workload.local else (text,)
        patterns += [re.escape(name).replace(r"\*", "[^/]*") for name in names]
    pattern = re.compile(f"spiffe://(?:{'|'.join(patterns)})/.*")
    return lambda principal: pattern.fullmatch(principal) is not None
