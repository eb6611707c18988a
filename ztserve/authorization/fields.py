"""The tests of a rule's fields on one request, and how tests are put together."""

from __future__ import annotations

import re
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from ztserve.authorization import match
from ztserve.authorization.resource import negated

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ztserve.authorization.document import Node
    from ztserve.authorization.request import AccessRequest
    from ztserve.authorization.resource import Block

T = TypeVar("T")
Test: TypeAlias = "Callable[[AccessRequest], bool]"
Maker: TypeAlias = "Callable[[Sequence[Node]], Test]"

KEYS: Mapping[str, str] = MappingProxyType(
    {
        "source.principal": "principals",
        "source.namespace": "namespaces",
        "source.serviceAccount": "serviceAccounts",
        "source.trustDomain": "trustDomains",
        "source.ip": "ipBlocks",
        "remote.ip": "remoteIpBlocks",
        "request.auth.principal": "requestPrincipals",
        "destination.port": "ports",
        "destination.ip": "destination.ip",
    }
)
"""The keys of ``when`` that are fields under another name."""
_CLAIMS = {"request.auth.audiences": ("aud",), "request.auth.presenter": ("azp",)}
_OTHER_KEYS = (
    "connection.sni",
    "request.headers[NAME]",
    "request.auth.claims[NAME]",
    *_CLAIMS,
)

ADDRESSES: Mapping[str, Callable[[AccessRequest], str]] = MappingProxyType(
    {
        "ipBlocks": lambda request: request.source_ip,
        "remoteIpBlocks": lambda request: (
            request.source_ip if request.remote_ip is None else request.remote_ip
        ),
        "destination.ip": lambda request: request.destination_ip or "",
    }
)
"""Where each field that speaks of an address finds it."""


def always(_request: AccessRequest) -> bool:
    """Match every request."""
    return True


def all_of(tests: Sequence[Test]) -> Test:
    """Return the test that holds where all of `tests` do."""
    left = [test for test in tests if test is not always]
    if len(left) < 2:
        return left[0] if left else always
    if len(left) == 2:
        one, other = left
        return lambda request: one(request) and other(request)
    return lambda request: all(test(request) for test in left)


def any_of(tests: Sequence[Test]) -> Test:
    """Return the test that holds where one of `tests` does."""
    if always in tests:
        return always
    if len(tests) == 1:
        return tests[0]
    return lambda request: any(test(request) for test in tests)


def two_ways(
    block: Block, field: str, make: Callable[[Sequence[Node]], Callable[[T], bool]]
) -> list[Callable[[T], bool]]:
    """Return the tests of a field and of its negation, where they are given."""
    tests = [make(block[field])] if field in block else []
    if negated(field) in block:
        tests.append(_not(make(block[negated(field)])))
    return tests


def _not(test: Callable[[T], bool]) -> Callable[[T], bool]:
    return lambda value: not test(value)


def addresses(
    block: Block, field: str, get: Callable[[AccessRequest], str], *, allows: bool
) -> list[Test]:
    """Return the tests of an address field; `allows`: of an ALLOW rule.

    An address that is not known matches no ALLOW, and every DENY.
    """

    def test(name: str, *, wanted: bool) -> Test:
        inside = match.addresses(block[name])

        def matches(request: AccessRequest) -> bool:
            found = inside(get(request))
            return not allows if found is None else found is wanted

        return matches

    tests = [test(field, wanted=True)] if field in block else []
    if negated(field) in block:
        tests.append(test(negated(field), wanted=False))
    return tests


def texts(values: Sequence[Node]) -> list[str]:
    """Return the strings of a field."""
    return [value.text() for value in values]


_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+\Z")  # a token of RFC 9110, 5.6.2


def _methods(values: Sequence[Node]) -> Test:
    test = match.strings(texts(values))
    return lambda request: test(request.method)


def _paths(values: Sequence[Node]) -> Test:
    test = match.paths(values)

    def matches(request: AccessRequest) -> bool:
        path = request.path
        if isinstance(path, str):
            return test(path.partition("?")[0].partition("#")[0])
        return any(map(test, path))

    return matches


def _hosts(values: Sequence[Node]) -> Test:
    test = match.caseless(texts(values))
    return lambda request: test(request.host)


def _ports(values: Sequence[Node]) -> Test:
    test = match.ports(values)
    return lambda request: test(request.port)


def _request_principals(values: Sequence[Node]) -> Test:
    test = match.request_principals(texts(values))
    return lambda request: test(request.claims)


MAKERS: Mapping[str, Maker] = MappingProxyType(
    {
        "methods": _methods,
        "paths": _paths,
        "ports": _ports,
        "hosts": _hosts,
        "requestPrincipals": _request_principals,
    }
)
"""How to make the test of each field that looks at the request."""


def other(node: Node) -> Maker:
    """Return how to make the test of a ``when`` key that no field stands for."""
    key = node.text()
    if key == "connection.sni":
        return _sni
    if key.startswith("request.headers["):
        return partial(_header, _header_name(node))
    if key.startswith("request.auth.claims["):
        return partial(_claim, match.bracketed(node, "request.auth.claims"))
    if key in _CLAIMS:
        return partial(_claim, _CLAIMS[key])
    known = ", ".join((*KEYS, *_OTHER_KEYS))
    raise node.error(f"unknown key {key!r}; allowed here: {known}")


def _sni(values: Sequence[Node]) -> Test:
    test = match.strings(texts(values))
    return lambda request: test(request.sni or "")


def _claim(keys: Sequence[str], values: Sequence[Node]) -> Test:
    test = match.claim(keys, texts(values))
    return lambda request: test(request.claims)


def _header_name(node: Node) -> str:
    names = match.bracketed(node, "request.headers")
    name = names[0].lower()
    if len(names) > 1 or name.startswith((":", "zt-")):
        raise node.error(
            f"{node.text()!r}: name one header; for :authority, :method and :path "
            "there are hosts, methods and paths, for the caller request.auth"
        )
    if not _HEADER.match(name) or name.endswith("-bin"):
        raise node.error(
            f"{node.text()!r}: no call has a header of that name (a token; headers "
            "that end in -bin are dropped)"
        )
    return name


def _header(name: str, values: Sequence[Node]) -> Test:
    test, present = match.strings(texts(values)), "*" in texts(values)

    def matches(request: AccessRequest) -> bool:
        found = [value for key, value in request.headers.items() if key.lower() == name]
        return bool(found) and (present or test(",".join(found)))

    return matches
