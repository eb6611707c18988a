"""Where a remote registry is, and what its server asks for.

The address goes into ztserve.toml, logs and error messages, so it never holds a
secret: credentials lie in a file of their own that only its owner can read.
"""

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from ztserve.errors import ConfigError, IdentityError
from ztserve.identity.guarded_files import read_guarded

KINDS = ("oci", "mlflow")
MAX_ACCESS_BYTES = 256 << 10
MAX_HOSTS = 16
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z|[0-9a-f:.]{2,45}\Z")
_PATH = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}){0,16}\Z")
_SECRET = re.compile(r"[!-~]{1,8192}\Z")


class Origin(NamedTuple):
    """Whom one connects to (RFC 6454): compared as a whole."""

    scheme: str
    """``https``, or ``http`` to this machine."""
    host: str
    port: int

    @property
    def authority(self) -> str:
        """As the Host header has it: the port only where it is not the scheme's."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.scheme == "https" else 80)
        return host if usual else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RegistryUrl:
    """``oci+https://host[:port][/path]`` or ``mlflow+https://host[:port][/path]``.

    Plain ``http`` only to a loopback address.
    """

    kind: str
    origin: Origin
    path: str
    """Empty, or beginning with a slash and not ending with one."""

    @classmethod
    def parse(cls, text: str) -> "RegistryUrl":
        """Parse the address; raises ConfigError, without repeating a password."""
        kind, plus, rest = text.partition("+")
        shape = "expected oci+https://HOST/PATH or mlflow+https://HOST"
        if not plus or kind not in KINDS:
            raise ConfigError(f"registry address {without_secrets(text)!r}: {shape}")
        try:
            parts = split_url(rest)
            origin = origin_of(parts)
        except ValueError as error:
            raise ConfigError(
                f"registry address {without_secrets(text)!r}: {error}; {shape}"
            ) from error
        path = parts.path.rstrip("/")
        if parts.query or parts.fragment or not _PATH.match(path):
            raise ConfigError(
                f"registry address {without_secrets(text)!r}: a plain path is expected "
                "after the host, without query, fragment or %"
            )
        return cls(kind, origin, path)

    def __str__(self) -> str:
        return f"{self.kind}+{self.origin.scheme}://{self.origin.authority}{self.path}"


def split_url(text: str) -> SplitResult:
    """Split a URL; ValueError, which does not repeat it, where it is none."""
    try:
        return urlsplit(text)
    except ValueError:
        raise ValueError("is no URL") from None


def without_secrets(address: str) -> str:
    """Return an address for a message: no query, and nothing before the last ``@``.

    A password may hold slashes, so that no parser says where it ends.
    """
    plain = address.partition("?")[0].partition("#")[0]
    before, at, after = plain.rpartition("@")
    scheme = re.match(r"[a-z+]{0,20}:", before)
    return (f"{scheme[0] if scheme else ''}//...@{after}" if at else plain)[:300]


def origin_of(parts: SplitResult) -> Origin:
    """Return the origin of a URL; ValueError where it is not to be connected to."""
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds credentials, which belong into a file of their own")
    host = (parts.hostname or "").lower()
    if not _HOST.match(host):
        raise ValueError("names no host")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(f"plain http leaves this machine ({host}): use https")
    if parts.scheme not in {"http", "https"}:
        raise ValueError(f"{parts.scheme!r} is neither https nor http")
    usual = 443 if parts.scheme == "https" else 80
    port = check_port(parts)
    return Origin(parts.scheme, host, usual if port is None else port)


def check_port(parts: SplitResult) -> int | None:
    """Return the port of a URL, None where it names none; ValueError."""
    try:
        return parts.port
    except ValueError:
        # Without the parser's own words: what it takes for a port may be a password.
        raise ValueError("names no port from 0 to 65535") from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Access:
    """How to be let in, and who else may answer. Its `repr` shows no secret."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    """A bearer token, instead of a name and password."""
    roots: str = ""
    """PEM certificates that vouch for the server; empty: the system's."""
    hosts: frozenset[str] = frozenset()
    """Others, as ``host`` or ``host:port``, that the registry may send us to for
    files and tokens. They are told no credentials but for tokens."""

    def allows(self, origin: Origin) -> bool:
        """Return whether the registry may send us to this origin."""
        return origin.authority in self.hosts


def read_access(path: Path) -> Access:
    """Read credentials: TOML with username and password, or token; roots, hosts.

    ``roots`` is the path of a PEM file, relative to this one. Raises ConfigError where
    the file can be read by others, or says what is not understood.
    """
    try:
        raw = read_guarded(path, MAX_ACCESS_BYTES, secret=True)
        tree = tomllib.loads(raw.decode())
        mode = path.stat().st_mode & 0o777
    except (IdentityError, OSError, ValueError) as error:
        raise ConfigError(f"registry credentials {path}: {error}") from error
    if mode & 0o077:
        raise ConfigError(
            f"registry credentials {path}: has mode {mode:04o}, so that others than "
            f"its owner can use it; run: chmod 600 {path}"
        )
    try:
        return _access(tree, path.parent)
    except (ValueError, IdentityError) as error:
        raise ConfigError(f"registry credentials {path}: {error}") from error


def _access(tree: Mapping[str, object], folder: Path) -> Access:
    known = ("username", "password", "token", "roots", "hosts")
    for key in tree:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; expected {', '.join(known)}")
    username, password, token, roots = (_text(tree, key) for key in known[:4])
    if bool(username) != bool(password) or (username and token):
        raise ValueError("expected username and password, or a token")
    if ":" in username:
        raise ValueError("username: a colon cannot be sent (RFC 7617, section 2)")
    hosts = tree.get("hosts", [])
    if not isinstance(hosts, list) or len(hosts) > MAX_HOSTS:
        raise ValueError(f"hosts: expected a list of at most {MAX_HOSTS} hosts")
    pem = ""
    if roots:
        pem = read_guarded(
            folder / os.fspath(roots), MAX_ACCESS_BYTES, secret=False
        ).decode("ascii")
    return Access(username, password, token, pem, frozenset(map(_host, hosts)))


def _text(tree: Mapping[str, object], key: str) -> str:
    value = tree.get(key, "")
    if not isinstance(value, str) or (value and not _SECRET.match(value)):
        raise ValueError(f"{key}: expected printable ASCII without spaces")
    return value


def _host(text: object) -> str:
    """Return a host as `Origin.authority` spells it."""
    if isinstance(text, str):
        origin = origin_of(urlsplit(f"https://{text}"))
        if origin.authority == text:
            return text
    raise ValueError(f"hosts: {text!r} is no host or host:port in lower case")
