"""Keys and texts of JOSE, read strictly: JSON, base64url and JWK (RFC 7515 to 7518)."""

import base64
import json
import re
from collections.abc import Mapping
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from ztserve.errors import IdentityError

PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
MAX_RSA_EXPONENT = 2**32
"""With a larger one, each check of a signature would cost as much as making it."""

_CURVES: Mapping[str, ec.EllipticCurve] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
}
_CURVE_NAMES = {curve.name: name for name, curve in _CURVES.items()}
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")


def check_key(key: object, what: str) -> PublicKey:
    """Return `key` if it is EC P-256, P-384, P-521 or RSA of 2048 to 8192 bits.

    Raises IdentityError that begins with `what`.
    """
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVE_NAMES:
        return key
    if (
        isinstance(key, rsa.RSAPublicKey)
        and MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS
        and key.public_numbers().e < MAX_RSA_EXPONENT
    ):
        return key
    raise IdentityError(
        f"{what}: key below the floor or too costly: expected EC P-256, P-384, P-521 "
        f"or RSA of {MIN_RSA_BITS} to {MAX_RSA_BITS} bits"
    )


def json_object(data: bytes, what: str, limit: int) -> dict[str, object]:
    """Return the one JSON object in `data`, at most `limit` bytes of UTF-8.

    Raises IdentityError that begins with `what`, also where a name occurs twice in an
    object: readers differ in which of the two they take (RFC 8259, section 4).
    """
    if len(data) > limit:
        raise IdentityError(f"{what}: {len(data)} bytes, at most {limit} are allowed")
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise IdentityError(f"{what}: not JSON: {error!s:.200}") from error
    if not isinstance(value, dict):
        raise IdentityError(f"{what}: expected a JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return members


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def base64url_decode(text: str) -> bytes:
    """Return the bytes of `text` (RFC 7515, section 2); ValueError for all else.

    Strict: no padding, no foreign character, and one way only to write each value.
    """
    if not _BASE64URL.fullmatch(text):
        raise ValueError("not base64url")
    value = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64url_encode(value) != text:
        raise ValueError("not base64url in its one canonical form")
    return value


def base64url_encode(value: bytes) -> str:
    """Return `value` in base64url without padding."""
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def read_key(entry: Mapping[str, object]) -> PublicKey | None:
    """Return the public key of a JWK (RFC 7518, section 6), of any size.

    None where its type or curve is none of ours; ValueError where it is no such key.
    """
    match entry.get("kty"):
        case "RSA":
            return _rsa_key(entry)
        case "EC":
            return _ec_key(entry)
        case _:
            return None


def _rsa_key(entry: Mapping[str, object]) -> PublicKey:
    modulus, exponent = _octets(entry, "n"), _octets(entry, "e")
    return rsa.RSAPublicNumbers(
        int.from_bytes(exponent), int.from_bytes(modulus)
    ).public_key()


def _ec_key(entry: Mapping[str, object]) -> PublicKey | None:
    name = entry.get("crv")
    curve = _CURVES.get(name) if isinstance(name, str) else None
    if curve is None:
        return None
    x, y = _octets(entry, "x"), _octets(entry, "y")
    if not len(x) == len(y) == coordinate_bytes(curve):
        raise ValueError(f"x and y: expected {coordinate_bytes(curve)} bytes each")
    return ec.EllipticCurvePublicNumbers(
        int.from_bytes(x), int.from_bytes(y), curve
    ).public_key()


def _octets(entry: Mapping[str, object], name: str) -> bytes:
    text = entry.get(name)
    if not isinstance(text, str) or len(text) > MAX_RSA_BITS // 4:
        raise ValueError(f"{name}: expected a text in base64url")
    return base64url_decode(text)


def key_members(key: PublicKey) -> dict[str, object]:
    """Return the members of a JWK that say what `key` is (RFC 7518, section 6)."""
    numbers = key.public_numbers()
    if isinstance(numbers, rsa.RSAPublicNumbers):
        n, e = (_number(value) for value in (numbers.n, numbers.e))
        return {"kty": "RSA", "n": n, "e": e}
    size = coordinate_bytes(numbers.curve)
    x, y = (_number(value, size) for value in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": _CURVE_NAMES[numbers.curve.name], "x": x, "y": y}


def coordinate_bytes(curve: ec.EllipticCurve) -> int:
    """Return how long each number of a point or signature on `curve` is, in bytes."""
    return (curve.key_size + 7) // 8


def _number(value: int, size: int = 0) -> str:
    size = size or (value.bit_length() + 7) // 8
    return base64url_encode(value.to_bytes(size))
