import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve import types
from ztserve.errors import ConfigError, Unauthenticated
from ztserve.transport import callers
from ztserve.types import Caller, Peer

AUD = "spiffe://td/callee"
PEER = Peer("spiffe://td/gateway", 1, types.now(), types.now(), "")
CALLER = Caller("https://issuer", "ada", {"role": "doctor"}, "x509-svid")


def header(**wrong) -> bytes:
    fields = json.loads(callers.written(CALLER, audience=AUD, request=b"r"))
    return json.dumps({**fields, **wrong}).encode()


def test_a_caller_arrives_as_asserted_by_the_peer() -> None:
    written = callers.written(CALLER, audience=AUD, request=b"r")
    got, bound = callers.read(written, audience=AUD, peer=PEER)
    assert (got.issuer, got.subject, dict(got.claims)) == (
        "https://issuer",
        "ada",
        {"role": "doctor"},
    )
    assert got.proof == "x509-svid, asserted by spiffe://td/gateway"
    callers.check_request(bound, b"r", PEER)
    with pytest.raises(Unauthenticated, match="made for another request"):
        callers.check_request(bound, b"s", PEER)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"aud": "spiffe://td/other"}, "not for spiffe://td/callee"),
        ({"exp": 0}, "expected more than 0"),
        ({"exp": 1e12}, "at most 30 s"),
        ({"exp": "soon"}, "exp must be a number"),
        ({"exp": True}, "exp must be a number"),
        ({"sub": ""}, "must not be empty"),
        ({"iss": ""}, "must not be empty"),
        ({"sub": 7}, "sub must be a text"),
        ({"sub": "x" * 1025}, "at most 1024 characters"),
        ({"claims": []}, "claims must be an object"),
        ({"more": 1}, "expected an object of just"),
    ],
)
def test_a_header_that_does_not_hold_is_refused(wrong, match: str) -> None:
    with pytest.raises(Unauthenticated, match=match) as caught:
        callers.read(header(**wrong), audience=AUD, peer=PEER)
    assert caught.value.public == "the caller header does not hold"


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"x" * 4097, "4097 bytes"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "expected an object"),
        (b"[" * 4096, "not JSON"),
        (b'{"aud":"a","aud":"b"}', "given twice"),
        (header(exp=0).replace(b'"exp": 0', b'"exp": NaN'), "expected more than 0"),
    ],
)
def test_a_malformed_header_is_refused(raw: bytes, match: str) -> None:
    with pytest.raises(Unauthenticated, match=match):
        callers.read(raw, audience=AUD, peer=PEER)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_caller_or_unauthenticated(raw: bytes) -> None:
    with pytest.raises(Unauthenticated):
        callers.read(raw, audience=AUD, peer=PEER)


def test_a_caller_with_too_many_claims_is_refused_before_it_is_sent() -> None:
    caller = Caller("i", "s", {"c": "x" * 5000})
    with pytest.raises(ConfigError, match="select fewer claims"):
        callers.written(caller, audience=AUD, request=b"r")
