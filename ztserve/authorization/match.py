"""How a policy's values match: Istio's rules for strings, paths, IDs and tokens.

Each maker takes the values of one field, which are alternatives, and returns one test.
Source: istio/istio ``pilot/pkg/security/authz/{matcher,model}`` and Envoy's URI
templates (``envoy/extensions/path/match/uri_template/v3``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

    from ztserve.authorization.document import Node

StringTest: TypeAlias = "Callable[[str], bool]"
Claims: TypeAlias = "Mapping[str, object]"
ClaimsTest: TypeAlias = "Callable[[Claims | None], bool]"

SCHEME = "spiffe://"
_SEGMENT = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=]+"
_REST = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=/]*"
_LITERAL = re.compile(rf"{_SEGMENT}\Z")
_NAMESPACE = re.compile(r"[a-z0-9*-]+\Z")
_ACCOUNT = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?\Z")


def strings(values: Iterable[str], *, prefix: str = "") -> StringTest:
    """Match exactly, ``x*``, ``*x`` or ``*`` (not empty), case-sensitively.

    A ``*`` anywhere else stands for itself. `prefix` goes before every value.
    """
    exact, starts, ends, present = set[str](), list[str](), list[str](), False
    for value in values:
        if value == "*":
            present = True
        elif value.startswith("*"):
            ends.append(value[1:])
        elif value.endswith("*"):
            starts.append(prefix + value[:-1])
        else:
            exact.add(prefix + value)
    if not (starts or ends or present):
        return frozenset(exact).__contains__
    fixed, heads, tails = frozenset(exact), tuple(starts), tuple(ends)
    size = len(prefix)

    def matches(text: str) -> bool:
        return (
            text in fixed
            or text.startswith(heads)
            or (text.startswith(prefix) and text[size:].endswith(tails))
            or (present and bool(text))
        )

    return matches


def caseless(values: Iterable[str]) -> StringTest:
    """Match as `strings` does, whatever the case: for host names."""
    inner = strings(value.lower() for value in values)
    return lambda text: inner(text.lower())


def paths(values: Sequence[Node]) -> StringTest:
    """Match paths: strings, and templates with ``{*}`` and ``{**}``."""
    plain = [node.text() for node in values if "{" not in node.text()]
    templates = [_template(node) for node in values if "{" in node.text()]
    for node in values:
        if "}" in node.text() and "{" not in node.text():
            raise node.error("'}' stands outside of {*} and {**}")
    inner = strings(plain)
    if not templates:
        return inner
    pattern = re.compile("|".join(f"(?:{template})" for template in templates))
    return lambda path: inner(path) or pattern.fullmatch(path) is not None


def _template(node: Node) -> str:
    """Return a path template as a regular expression.

    ``{*}`` is one segment, not empty; ``{**}`` anything, and the last operator.
    """
    path, parts, last = node.text(), [], False
    for segment in path.split("/"):
        if segment in {"{*}", "{**}"}:
            if last:
                raise node.error(f"in {path!r} {{**}} must be the last operator")
            last = segment == "{**}"
            parts.append(_REST if last else _SEGMENT)
        elif "{" in segment or "}" in segment:
            raise node.error(f"{path!r}: only a whole segment can be {{*}} or {{**}}")
        else:
            # Envoy takes one slash at either end and no empty segment between.
            if segment and not _LITERAL.match(segment):
                raise node.error(f"{path!r}: {segment!r} is no literal path segment")
            parts.append(re.escape(segment))
    if "" in path.strip("/").split("/"):
        raise node.error(f"{path!r}: a template has no empty segment")
    return "/".join(parts)


def namespaces(values: Sequence[Node]) -> StringTest:
    """Match SPIFFE IDs by Istio's ``.*/ns/VALUE/.*``, in any trust domain."""
    parts = []
    for node in values:
        if not _NAMESPACE.match(node.text()):
            raise node.error(f"{node.text()!r} is not a namespace (or pattern with *)")
        parts.append(node.text().replace("*", ".*"))
    pattern = re.compile(f".*/ns/(?:{'|'.join(parts)})/.*")
    return lambda principal: pattern.fullmatch(principal) is not None


def service_accounts(values: Sequence[Node], namespace: str) -> StringTest:
    """Match SPIFFE IDs by service account: ``ns/sa``, or ``sa`` of `namespace`."""
    if len(values) > 16:
        raise values[16].error("at most 16 service accounts can stand in one field")
    parts = []
    for node in values:
        if not _ACCOUNT.match(node.text()) or len(node.text()) > 320:
            raise node.error(
                f"{node.text()!r} is not 'serviceAccount' or 'namespace/serviceAccount'"
            )
        place, _, name = node.text().rpartition("/")
        parts.append(f"{re.escape(place or namespace)}/(?:.+/)?sa/{re.escape(name)}")
    pattern = re.compile(f"spiffe://.+/ns/(?:{'|'.join(parts)})(?:/.+)?")
    return lambda principal: pattern.fullmatch(principal) is not None


def addresses(values: Sequence[Node]) -> Callable[[str], bool | None]:
    """Match IP addresses by address or CIDR range; None: not an address at all."""
    networks: list[IPv4Network | IPv6Network] = []
    for node in values:
        try:
            networks.append(ip_network(node.text(), strict=False))
        except ValueError:
            raise node.error(f"{node.text()!r} is no IP address or range") from None

    def matches(text: str) -> bool | None:
        address = _address(text)
        if address is None:
            return None
        return any(address in network for network in networks)

    return matches


@lru_cache(maxsize=1024)
def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # ::ffff:10.0.0.1 is how a dual-stack socket spells 10.0.0.1.
    return getattr(address, "ipv4_mapped", None) or address


def ports(values: Sequence[Node]) -> Callable[[int], bool]:
    """Match destination ports, which policies write as strings."""
    numbers = set()
    for node in values:
        if not (node.text().isdecimal() and int(node.text()) <= 65535):
            raise node.error(f"{node.text()!r} is not a port (0 to 65535)")
        numbers.add(int(node.text()))
    return frozenset(numbers).__contains__


def request_principals(values: Iterable[str]) -> ClaimsTest:
    """Match a token's ``ISSUER/SUBJECT``, split at the last slash."""
    pairs = [_issuer_subject(value) for value in values]

    def matches(claims: Claims | None) -> bool:
        issuer, subject = (claims or {}).get("iss"), (claims or {}).get("sub")
        if not isinstance(issuer, str) or not isinstance(subject, str):
            return False
        return any(test(issuer) and also(subject) for test, also in pairs)

    return matches


def _issuer_subject(value: str) -> tuple[StringTest, StringTest]:
    anything = strings(["*"])
    issuer, slash, subject = value.rpartition("/")
    if value == "*":
        return anything, anything
    if not slash:
        if value.startswith("*"):
            return anything, strings([value])
        return (strings([value]), anything if value.endswith("*") else "".__eq__)
    if value.startswith("*"):
        return strings([issuer]), subject.__eq__
    if value.endswith("*"):
        return issuer.__eq__, anything if subject == "*" else strings([subject])
    return issuer.__eq__, subject.__eq__


def claim(keys: Sequence[str], values: Iterable[str]) -> ClaimsTest:
    """Match a (nested) claim: a string, or a list that holds such a string."""
    inner = strings(values)

    def matches(claims: Claims | None) -> bool:
        found: object = claims
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        items = found if isinstance(found, (list, tuple)) else (found,)
        return any(isinstance(item, str) and inner(item) for item in items)

    return matches


def bracketed(node: Node, prefix: str) -> tuple[str, ...]:
    """Return ``a``, ``b`` of a key like ``request.auth.claims[a][b]``."""
    rest = node.text().removeprefix(prefix)
    keys = tuple(re.findall(r"\[([^\[\]]+)\]", rest))
    if not keys or "".join(f"[{key}]" for key in keys) != rest:
        raise node.error(f"{node.text()!r} should read {prefix}[NAME]")
    return keys
