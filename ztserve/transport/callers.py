"""The end user behind a call, as one hop tells the next: the header `zt-caller-bin`.

UTF-8 JSON of at most 4 KiB: ``aud`` (the callee's SPIFFE ID), ``req`` (the SHA-256 of
the request, a stream's first message, in hex), ``exp`` (seconds since the epoch, at
most 30 s ahead), and the caller's ``iss``, ``sub``, ``claims`` and ``proof``. It is as
good as the peer that sends it: a server reads it only from peers that its policy names
as delegates.
"""

import json
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from ztserve import types
from ztserve.errors import ConfigError, Unauthenticated
from ztserve.types import Caller, Peer

HEADER = "zt-caller-bin"
MAX_BYTES = 4096
MAX_AHEAD_S = 30.0
LIFETIME_S = 20.0
"""How long our own headers hold; the rest is for clocks that differ."""
MAX_TEXT = 1024
_FIELDS = {"aud", "req", "exp", "iss", "sub", "claims", "proof"}
PUBLIC = "the caller header does not hold"


def written(caller: Caller, *, audience: str, request: bytes) -> bytes:
    """Return the header that asserts `caller` to `audience`, for this one request.

    Raises ConfigError where the caller does not fit into a header.
    """
    header = json.dumps(
        {
            "aud": audience,
            "req": sha256(request).hexdigest(),
            "exp": types.now().timestamp() + LIFETIME_S,
            "iss": caller.issuer,
            "sub": caller.subject,
            "claims": dict(caller.claims),
            "proof": caller.proof,
        },
        separators=(",", ":"),
    ).encode()
    if len(header) > MAX_BYTES:
        raise ConfigError(
            f"caller {caller.subject!r}: its header has {len(header)} bytes, at most "
            f"{MAX_BYTES} travel; select fewer claims"
        )
    return header


def read(header: bytes, *, audience: str, peer: Peer) -> tuple[Caller, str]:
    """Return the caller that the delegate `peer` asserts to us, `audience`.

    And what `check_request` needs, once the request has been read.
    Raises Unauthenticated where the header is malformed, for another server, or out
    of its time: a delegate that sends such a one is refused, not half believed.
    """
    fields = _parsed(header)
    if fields["aud"] != audience:
        raise _refused(f"it is for {fields['aud']!r:.200}, not for {audience}", peer)
    now = types.now().timestamp()
    if not now < fields["exp"] <= now + MAX_AHEAD_S:
        raise _refused(
            f"it holds for {fields['exp'] - now:.1f} s more, expected more than 0 and "
            f"at most {MAX_AHEAD_S:.0f} s",
            peer,
        )
    proof = f"{fields['proof']}, asserted by {peer.id}"
    claims = MappingProxyType(fields["claims"])
    return Caller(fields["iss"], fields["sub"], claims, proof), fields["req"]


def check_request(bound: str, request: bytes, peer: Peer) -> None:
    """Raise Unauthenticated unless the header was made for this request."""
    if sha256(request).hexdigest() != bound:
        raise _refused("it was made for another request", peer)


def _parsed(header: bytes) -> dict[str, Any]:
    if len(header) > MAX_BYTES:
        raise _refused(f"{len(header)} bytes, at most {MAX_BYTES} are allowed")
    try:
        fields = json.loads(header, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _refused(f"it is not JSON: {error!r:.200}") from None
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise _refused(f"expected an object of just {', '.join(sorted(_FIELDS))}")
    for name in ("aud", "req", "iss", "sub", "proof"):
        if not isinstance(fields[name], str) or len(fields[name]) > MAX_TEXT:
            raise _refused(f"{name} must be a text of at most {MAX_TEXT} characters")
    if type(fields["exp"]) not in (int, float):
        raise _refused("exp must be a number of seconds since the epoch")
    if not isinstance(fields["claims"], dict):
        raise _refused("claims must be an object")
    if not fields["sub"] or not fields["iss"]:
        raise _refused("iss and sub must not be empty")
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _refused(reason: str, peer: Peer | None = None) -> Unauthenticated:
    source = f" from {peer.id}" if peer else ""
    return Unauthenticated(PUBLIC, f"{HEADER}{source}: {reason}")
