"""Which key of which token: PKCS#11 URIs (RFC 7512), read strictly.

    pkcs11:token=signing;object=trainer;type=private?module-path=/usr/lib/x.so

Understood are, in the path, ``token``, ``manufacturer``, ``model`` and ``serial`` (of
the token), ``object``, ``id`` and ``type=private`` (of the key); in the query,
``module-path`` and ``pin-source=file:...``. Whatever else RFC 7512 has is refused, not
passed over: a URI that names less than it says could name another key.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import unquote_to_bytes

from ztserve.errors import ConfigError

SCHEME = "pkcs11:"
MAX_URI = 2048
"""Characters; tokens' labels have 32, serial numbers 16."""
TOKEN = ("token", "manufacturer", "model", "serial")
_PATH = (*TOKEN, "object", "id", "type")
_QUERY = ("module-path", "pin-source")
# RFC 7512, 2.3: pk11-pchar (with "&") and pk11-qchar (with "/", "?" and "|").
_CHARACTER = r"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=-]|%[0-9A-Fa-f]{2}|"
_PATH_VALUE = re.compile(_CHARACTER + r"&)+\Z")
_QUERY_VALUE = re.compile(_CHARACTER + r"[/?|])+\Z")


@dataclass(frozen=True, slots=True)
class TokenUri:
    """A private key in a token, and the module through which to reach it."""

    module: Path
    """Of the shared library that speaks PKCS#11, absolute."""
    token: Mapping[str, str]
    """What the token must be: some of `TOKEN`, with their values."""
    label: str | None
    """The key's CKA_LABEL, where the URI has ``object``."""
    id: bytes | None
    """The key's CKA_ID, where the URI has ``id``."""
    pin_source: Path | None
    """The file that holds the PIN; None: somebody is asked."""

    def __str__(self) -> str:
        key = [] if self.label is None else [f"object={self.label}"]
        key += [] if self.id is None else [f"id={self.id.hex()}"]
        token = [f"{name}={value}" for name, value in self.token.items()]
        return f"the key {', '.join(key)} of the token {', '.join(token)}"

    @property
    def name(self) -> str:
        """The key's label, or else its id in hex."""
        return self.label or (self.id or b"").hex()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a URI; raises ConfigError, which repeats no value of the query."""
        if len(text) > MAX_URI:
            raise ConfigError(
                f"a PKCS#11 URI of {len(text)} characters; the limit is {MAX_URI}"
            )
        path, _, query = text.removeprefix(SCHEME).partition("?")
        if not text.startswith(SCHEME):
            raise ConfigError(f"a PKCS#11 URI begins with {SCHEME} (RFC 7512)")
        named = _attributes(path, ";", _PATH, _PATH_VALUE)
        asked = _attributes(query, "&", _QUERY, _QUERY_VALUE)
        _check_complete(named, asked)
        return cls(
            module=_module(asked["module-path"]),
            token={key: _text(key, named[key]) for key in TOKEN if key in named},
            label=_text("object", named["object"]) if "object" in named else None,
            id=named.get("id"),
            pin_source=_pin_source(asked["pin-source"])
            if "pin-source" in asked
            else None,
        )


def _attributes(
    text: str, separator: str, known: Sequence[str], values: re.Pattern[str]
) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in text.split(separator) if text else ():
        name, equals, value = part.partition("=")
        if name == "pin-value":
            raise ConfigError(
                "PKCS#11 URI: pin-value would show the PIN to every process of this "
                "machine: change that PIN, and name a file of mode 0600 by "
                "pin-source=file:/path, or be asked for it on the terminal"
            )
        if name not in known:
            raise ConfigError(
                f"PKCS#11 URI: {name[:64]!r} is not understood here; expected in this "
                f"place are {', '.join(known)}"
            )
        if name in found:
            raise ConfigError(f"PKCS#11 URI: {name} is there twice")
        if not equals or not values.match(value):
            raise ConfigError(
                f"PKCS#11 URI: the value of {name} is empty, or has characters that "
                "must be written as %XX (RFC 7512, 2.3)"
            )
        found[name] = unquote_to_bytes(value)
    return found


def _check_complete(named: Mapping[str, bytes], asked: Mapping[str, bytes]) -> None:
    quoted = "; quote the URI: to a shell, ';' ends a command, and '&' too"
    if not set(TOKEN) & named.keys():
        raise ConfigError(
            f"PKCS#11 URI: it names no token; add one of {', '.join(TOKEN)}{quoted}"
        )
    if not {"object", "id"} & named.keys():
        raise ConfigError(
            "PKCS#11 URI: it names no key; add object=LABEL or id=%XX, as "
            f"`pkcs11-tool --list-objects` shows them{quoted}"
        )
    if named.get("type", b"private") != b"private":
        raise ConfigError("PKCS#11 URI: only type=private signs")
    if "module-path" not in asked:
        raise ConfigError(
            "PKCS#11 URI: add ?module-path=/path/of/the/token's/library.so: which "
            f"code is loaded is not guessed{quoted}"
        )


def _module(value: bytes) -> Path:
    module = Path(_text("module-path", value))
    if not module.is_absolute():
        raise ConfigError(
            "PKCS#11 URI: module-path must be absolute: a name would be searched for "
            "where the environment says"
        )
    return module


def _pin_source(value: bytes) -> Path:
    scheme, _, path = _text("pin-source", value).partition(":")
    path = path.removeprefix("//") if path.startswith("///") else path
    if scheme != "file" or not path.startswith("/") or path.startswith("//"):
        raise ConfigError(
            "PKCS#11 URI: pin-source must be file:/path/of/a/file, absolute, and of "
            "this machine; no command is run for it"
        )
    return Path(path)


def _text(name: str, value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"PKCS#11 URI: {name} is not UTF-8") from error
    if not text.isprintable():
        raise ConfigError(f"PKCS#11 URI: {name} has control characters")
    return text
