"""Header lists, good and broken, and what RFC 9113, section 8, says of them.

`why_malformed` is written from the text and shares nothing with the code under test:
it is the third opinion where that code and h2 differ.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from random import Random

Listed: TypeAlias = tuple[tuple[bytes, bytes], ...]

REQUESTS: tuple[Listed, ...] = (
    (
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", b"/ztserve.v1.Directory/Watch"),
        (b":authority", b"127.0.0.1:1"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ),
    (
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":authority", b"a.example"),
        (b":path", b"/"),
        (b"accept", b"*/*"),
    ),
    (
        (b":method", b"POST"),
        (b":path", b"/p?q=1"),
        (b":scheme", b"https"),
        (b"host", b"a.example"),
        (b"cookie", b"a=1"),
        (b"x-bin", b"AAE"),
    ),
)
RESPONSES: tuple[Listed, ...] = (
    ((b":status", b"200"), (b"content-type", b"application/grpc")),
    ((b":status", b"404"), (b"server", b"x"), (b"x-long", b"v" * 90)),
    ((b":status", b"200"), (b"set-cookie", b"a=1"), (b"x-empty", b"")),
)
TRAILERS: tuple[Listed, ...] = (
    ((b"grpc-status", b"0"),),
    ((b"grpc-status", b"13"), (b"grpc-message", b"no%20way")),
    (),
)
STATIC: dict[str, Listed] = {
    "request": (
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":authority", b""),
        (b":path", b"/"),
    ),
    "response": ((b":status", b"200"),),
}
"""Heads of the static table alone, whose blocks do not change with the dynamic one."""
_NAMES = (
    *(b"X-Upper", b"x\x00", b"x y", b"", b"x:y", b"x\xe9", b"x\x7f", b"x\tz", b'x"'),
    *(b":", b":foo", b":protocol", b"x(y)", b"x\n", b"x\r", b"!#$%&'*+-.^_`|~"),
)
_VALUES = (
    *(b"a\x00b", b"a\rb", b"a\nb", b" a", b"a ", b"\ta", b"a\t", b"a\x01b", b"a\x7fb"),
    *(b"\xe9", b"a b\tc", b"", b" ", b"\x1f", b"\x80", b"a\x0bb"),
)
_HOPS = (b"connection", b"keep-alive", b"proxy-connection", b"upgrade")
_TE = (b"trailers", b"gzip", b"Trailers", b"trailers, gzip", b"")
_LENGTHS = (
    *(b"0", b"5", b"7", b"005", b"+5", b"-5", b"", b"5, 5", b"5;", b"0x5", b"5 5"),
    *(b"9" * 15, b"9" * 16, b"9" * 40, b"\xb2"),
)
_PSEUDO: dict[bytes, tuple[bytes, ...]] = {
    b":method": (b"CONNECT", b"HEAD", b"", b"G T", b"get", b"G\x00", b"G,T", b"PRI"),
    b":scheme": (b"ftp", b"", b"HTTPS", b"http", b"https:", b"h\x00"),
    b":path": (
        b"",
        b"*",
        b"a",
        b"/a b",
        b"/\x00",
        b"/\xe9",
        b"/#f",
        b"//",
        b"http://a/",
    ),
    b":authority": (b"", b"a.example", b"u@a", b"a b", b"a\x00", b"b.example"),
    b":status": (
        *(b"101", b"100", b"103", b"204", b"304", b"600", b"099", b"20", b"0200"),
        *(b"2O0", b"", b"+20", b" 200", b"999", b"1", b"199"),
    ),
}


def broken(random: Random, listed: Listed, kind: str) -> Listed:
    """Return a header list of `kind` that is changed in one place."""
    fields = list(listed)
    at = random.randrange(len(fields) + 1)
    way = random.randrange(14)
    if way == 0:
        fields.insert(at, (random.choice(_NAMES), b"v"))
    elif way == 1:
        fields.insert(at, (b"x-v", random.choice(_VALUES)))
    elif way == 2:
        fields.append((random.choice(_HOPS), b"x"))
    elif way == 3:
        fields.append((b"te", random.choice(_TE)))
    elif way == 4 and kind == "response" and random.random() < 0.3:
        status = random.choice((b"204", b"304"))
        fields = [(b":status", status), (b"content-length", b"5")]
    elif way == 4:
        for _ in range(random.choice((1, 1, 1, 2))):
            fields.append((b"content-length", random.choice(_LENGTHS)))
    elif way in (5, 6, 7):
        names = [name for name, _ in fields if name in _PSEUDO]
        name = random.choice(names or list(_PSEUDO))
        fields = [field for field in fields if field[0] != name]
        place = random.randrange(2)
        fields.insert(place, (name, random.choice(_PSEUDO[name])))
    elif way == 8 and fields:
        fields.insert(at, random.choice(fields))
    elif way == 9 and fields:
        fields.append(fields.pop(random.randrange(len(fields))))
    elif way == 10 and fields:
        del fields[random.randrange(len(fields))]
    elif way == 11:
        name = random.choice(list(_PSEUDO))
        fields.insert(at, (name, random.choice(_PSEUDO[name])))
    elif way == 12:
        for _ in range(random.choice((1, 2))):
            fields.append((b"host", random.choice((b"a.example", b"b.example", b""))))
    elif kind == "request" and random.random() < 0.3:
        fields = [(b":method", b"CONNECT"), (b":authority", b"a.example")]
    else:
        fields.append((b"cookie", b"b=2"))
        fields.append((b"cookie", b"c=3"))
        if kind == "request" and random.random() < 0.3:
            fields = [
                field for field in fields if field[0] not in (b":authority", b"host")
            ]
    return tuple(fields)


# --- the third opinion ----------------------------------------------------------

_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
_UPPER = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_SPECIFIC = frozenset((*_HOPS, b"transfer-encoding"))
_OF_REQUEST = frozenset((b":method", b":scheme", b":authority", b":path"))
_DIGITS = frozenset(b"0123456789")


@lru_cache(maxsize=4096)
def why_malformed(listed: Listed, kind: str) -> frozenset[str]:
    """Return the rules that a request, response or trailers break; none: well-formed.

    A rule is named by its class in `http2_classes.CLASSES` where h2 does not know it,
    and "section 8" where h2 does.
    """
    why: set[str] = set()
    for name, value in listed:
        why |= _of_name(name) | _of_value(value)
        if name in _SPECIFIC or (name == b"te" and value.lower() != b"trailers"):
            why.add("section 8")
        elif name == b"te" and value != b"trailers":
            why.add("te in capitals")
    pseudo = [name for name, _ in listed if name.startswith(b":")]
    known = {"request": _OF_REQUEST, "response": {b":status"}}.get(kind, frozenset())
    if len(set(pseudo)) < len(pseudo) or not set(pseudo) <= known:
        why.add("section 8")
    if any(name[:1] != b":" for name, _ in listed[: len(pseudo)]):
        why.add("section 8")
    values = dict(reversed(listed))
    if kind == "request":
        why |= _of_request(values, listed)
    elif kind == "response":
        why |= _of_response(values)
    return frozenset(why | (_of_length(listed) if kind != "trailers" else set()))


def _of_name(name: bytes) -> set[str]:
    rest = name[1:] if name[:1] == b":" else name
    if not rest or any(c <= 0x20 or c >= 0x7F or c in _UPPER for c in rest):
        return {"section 8"}
    if b":" in rest:
        return {"section 8"}
    return set() if set(rest) <= _TOKEN else {"a name or method that is no token"}


def _of_value(value: bytes) -> set[str]:
    if value.strip(b" \t") != value or set(value) & set(b"\0\r\n"):
        return {"section 8"}
    if any((c < 0x20 and c != 0x09) or c == 0x7F for c in value):
        return {"a control character in a value"}
    return set()


def _of_request(values: dict[bytes, bytes], listed: Listed) -> set[str]:
    why: set[str] = set()
    method, path = values.get(b":method"), values.get(b":path", b"")
    if method == b"CONNECT":
        if b":scheme" in values or b":path" in values:
            why.add("section 8")
        return why | {"CONNECT"}
    if method is None or b":scheme" not in values or not path:
        why.add("section 8")
    if method is not None and (not method or not set(method.lower()) <= _TOKEN):
        why.add("a name or method that is no token")
    if values.get(b":scheme", b"https") not in (b"https", b"http"):
        why.add("a scheme or path that is none")
    if path and ((path[:1] != b"/" and path != b"*") or not _visible(path)):
        why.add("a scheme or path that is none")
    authority = values.get(b":authority")
    if authority and (b"@" in authority or not _visible(authority)):
        why.add("an authority that is none")
    hosts = [value for name, value in listed if name == b"host"]
    if len(set(hosts)) > 1 or (authority and hosts and set(hosts) != {authority}):
        why.add("section 8")
    if len(hosts) > 1:
        why.add("host twice")
    return why


def _visible(path: bytes) -> bool:
    return all(0x21 <= c <= 0x7E for c in path)


def _of_response(values: dict[bytes, bytes]) -> set[str]:
    status = values.get(b":status")
    if status is None:
        return {"section 8"}
    if len(status) != 3 or not set(status) <= _DIGITS:
        return {"a status that is none"}
    if not b"100" <= status < b"600" or status == b"101":
        return {"a status that is none"}
    return set()


def _of_length(listed: Listed) -> set[str]:
    lengths = [value for name, value in listed if name == b"content-length"]
    if any(not value or not set(value) <= _DIGITS for value in lengths):
        return {"section 8"}
    if len({int(value) for value in lengths}) > 1:
        return {"section 8"}
    return {"a length over 15 digits"} if any(len(v) > 15 for v in lengths) else set()


def updates(block: bytes) -> int:
    """Return how many updates of the table's size a block begins with."""
    at = count = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:
        more = block[at] & 0x1F == 0x1F
        at += 1
        while more and at < len(block):
            more = bool(block[at] & 0x80)
            at += 1
        count += 1
    return count
