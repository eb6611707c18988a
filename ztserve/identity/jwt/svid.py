"""JWT-SVIDs: a SPIFFE ID in a bearer token, signed by its trust domain.

Whoever holds such a token is its subject until it expires, which is why all of this is
stricter than the JWT-SVID standard where it may be: a token has one audience, lives an
hour at most, names its key, and has no header besides the three of section 2. Pure:
`replay` counts uses.
"""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NoReturn, TypeAlias

from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity.jwk import (
    PublicKey,
    base64url_decode,
    base64url_encode,
    json_object,
)
from ztserve.identity.jwt.jws import (
    ALGORITHMS,
    check_signature,
    default_algorithm,
    sign,
)
from ztserve.identity.peer import PUBLIC, Moment, as_datetime
from ztserve.identity.spiffe_id import SpiffeId, workload_id
from ztserve.identity.svid import PrivateKey

MAX_TOKEN_BYTES = 8 * 1024
MAX_LIFETIME_S = 3600
DEFAULT_LIFETIME_S = 300.0
LEEWAY_S = 30
"""How far `iat` and `nbf` may lie ahead of our clock. `exp` has no leeway."""

_HEADERS = {"alg", "kid", "typ"}


@dataclass(frozen=True, slots=True)
class JwtSvid:
    """A JWT-SVID. It is never shown nor pickled: whoever reads the token can use it."""

    token: str = field(repr=False)
    """The compact serialisation."""
    id: SpiffeId
    audience: tuple[str, ...]
    issued_at: datetime | None
    """As the token says, in UTC; a foreign authority may leave it out."""
    expires_at: datetime
    key_id: str

    @property
    def authorization(self) -> str:
        """The value of the metadata key ``authorization`` that bears it (5.3)."""
        return f"Bearer {self.token}"

    def __reduce__(self) -> NoReturn:
        raise IdentityError(
            f"the JWT-SVID of {self.id} cannot be pickled: it is as good as a password"
        )


def bearer_token(authorization: str) -> str:
    """Return the token in the value of ``authorization`` (JWT-SVID 5.2, 5.3).

    Unauthenticated if it is of another scheme. The token is not judged.
    """
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise _refused("authorization: expected `Bearer` and a JWT-SVID")
    return token


def sign_jwt_svid(
    spiffe_id: str,
    audience: Sequence[str],
    *,
    key: PrivateKey,
    key_id: str,
    now: Moment,
    ttl_s: float = DEFAULT_LIFETIME_S,
    algorithm: str | None = None,
) -> JwtSvid:
    """Return a new JWT-SVID of `spiffe_id` for `audience`, signed with `key`.

    `key_id` is the key's in the trust bundle. It lives `ttl_s` seconds from `now` (1
    to 3600, rounded up to whole ones) and bears a random `jti`, so that no two are the
    same. `algorithm` is by default ES256, ES384 or ES512 by the key's curve, or RS256.
    Raises IdentityError. Whether `key` may sign for the ID is for the caller to know.
    """
    subject = workload_id(spiffe_id)
    if not audience or not all(audience) or isinstance(audience, str):
        raise IdentityError(f"JWT-SVID of {subject}: an audience is required")
    if not 1 <= ttl_s <= MAX_LIFETIME_S:
        raise IdentityError(f"ttl_s is {ttl_s:g}, expected 1 to {MAX_LIFETIME_S}")
    at = as_datetime(now).timestamp()
    issued_at = math.floor(at)
    expires_at = min(math.ceil(at + ttl_s), issued_at + MAX_LIFETIME_S)
    name = algorithm or default_algorithm(key)
    header = {"alg": name, "kid": key_id, "typ": "JWT"}
    claims = {
        "sub": subject,
        "aud": list(audience),
        "iat": issued_at,
        "exp": expires_at,
        "jti": secrets.token_urlsafe(16),
    }
    signed = f"{_part(header)}.{_part(claims)}"
    token = f"{signed}.{base64url_encode(sign(name, key, signed.encode()))}"
    if len(token) > MAX_TOKEN_BYTES:
        raise IdentityError(
            f"JWT-SVID of {subject}: {len(token)} bytes, at most {MAX_TOKEN_BYTES}"
        )
    return JwtSvid(
        token=token,
        id=subject,
        audience=tuple(audience),
        issued_at=_utc(issued_at),
        expires_at=_utc(expires_at),
        key_id=key_id,
    )


def verify_jwt_svid(
    token: str,
    bundles: Mapping[str, Mapping[str, PublicKey]],
    *,
    audience: str,
    now: Moment,
) -> JwtSvid:
    """Return the JWT-SVID in `token`, meant for `audience`, if it holds at `now`.

    `bundles` maps a trust domain's name to its JWT authorities. In this order:

    1. The token is a JWS in compact form, at most 8 KiB, in canonical base64url; its
       header and claims are JSON objects in which no name occurs twice (1, 5.1).
    2. The header has `alg`, `kid` and maybe `typ`, and nothing else: no key, address
       or extension that the token brings along. `alg` is one of the nine of section
       2.1, `typ` is JWT or JOSE (2.3). The standard would let `kid` be left out; we
       try no keys.
    3. `sub` is a workload's SPIFFE ID (3.1). Only its own trust domain's authorities
       count, and of them the one that `kid` names.
    4. That key is of the type and curve of `alg`, and the signature is its own (4).
    5. `aud` has one value, which is `audience` (3.2). A token for others as well is
       refused, although the standard would let it pass: each of them could hand it
       on to us and be its subject here (7.2).
    6. `exp` is there and ahead (3.3); `iat` and `nbf`, where they are there, are at
       most 30 s ahead; from `iat`, or else from now, to `exp` it is an hour at most.

    Raises Unauthenticated, whatever the text is. It does not count uses:
    `replay.ReplayWindow` does.
    """
    if not audience:
        raise ValueError("audience: expected the name by which we are addressed")
    at = as_datetime(now).timestamp()
    try:
        return _verify(token, bundles, audience, at)
    except (IdentityError, ValueError, RecursionError) as error:
        raise _refused(f"JWT-SVID: {error}") from error


def _refused(reason: str) -> Unauthenticated:
    return Unauthenticated(PUBLIC, reason)


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


# --- reading --------------------------------------------------------------------

_Object: TypeAlias = Mapping[str, object]


def _verify(
    token: str,
    bundles: Mapping[str, Mapping[str, PublicKey]],
    audience: str,
    at: float,
) -> JwtSvid:
    header, claims, signature = _parse(token)  # step 1
    algorithm, key_id = _check_header(header)  # step 2
    subject = workload_id(_text(claims, "sub"))  # step 3
    key = bundles.get(subject.trust_domain, {}).get(key_id)
    if key is None:
        raise IdentityError(
            f"{subject}: no JWT authority {key_id!r:.80} in the trust bundle of "
            f"{subject.trust_domain}"
        )
    check_signature(algorithm, key, signature, token.rpartition(".")[0].encode())  # 4
    _check_audience(subject, claims.get("aud"), audience)  # step 5
    issued_at, expires_at = _check_times(subject, claims, at)  # step 6
    return JwtSvid(
        token=token,
        id=subject,
        audience=(audience,),
        issued_at=None if issued_at is None else _utc(issued_at),
        expires_at=_utc(expires_at),
        key_id=key_id,
    )


def _parse(token: str) -> tuple[_Object, _Object, bytes]:
    if len(token) > MAX_TOKEN_BYTES:
        raise IdentityError(f"{len(token)} characters, at most {MAX_TOKEN_BYTES}")
    parts = token.split(".")
    if len(parts) != 3:
        raise IdentityError("not a JWS in compact form: expected three parts")
    header, claims, signature = (base64url_decode(part) for part in parts)
    return (
        json_object(header, "header", MAX_TOKEN_BYTES),
        json_object(claims, "claims", MAX_TOKEN_BYTES),
        signature,
    )


def _check_header(header: _Object) -> tuple[str, str]:
    algorithm, key_id = _text(header, "alg"), _text(header, "kid")
    if algorithm not in ALGORITHMS:
        raise IdentityError(f"alg {algorithm!r:.80}: expected ES, RS or PS 256 to 512")
    if header.get("typ", "JWT") not in ("JWT", "JOSE"):
        raise IdentityError("typ: expected JWT or JOSE")
    if foreign := sorted(header.keys() - _HEADERS):
        raise IdentityError(f"header {foreign[0]!r:.80}: expected alg, kid and typ")
    return algorithm, key_id


def _text(members: _Object, name: str) -> str:
    value = members.get(name)
    if not isinstance(value, str):
        raise IdentityError(f"{name}: expected a text")
    return value


def _check_audience(subject: SpiffeId, value: object, audience: str) -> None:
    if value not in (audience, [audience]):
        raise IdentityError(
            f"{subject}: for the audience {value!r:.200}, expected {audience!r} alone"
        )


def _check_times(
    subject: SpiffeId, claims: _Object, at: float
) -> tuple[float | None, float]:
    expires_at, issued_at, begins_at = (
        _time(claims, name) for name in ("exp", "iat", "nbf")
    )
    if expires_at is None:
        raise IdentityError(f"{subject}: never expires (no exp)")
    if at >= expires_at:
        raise IdentityError(f"{subject}: expired at {_utc(expires_at)}")
    for name, moment in (("iat", issued_at), ("nbf", begins_at)):
        if moment is not None and moment > at + LEEWAY_S:
            raise IdentityError(f"{subject}: {name} is ahead, at {_utc(moment)}")
    lifetime = expires_at - (at if issued_at is None else issued_at)
    if lifetime > MAX_LIFETIME_S:
        raise IdentityError(
            f"{subject}: lives {lifetime:g} s, at most {MAX_LIFETIME_S} are allowed"
        )
    return issued_at, expires_at


def _time(claims: _Object, name: str) -> float | None:
    if name not in claims:
        return None
    value = claims[name]
    # A bool is an int to Python; the bound keeps to what a datetime can say.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise IdentityError(f"{name}: expected a number")
    if not 0 <= value < 2**33:
        raise IdentityError(f"{name}: expected seconds since 1970")
    return value


def _part(members: Mapping[str, object]) -> str:
    return base64url_encode(json.dumps(members, separators=(",", ":")).encode())
