"""What is asked of a policy, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class AccessRequest(NamedTuple):
    """One request as policy sees it. A tuple, because one is made for every call."""

    principal: str
    """The peer's SPIFFE ID, proved by mutual TLS."""
    method: str
    path: str | Collection[str]
    """The operation's one name, or all of its names."""
    host: str = ""
    """The ``:authority`` that the peer asked for, with its port if it sent one."""
    port: int = 0
    source_ip: str = ""
    """The other end of the connection."""
    headers: Mapping[str, str] = MappingProxyType({})
    """Values of a repeated header are joined with a comma."""
    claims: Mapping[str, object] | None = None
    """What is known of the caller behind the peer; None: no caller was named."""
    remote_ip: str | None = None
    """Where the request came from before trusted proxies; None: `source_ip`."""
    destination_ip: str | None = None
    sni: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policies say to one request; true where it is allowed."""

    allowed: bool
    rule: str
    """The rule that decided, ``ns[NAMESPACE]-policy[NAME]-rule[INDEX]``, or why none
    did."""
    action: str
    """``ALLOW`` or ``DENY``."""
    shadow: tuple[str, ...] = ()
    """What AUDIT policies and dry runs would say: ``ACTION RULE``."""

    def __bool__(self) -> bool:
        return self.allowed
