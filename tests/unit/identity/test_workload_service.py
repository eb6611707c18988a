"""The server's side of the Workload API, by the ids of the requirements."""

import os
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
import spiffe
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from google.protobuf.json_format import MessageToDict
from spiffe._proto import workload_pb2

from tests.unit.identity.test_entries import entry, until, written
from ztserve.errors import IdentityError
from ztserve.identity import (
    Agent,
    Rules,
    TrustBundle,
    WorkloadSource,
    sign_jwt_svid,
    verify_jwt_svid,
)
from ztserve.identity import workload_api as wire
from ztserve.identity.agent import callers as workload_callers
from ztserve.identity.agent.attestation import CannotTell
from ztserve.identity.subscribers import Subscribers
from ztserve.testing import ThrowAwayAuthority

CLI = "spiffe://td.example/ns/dev/sa/cli"
A, B = "spiffe://td.example/ns/x/sa/a", "spiffe://td.example/ns/x/sa/b"
RULES = Rules(trust_domain="td.example", default_id=CLI)
OTHER = ThrowAwayAuthority("b.example")

MESSAGES = {
    wire.FETCH_SVID: (wire.X509SVIDRequest, wire.X509SVIDResponse),
    wire.FETCH_BUNDLES: (wire.X509BundlesRequest, wire.X509BundlesResponse),
    wire.FETCH_JWT_SVID: (wire.JWTSVIDRequest, wire.JWTSVIDResponse),
    wire.FETCH_JWT_BUNDLES: (wire.JWTBundlesRequest, wire.JWTBundlesResponse),
    wire.VALIDATE_JWT_SVID: (
        wire.ValidateJWTSVIDRequest,
        wire.ValidateJWTSVIDResponse,
    ),
}
STREAMS = [wire.FETCH_SVID, wire.FETCH_BUNDLES, wire.FETCH_JWT_BUNDLES]
CALLS = [wire.FETCH_JWT_SVID, wire.VALIDATE_JWT_SVID]


def call(endpoint, method, metadata=(wire.HEADER,), **fields):
    """Make one call over plain gRPC; return its answer or its first one."""
    with stream(endpoint, method, metadata, **fields) as answers:
        return next(answers)


@contextmanager
def stream(endpoint, method, metadata=(wire.HEADER,), **fields):
    request, answer = MESSAGES[method]
    with grpc.insecure_channel(endpoint) as channel:
        # A client need not know whether one answer comes, or many.
        answers = channel.unary_stream(
            f"/{wire.SERVICE}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )(request(**fields), metadata=metadata, timeout=20)
        try:
            yield answers
        finally:
            answers.cancel()


def refused(code, endpoint, method, *args, **fields):
    with pytest.raises(grpc.RpcError) as caught:
        call(endpoint, method, *args, **fields)
    assert caught.value.code() is code
    return caught.value.details()


@pytest.fixture
def entries(private):
    """Write entries; start an agent that follows them: (agent, write)."""
    path = private / "entries.toml"
    written(path, "entry = []")

    @contextmanager
    def started(authority, text, **more):
        written(path, text)
        rules = Rules(trust_domain="td.example")
        with Agent(authority, private, rules, entries=path, **more) as agent:
            yield agent, lambda changed: written(path, changed)

    return started


class Federation:
    """Bundles of other trust domains, as a test sets them."""

    def __init__(self, *bundles):
        self.held = {bundle.trust_domain: bundle for bundle in bundles}
        self.subscribers = Subscribers()
        self.subscribe = self.subscribers.subscribe

    def bundles(self):
        return self.held

    def drop(self, name):
        self.held = {n: bundle for n, bundle in self.held.items() if n != name}
        self.subscribers.notify()


# --- the endpoint -------------------------------------------------------------------


@pytest.mark.parametrize("method", MESSAGES)
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        ((wire.HEADER[0], "True"),),
        ((wire.HEADER[0], "false"),),
        ((wire.HEADER[0], " true "),),
        (wire.HEADER, wire.HEADER),
    ],
)
def test_w2_a_call_without_the_security_header_is_refused(agent, method, metadata):
    code = grpc.StatusCode.INVALID_ARGUMENT
    details = refused(code, agent.socket, method, metadata)
    assert details == "the header workload.spiffe.io: true is missing"


def test_w1_the_api_is_plain_grpc_over_a_unix_socket(agent):
    assert agent.socket.startswith("unix:///")
    assert call(agent.socket, wire.FETCH_SVID).svids[0].spiffe_id == CLI


def test_w3_a_caller_shows_neither_certificate_nor_token(agent):
    # An insecure channel, no credentials of a call, and the header alone:
    for method in STREAMS:
        assert call(agent.socket, method, metadata=(wire.HEADER,))


@pytest.mark.parametrize("method", ["FetchWITSVID", "FetchWITBundles", "Nonsense"])
def test_w14_the_service_has_the_calls_of_both_profiles_and_no_other(agent, method):
    service = workload_pb2.DESCRIPTOR.services_by_name[wire.SERVICE]
    assert sorted(service.methods_by_name) == sorted(MESSAGES)
    for known in MESSAGES:
        with pytest.raises(grpc.RpcError) as caught:
            call(agent.socket, known, metadata=())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with grpc.insecure_channel(agent.socket) as channel:
        answers = channel.unary_stream(f"/{wire.SERVICE}/{method}")(
            b"", metadata=(wire.HEADER,), timeout=20
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("method", MESSAGES)
def test_w8_a_process_without_identity_is_denied(authority, private, method):
    with Agent(authority, private, Rules(trust_domain="td.example")) as agent:
        code = grpc.StatusCode.PERMISSION_DENIED
        details = refused(code, agent.socket, method)
        assert f"process {os.getpid()} has registered no identity" in details


def test_w8_a_process_that_cannot_be_judged_now_may_ask_again(authority, entries):
    def selectors(_process):
        raise CannotTell("Ray does not answer")

    text = entry(A, ("ray:app:default",))
    with entries(authority, text, selectors=selectors) as (agent, _):
        code = grpc.StatusCode.UNAVAILABLE
        assert refused(code, agent.socket, wire.FETCH_SVID) == "Ray does not answer"


# --- streams ------------------------------------------------------------------------


@pytest.mark.parametrize("method", STREAMS)
def test_w5_the_first_answer_of_each_stream_comes_at_once(agent, method):
    call(agent.socket, method)  # what is imported at the first call
    began = time.monotonic()
    call(agent.socket, method)
    assert time.monotonic() - began < 0.5


@pytest.mark.slow
def test_w6_each_answer_holds_the_full_set(authority, entries):
    federation = Federation(OTHER.trust_bundle())
    text = entry(A, federates_with="['b.example']") + entry(B)
    with (
        entries(authority, text, federation=federation) as (agent, write),
        stream(agent.socket, wire.FETCH_SVID) as answers,
    ):
        first = next(answers)
        write(text + "# only to have it read\n")
        second = next(answers)
    for answer in (first, second):
        assert [svid.spiffe_id for svid in answer.svids] == [A, B]
        assert [svid.bundle for svid in answer.svids] == [
            b"".join(authority.bundle)
        ] * 2
        assert dict(answer.federated_bundles) == {
            "spiffe://b.example": b"".join(OTHER.bundle)
        }


@pytest.mark.slow
def test_w7_w8_an_entry_that_is_removed_withdraws_its_svid_at_once(authority, entries):
    with (
        entries(authority, entry(A) + entry(B)) as (agent, write),
        stream(agent.socket, wire.FETCH_SVID) as answers,
        stream(agent.socket, wire.FETCH_JWT_BUNDLES) as bundles,
    ):
        assert [svid.spiffe_id for svid in next(answers).svids] == [A, B]
        assert next(bundles)
        write(entry(B))
        began = time.monotonic()
        assert [svid.spiffe_id for svid in next(answers).svids] == [B]
        assert time.monotonic() - began < 1
        assert next(bundles)
        write("entry = []")
        began = time.monotonic()
        for withdrawn in (answers, bundles):
            with pytest.raises(grpc.RpcError) as caught:
                next(withdrawn)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "no registration entry applies" in caught.value.details()
        assert time.monotonic() - began < 1


@pytest.mark.slow
def test_w8_our_own_source_stops_at_once_when_its_entry_goes(authority, entries):
    with (
        entries(authority, entry(A)) as (agent, write),
        WorkloadSource(agent.socket, timeout_s=20) as source,
    ):
        assert source.current().svid.id == A

        def is_withdrawn():
            try:
                source.current()
            except IdentityError:
                return True
            return False

        write("entry = []")
        assert until(is_withdrawn) < 1
        write(entry(A))
        until(lambda: not is_withdrawn(), seconds=4)


def test_w7_a_bundle_that_leaves_the_federation_leaves_the_streams(authority, private):
    federation = Federation(OTHER.trust_bundle())
    with Agent(authority, private, RULES, federation=federation) as agent:
        opened = {m: stream(agent.socket, m) for m in STREAMS}
        answers = {m: cm.__enter__() for m, cm in opened.items()}
        first = {m: next(one) for m, one in answers.items()}
        assert set(first[wire.FETCH_SVID].federated_bundles) == {"spiffe://b.example"}
        for method in (wire.FETCH_BUNDLES, wire.FETCH_JWT_BUNDLES):
            assert set(first[method].bundles) == {
                "spiffe://td.example",
                "spiffe://b.example",
            }
        began = time.monotonic()
        federation.drop("b.example")
        then = {m: next(one) for m, one in answers.items()}
        assert time.monotonic() - began < 0.5
        assert not then[wire.FETCH_SVID].federated_bundles
        for method in (wire.FETCH_BUNDLES, wire.FETCH_JWT_BUNDLES):
            assert set(then[method].bundles) == {"spiffe://td.example"}
        for cm in opened.values():
            cm.__exit__(None, None, None)


def test_w6_an_authority_that_rolls_its_root_tells_all_streams(private):
    authority = ThrowAwayAuthority("td.example")
    with (
        Agent(authority, private, RULES) as agent,
        stream(agent.socket, wire.FETCH_SVID) as answers,
    ):
        first = next(answers).svids[0].bundle
        began = time.monotonic()
        authority.roll()
        second = next(answers).svids[0].bundle
        assert time.monotonic() - began < 0.5
    assert second == b"".join(authority.bundle)
    assert second.startswith(first)
    assert len(second) > len(first)


def test_an_entry_names_the_domains_that_it_federates_with(authority, entries):
    third = ThrowAwayAuthority("c.example")
    federation = Federation(OTHER.trust_bundle(), third.trust_bundle())
    text = entry(A, federates_with="['c.example', 'unknown.example']")
    with entries(authority, text, federation=federation) as (agent, _):
        answer = call(agent.socket, wire.FETCH_SVID)
        assert set(answer.federated_bundles) == {"spiffe://c.example"}
        bundles = call(agent.socket, wire.FETCH_BUNDLES).bundles
        assert set(bundles) == {"spiffe://td.example", "spiffe://c.example"}


def test_a_federation_cannot_speak_for_our_own_domain(authority, private):
    forged = TrustBundle("td.example", OTHER.bundle, {})
    with Agent(authority, private, RULES, federation=Federation(forged)) as agent:
        bundles = call(agent.socket, wire.FETCH_BUNDLES).bundles
        assert dict(bundles) == {"spiffe://td.example": b"".join(authority.bundle)}
        assert not call(agent.socket, wire.FETCH_SVID).federated_bundles


@pytest.mark.slow
def test_svids_are_renewed_at_half_of_their_life(authority, entries):
    with (
        entries(authority, entry(A, ttl_s=1) + entry(B)) as (agent, _),
        stream(agent.socket, wire.FETCH_SVID) as answers,
    ):
        serials, began = set(), time.monotonic()
        for _ in range(3):
            leaf = x509.load_der_x509_certificate(next(answers).svids[0].x509_svid)
            serials.add(leaf.serial_number)
        assert 0.9 < time.monotonic() - began < 3
    assert len(serials) == 3


@pytest.mark.slow
def test_a_stream_that_ended_is_forgotten(agent):
    for _ in range(20):
        call(agent.socket, wire.FETCH_SVID)
    until(lambda: not agent._callers._streams, seconds=5)


@pytest.mark.slow
def test_a_change_reaches_many_streams_within_a_second(private, monkeypatch):
    monkeypatch.setattr(workload_callers, "MAX_STREAMS_OF_ONE", 64)
    authority = ThrowAwayAuthority("td.example")
    told = threading.Semaphore(0)
    with Agent(authority, private, RULES) as agent:

        def listen(answers):
            try:
                for _ in answers:
                    told.release()
            except grpc.RpcError:
                pass

        with grpc.insecure_channel(agent.socket) as channel:
            fetch = channel.unary_stream(
                f"/{wire.SERVICE}/{wire.FETCH_SVID}",
                request_serializer=wire.X509SVIDRequest.SerializeToString,
                response_deserializer=wire.X509SVIDResponse.FromString,
            )
            opened = [
                fetch(wire.X509SVIDRequest(), metadata=(wire.HEADER,))
                for _ in range(64)
            ]
            threads = [threading.Thread(target=listen, args=(o,)) for o in opened]
            for thread in threads:
                thread.start()
            for _ in opened:
                assert told.acquire(timeout=20)
            began = time.monotonic()
            authority.roll()
            for _ in opened:
                assert told.acquire(timeout=20)
            assert time.monotonic() - began < 1
            for one in opened:
                one.cancel()
        for thread in threads:
            thread.join()


# --- X.509-SVID profile -------------------------------------------------------------


def test_w9_the_leaf_comes_first_in_der_and_the_key_is_open_pkcs8(private):
    authority = ThrowAwayAuthority("td.example", intermediate_ttl_s=7200)
    with Agent(authority, private, RULES) as agent:
        (svid,) = call(agent.socket, wire.FETCH_SVID).svids
    leaf = x509.load_der_x509_certificate(svid.x509_svid[: der_length(svid.x509_svid)])
    rest = svid.x509_svid[der_length(svid.x509_svid) :]
    assert uris(leaf) == [CLI]
    assert uris(x509.load_der_x509_certificate(rest)) == ["spiffe://td.example"]
    leaf.verify_directly_issued_by(x509.load_der_x509_certificate(rest))
    key = load_der_private_key(svid.x509_svid_key, password=None)
    assert key.public_key() == leaf.public_key()
    pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    assert pkcs8 == svid.x509_svid_key
    assert svid.bundle == b"".join(authority.bundle)


def der_length(der):
    octets = der[1] & 0x7F
    if der[1] < 0x80:
        return 2 + der[1]
    return 2 + octets + int.from_bytes(der[2 : 2 + octets])


def uris(certificate):
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return names.value.get_values_for_type(x509.UniformResourceIdentifier)


def test_w10_hints_are_unique_and_the_first_entry_keeps_its_own(authority, entries):
    text = entry(A, hint="'internal'") + entry(B, hint="'internal'")
    text += entry("spiffe://td.example/c", hint="'other'")
    text += entry("spiffe://td.example/d")
    with entries(authority, text) as (agent, _):
        svids = call(agent.socket, wire.FETCH_SVID).svids
        assert [svid.hint for svid in svids] == ["internal", "", "other", ""]
        tokens = call(agent.socket, wire.FETCH_JWT_SVID, audience=["x"]).svids
        assert [token.hint for token in tokens] == ["internal", "", "other", ""]


def test_an_entry_s_ttl_is_that_of_its_svids(authority, entries):
    with entries(authority, entry(A, ttl_s=60) + entry(B)) as (agent, _):
        lives = []
        for svid in call(agent.socket, wire.FETCH_SVID).svids:
            leaf = x509.load_der_x509_certificate(svid.x509_svid)
            lives.append(leaf.not_valid_after_utc - datetime.now(UTC))
    assert timedelta(seconds=55) < lives[0] < timedelta(seconds=62)
    assert timedelta(seconds=3590) < lives[1] < timedelta(seconds=3602)


def test_the_stock_client_is_content_with_our_agent(agent, authority):
    with spiffe.WorkloadApiClient(agent.socket) as client:
        context = client.fetch_x509_context()
        bundles = client.fetch_x509_bundles()
    assert str(context.default_svid.spiffe_id) == CLI
    trust_domain = spiffe.TrustDomain("td.example")
    for found in (context.x509_bundle_set, bundles):
        bundle = found.get_bundle_for_trust_domain(trust_domain)
        (root,) = bundle.x509_authorities
        assert root.public_bytes(Encoding.DER) == authority.bundle[0]


# --- JWT-SVID profile ---------------------------------------------------------------


def test_w11_an_audience_is_required_and_without_an_id_all_are_given(
    authority, entries
):
    with entries(authority, entry(A) + entry(B)) as (agent, _):
        invalid, denied = (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.PERMISSION_DENIED,
        )
        ask = (agent.socket, wire.FETCH_JWT_SVID)
        for audience in ([], [""], ["a", ""], ["x" * 1025], ["x"] * 17):
            assert "audience: " in refused(invalid, *ask, audience=audience)
        wrong = refused(invalid, *ask, audience=["x"], spiffe_id="nonsense")
        assert "must begin with spiffe://" in wrong
        other = refused(denied, *ask, audience=["x"], spiffe_id=CLI)
        assert f"is not {CLI}" in other
        answer = call(*ask, audience=["x"])
        assert [svid.spiffe_id for svid in answer.svids] == [A, B]
        (one,) = call(*ask, audience=["x"], spiffe_id=B).svids
    assert one.spiffe_id == B
    keys = {"td.example": authority.trust_bundle().jwt_authorities}
    now = datetime.now(UTC)
    svid = verify_jwt_svid(one.svid, keys, audience="x", now=now)
    assert svid.id == B
    assert timedelta(0) < svid.expires_at - now <= timedelta(seconds=301)


def test_w11_a_jwt_svid_lives_no_longer_than_its_entry_says(authority, entries):
    with entries(authority, entry(A, ttl_s=30)) as (agent, _):
        (one,) = call(agent.socket, wire.FETCH_JWT_SVID, audience=["x"]).svids
    keys = {"td.example": authority.trust_bundle().jwt_authorities}
    now = datetime.now(UTC)
    svid = verify_jwt_svid(one.svid, keys, audience="x", now=now)
    assert svid.expires_at - now <= timedelta(seconds=31)


def test_w13_jwt_bundles_hold_keys_for_jwt_svids_and_no_others(authority, private):
    federation = Federation(OTHER.trust_bundle())
    with Agent(authority, private, RULES, federation=federation) as agent:
        bundles = call(agent.socket, wire.FETCH_JWT_BUNDLES).bundles
    assert set(bundles) == {"spiffe://td.example", "spiffe://b.example"}
    for name, own in (("td.example", authority), ("b.example", OTHER)):
        found = TrustBundle.parse(bundles[f"spiffe://{name}"], name)
        assert found.x509_authorities == ()
        assert found.jwt_authorities == own.trust_bundle().jwt_authorities
        assert found.jwt_authorities


def test_w12_a_jwt_svid_is_judged_by_its_own_domain_s_bundle(authority, private):
    federation = Federation(OTHER.trust_bundle())
    foreign = OTHER.issue_jwt("spiffe://b.example/x", ["me"])
    with Agent(authority, private, RULES, federation=federation) as agent:
        ask = (agent.socket, wire.VALIDATE_JWT_SVID)
        (own,) = call(agent.socket, wire.FETCH_JWT_SVID, audience=["me"]).svids
        told = call(*ask, audience="me", svid=own.svid)
        assert told.spiffe_id == CLI
        claims = MessageToDict(told.claims)
        assert (claims["sub"], claims["aud"]) == (CLI, ["me"])
        assert claims["exp"] > time.time()
        assert call(*ask, audience="me", svid=foreign.token).spiffe_id == foreign.id
        stolen = forged("spiffe://b.example/x", authority)
        details = refused(
            grpc.StatusCode.INVALID_ARGUMENT, *ask, audience="me", svid=stolen
        )
        assert "no JWT authority" in details
        federation.drop("b.example")
        details = refused(
            grpc.StatusCode.INVALID_ARGUMENT, *ask, audience="me", svid=foreign.token
        )
        assert "no JWT authority" in details


def forged(spiffe_id, authority):
    """A token of another domain's workload, signed with our key."""
    jwt = authority._jwt_keys.current
    now = datetime.now(UTC)
    return sign_jwt_svid(spiffe_id, ["me"], key=jwt.key, key_id=jwt.id, now=now).token


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"audience": "me"}, "svid is missing"),
        ({"svid": "x"}, "audience: expected texts"),
        ({"audience": "me", "svid": "x"}, "JWT-SVID: "),
    ],
)
def test_w11_a_token_is_validated_for_one_audience(agent, fields, message):
    code = grpc.StatusCode.INVALID_ARGUMENT
    assert message in refused(code, agent.socket, wire.VALIDATE_JWT_SVID, **fields)


def test_a_token_for_another_audience_is_invalid(agent):
    (own,) = call(agent.socket, wire.FETCH_JWT_SVID, audience=["you"]).svids
    code = grpc.StatusCode.INVALID_ARGUMENT
    ask = (agent.socket, wire.VALIDATE_JWT_SVID)
    assert "you" in refused(code, *ask, audience="me", svid=own.svid)


def test_the_stock_client_gets_and_validates_jwt_svids(agent):
    with spiffe.WorkloadApiClient(agent.socket) as client:
        svid = client.fetch_jwt_svid(audience={"me"})
        bundles = client.fetch_jwt_bundles()
        validated = client.validate_jwt_svid(svid.token, "me")
    assert str(svid.spiffe_id) == str(validated.spiffe_id) == CLI
    bundle = bundles.get_bundle_for_trust_domain(spiffe.TrustDomain("td.example"))
    parsed = spiffe.JwtSvid.parse_and_validate(svid.token, bundle, {"me"})
    assert str(parsed.spiffe_id) == CLI


def test_what_was_issued_is_counted_and_written_without_the_token(authority, private):
    events = []
    with Agent(
        authority, private, RULES, on_event=lambda *event: events.append(event)
    ) as agent:
        (own,) = call(agent.socket, wire.FETCH_JWT_SVID, audience=["you"]).svids
        assert agent.status()["issued"] == 1
    assert [kind for kind, _ in events] == ["svid-issued"]
    assert events[0][1]["what"] == "JWT for ['you']"
    assert own.svid not in str(events)


def test_an_svid_that_cannot_be_issued_now_is_unavailable(private):
    short = ThrowAwayAuthority("td.example", intermediate_ttl_s=60)
    with Agent(short, private, RULES, ttl_s=3600) as agent:
        code = grpc.StatusCode.UNAVAILABLE
        assert "ttl_s is 3600" in refused(code, agent.socket, wire.FETCH_SVID)
