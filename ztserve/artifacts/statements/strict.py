"""JSON from strangers: bounded, without duplicate keys, field by field.

Every reader of a bundle, statement or registry index goes through here and turns
`Malformed` into the error of its own room, with the name of what it read.
"""

import base64
import binascii
import json
from collections.abc import Collection, Mapping
from typing import NoReturn, TypeAlias, TypeVar

Object: TypeAlias = Mapping[str, object]
T = TypeVar("T")


MAX_MESSAGE = 500
"""Characters: what is malformed is quoted, and must not flood who reads of it."""


class Malformed(ValueError):
    """The text is not the JSON that was expected; the message says where."""

    def __init__(self, message: str) -> None:
        longer = len(message) - MAX_MESSAGE
        more = f"... ({longer} characters more)" if longer > 0 else ""
        super().__init__(message[:MAX_MESSAGE] + more)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise Malformed(f"duplicate JSON key {key!r}")
        found[key] = value
    return found


def _no_constant(text: str) -> NoReturn:
    raise Malformed(f"{text} is not JSON")


def loads(raw: bytes, *, limit: int) -> object:
    """Parse at most `limit` bytes of UTF-8 JSON (RFC 8259, keys unique).

    Raises Malformed.
    """
    if len(raw) > limit:
        raise Malformed(f"{len(raw)} bytes, more than the limit of {limit}")
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except Malformed:
        raise
    except UnicodeDecodeError as error:
        raise Malformed("not UTF-8") from error
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    except ValueError as error:
        raise Malformed(f"not JSON: {error}") from error


def load_object(raw: bytes, *, limit: int) -> Object:
    """Parse a JSON object; raises Malformed."""
    return as_object(loads(raw, limit=limit), "the text")


def as_object(value: object, where: str) -> Object:
    """Return `value` if it is an object; raises Malformed."""
    if not isinstance(value, dict):
        raise Malformed(f"{where} is not an object")
    return value


def get(node: Object, key: str, kind: type[T]) -> T:
    """Return the field `key`, which must be there and of exactly this kind.

    Raises Malformed. (`true` is no integer here.)
    """
    if key not in node:
        raise Malformed(f"field {key!r} is missing")
    value = node[key]
    if type(value) is not kind:
        raise Malformed(
            f"field {key!r} is of kind {type(value).__name__}, not {kind.__name__}"
        )
    return value


def get_objects(node: Object, key: str, *, limit: int) -> list[Object]:
    """Return the field `key`, a list of at most `limit` objects; raises Malformed."""
    items = get(node, key, list)
    if len(items) > limit:
        raise Malformed(f"{key!r} has {len(items)} entries, the limit is {limit}")
    return [as_object(item, f"an entry of {key!r}") for item in items]


def only(node: Object, allowed: Collection[str], where: str) -> None:
    """Refuse fields beside the `allowed` ones; raises Malformed."""
    strange = sorted(set(node) - set(allowed))
    if strange:
        raise Malformed(f"{where} has an unknown field {strange[0]!r}")


def get_base64(node: Object, key: str) -> bytes:
    """Return the bytes of a field in canonical standard base64 (RFC 4648, §4).

    Raises Malformed.
    """
    text = get(node, key, str)
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"field {key!r} is not base64") from error
    if base64.b64encode(value).decode() != text:
        raise Malformed(f"field {key!r} is not canonical base64")
    return value
