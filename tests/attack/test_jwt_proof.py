"""A second proof beside the certificate: a stolen SVID alone makes no call."""

import asyncio
import time

import grpc
import numpy as np
import pytest

from tests.unit.transport.support import CLI, DOMAIN, GATEWAY, SERVER, Echo
from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import Agent, JwtProof, JwtSource, Rules, SpiffeId
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import AsyncClient, Client, Server, inference_methods

X = {"x": np.zeros((1, 4), "f4")}


class Place:
    """An agent that calls us the CLI, and an echo server that asks for tokens."""

    def __init__(self, folder):
        folder.chmod(0o700)
        self.authority = ThrowAwayAuthority(DOMAIN)
        self.agent = Agent(
            self.authority, folder, Rules(trust_domain=DOMAIN, default_id=CLI)
        )
        self.service, self.refusals = Echo(), []

    def __enter__(self):
        self.agent.start()
        self.tokens = JwtSource(self.agent.socket, spiffe_id=SpiffeId(CLI))
        self.proof = JwtProof(self.tokens.authorities, SpiffeId(SERVER))
        self.server = Server(
            inference_methods(self.service, "echo"),
            source=self.authority.source(SERVER),
            proof=self.proof,
            on_refused=self.refusals.append,
        )
        host, port = self.server.start("127.0.0.1")
        self.address = f"{host}:{port}"
        return self

    def __exit__(self, *_):
        self.server.stop(0)
        self.tokens.close()
        self.agent.stop()

    def client(self, spiffe_id=CLI, *, tokens=None):
        source = self.authority.source(spiffe_id)
        return Client(self.address, source=source, server_id=SERVER, tokens=tokens)

    def why(self):
        return self.refusals[-1].error.reason


class Fixed:
    """A source of tokens that gives what a thief has."""

    def __init__(self, token):
        self.token = token

    def fetch(self, _):
        return self

    @property
    def authorization(self):
        return f"Bearer {self.token}"


@pytest.fixture
def place(tmp_path):
    with Place(tmp_path) as one:
        yield one


def test_j9_a_call_bears_a_token_of_its_peer_and_no_room_sees_it(place):
    with place.client(tokens=place.tokens) as client:
        client.infer(X)
        client.infer(X)
    assert len(place.service.calls) == 2
    assert "authorization" not in place.service.calls[0].headers


def test_j9_a_call_from_an_event_loop_too(place):
    async def ask():
        client = AsyncClient(
            place.address,
            source=place.authority.source(CLI),
            server_id=SERVER,
            tokens=place.tokens,
        )
        await client.infer(X)
        await client.close()

    asyncio.run(ask())
    assert len(place.service.calls) == 1


def refused(place, client):
    with client, pytest.raises(Unauthenticated) as caught:
        client.infer(X)
    assert "JWT" not in str(caught.value)
    assert place.service.calls == []
    return place.why()


def test_a_stolen_svid_alone_makes_no_call(place):
    assert refused(place, place.client()) == f"{CLI}: the call bears no JWT-SVID"


def test_anothers_token_does_not_help(place):
    gateways = place.authority.issue_jwt(GATEWAY, [SERVER])
    why = refused(place, place.client(tokens=Fixed(gateways.token)))
    assert why == f"{CLI}: the call bears the JWT-SVID of {GATEWAY}"


def test_a_token_seen_on_the_way_does_not_help_another(place):
    token = place.tokens.fetch(SERVER).token
    why = refused(place, place.client(GATEWAY, tokens=Fixed(token)))
    assert why == f"{GATEWAY}: the call bears the JWT-SVID of {CLI}"


def test_a_token_for_another_server_does_not_help(place):
    token = place.tokens.fetch(GATEWAY).token
    assert "audience" in refused(place, place.client(tokens=Fixed(token)))


@pytest.mark.slow
def test_a_token_that_expired_since_it_was_known_does_not_help(place):
    token = place.authority.issue_jwt(CLI, [SERVER], ttl_s=1).token
    with place.client(tokens=Fixed(token)) as client:
        client.infer(X)
    place.service.calls.clear()
    time.sleep(2.1)
    assert "expired" in refused(place, place.client(tokens=Fixed(token)))


def test_a_token_of_a_key_that_was_withdrawn_does_not_help(place, monkeypatch):
    with place.client(tokens=place.tokens) as client:
        client.infer(X)
        place.service.calls.clear()
        monkeypatch.setattr(place.proof, "_authorities", lambda: {DOMAIN: {}})
        assert "no JWT authority" in refused(place, client)


@pytest.mark.parametrize("value", ["Basic YTpi", "Bearer", "bearer \t", "x" * 9000])
def test_other_credentials_are_refused(place, value):
    metadata = (("authorization", value),)
    with pytest.raises(Unauthenticated):
        place.proof.check(dict(metadata)["authorization"], peer_of(place))


def peer_of(place):
    from ztserve.identity import verify_peer

    svid = place.authority.issue(CLI)
    return verify_peer(svid.chain_der, place.authority.bundles, now=types.now())


@pytest.mark.parametrize("thief", ["alone", "another's"])
def test_without_the_proof_the_thief_calls(place, monkeypatch, thief):
    monkeypatch.setattr(place.proof, "check", lambda *_: None)
    token = place.authority.issue_jwt(GATEWAY, [SERVER]).token
    tokens = Fixed(token) if thief != "alone" else None
    with place.client(tokens=tokens) as client:
        client.infer(X)
    assert len(place.service.calls) == 1


# --- the source of our own ----------------------------------------------------------


def test_a_token_is_asked_for_once_until_half_of_its_life(place):
    first = place.tokens.fetch(SERVER)
    assert place.tokens.fetch(SERVER) is first
    assert place.tokens.fetch(GATEWAY) is not first
    assert place.tokens.is_held(SERVER)
    life = first.expires_at - types.now()
    place.tokens._clock = lambda: types.now() + life * 0.6
    assert not place.tokens.is_held(SERVER)


def test_an_identity_that_is_not_ours_gets_no_token(place):
    with (
        JwtSource(place.agent.socket, spiffe_id=SpiffeId(GATEWAY)) as source,
        pytest.raises(IdentityError, match=r"PERMISSION_DENIED: .*is not"),
    ):
        source.fetch(SERVER)


def test_a_closed_source_gives_nothing(place):
    source = JwtSource(place.agent.socket, spiffe_id=SpiffeId(CLI))
    source.fetch(SERVER)
    source.close()
    source.close()
    assert source.authorities() == {}
    with pytest.raises(IdentityError, match="closed"):
        source.fetch(SERVER)


@pytest.mark.slow
def test_an_agent_that_is_away_is_named(tmp_path):
    with pytest.raises(IdentityError, match=r"no JWT bundles .* within 0.5 s: UNAVAIL"):
        JwtSource(
            f"unix://{tmp_path}/none.sock", spiffe_id=SpiffeId(CLI), timeout_s=0.5
        )


@pytest.mark.slow
def test_keys_that_roll_are_followed_under_load(place):
    with place.client(tokens=place.tokens) as client:
        before = place.tokens.authorities()
        for turn in range(40):
            if turn == 10:
                place.authority.roll()
            client.infer(X)
            time.sleep(0.02)
        assert place.tokens.authorities() is not before
    assert len(place.service.calls) == 40


def test_a_raw_call_with_two_tokens_is_refused(place):
    from tests.unit.transport.support import INFER, channel, message

    good = place.tokens.fetch(SERVER).authorization
    port = int(place.address.rpartition(":")[2])
    with channel(port, place.authority.issue(CLI), place.authority) as door:
        ask = door.unary_unary(INFER)
        metadata = (("authorization", good), ("authorization", good))
        with pytest.raises(grpc.RpcError) as caught:
            ask(message(), metadata=metadata, timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
