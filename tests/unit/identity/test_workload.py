import threading
import time
from datetime import timedelta
from functools import partial
from unittest.mock import Mock

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import Agent, Rules, SpiffeId, WorkloadSource, register
from ztserve.identity.workload_api import X509SVIDResponse, grpc_target, socket_path
from ztserve.testing import HostileAgent, ThrowAwayAuthority

ME = "spiffe://td.example/ns/a/sa/b"
OTHER = "spiffe://td.example/ns/a/sa/other"
THIRD = "spiffe://td.example/ns/a/sa/third"


class Clock:
    def __init__(self):
        self.ahead = timedelta()

    def __call__(self):
        return types.now() + self.ahead


def until(fact, within_s=20.0):
    deadline = time.monotonic() + within_s
    while not fact():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def hostile(authority, private):
    with HostileAgent(private / "agent.sock", authority, ME) as agent:
        yield agent


@pytest.fixture
def on_tcp(authority, private):
    with HostileAgent(private / "tcp.sock", authority, ME, tcp=True) as agent:
        yield agent


@pytest.fixture
def source(hostile):
    with WorkloadSource(hostile.socket, timeout_s=20) as made:
        yield made


def has_serial(source, serial):
    return source._identity is not None and source._identity.svid.serial == serial


def reason(source):
    with pytest.raises(IdentityError) as caught:
        source.current()
    return str(caught.value)


# --- the endpoint -------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "/run/agent.sock",
        "unix:run/agent.sock",
        "unix://run/agent.sock",
        "unix:////run/agent.sock",
        "unix:///",
        "unix:///a b",
        "unix:///a\n",
        "unix:///a%2fb",
        "unix:///a?b",
        "unix:///a#b",
        "unix:///" + "a" * 107,
        "unix-abstract:name",
        "UNIX:///a",
        "http://127.0.0.1:8081",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:80/",
        "tcp://127.0.0.1:80/foo",
        "tcp://127.0.0.1:80?a",
        "tcp://me@127.0.0.1:80",
        "tcp://localhost:80",
        "tcp://127.1:80",
        "tcp://127.0.0.01:80",
        "tcp://::1:80",
        "tcp://[127.0.0.1]:80",
        "tcp://[fe80::1%25eth0]:80",
        "tcp:127.0.0.1:80",
    ],
)
def test_w4_an_endpoint_that_is_neither_path_nor_address_is_refused_at_once(endpoint):
    with pytest.raises(IdentityError, match="expected unix:///absolute/path"):
        WorkloadSource(endpoint, timeout_s=60)


@pytest.mark.parametrize(
    "endpoint", ["tcp://10.0.0.1:80", "tcp://0.0.0.0:80", "tcp://[2001:db8::1]:80"]
)
def test_w4_an_endpoint_across_a_network_is_refused_with_the_reason(endpoint):
    with pytest.raises(IdentityError, match="our private key would cross a network"):
        WorkloadSource(endpoint, timeout_s=60)


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        ("unix:///run/a.sock", "unix:/run/a.sock"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
        ("unix:///run/a:ü.sock", "unix:/run/a%3A%C3%BC.sock"),
        ("tcp://127.0.0.1:8000", "ipv4:127.0.0.1:8000"),
        ("tcp://169.254.1.1:8000", "ipv4:169.254.1.1:8000"),
        ("tcp://[::1]:8000", "ipv6:%5B::1%5D:8000"),
    ],
)
def test_w4_an_endpoint_is_a_path_or_an_address_and_a_port(endpoint, target):
    assert grpc_target(endpoint) == target


def test_w4_an_endpoints_path_may_have_107_bytes():
    assert len(socket_path("unix:///" + "a" * 106)) == 107


def test_w1_the_api_is_spoken_over_a_unix_socket_and_over_tcp(on_tcp):
    for endpoint in (on_tcp.socket, f"tcp://127.0.0.1:{on_tcp.port}"):
        with WorkloadSource(endpoint, timeout_s=20) as source:
            assert source.current().svid.id == ME


def test_w2_each_request_bears_the_header_in_lower_case(hostile, source):
    assert [r["workload.spiffe.io"] for r in hostile.requests] == ["true"]


def test_w3_nothing_but_the_header_is_shown_and_no_tls_is_asked_for(hostile, source):
    (request,) = hostile.requests
    assert set(request) == {"workload.spiffe.io", "user-agent"}


# --- what arrives ---------------------------------------------------------------------


def test_w5_the_first_answer_is_used_at_once(hostile):
    began = time.monotonic()
    with WorkloadSource(hostile.socket, timeout_s=20):
        assert time.monotonic() - began < 5


@pytest.mark.slow
def test_w6_each_answer_replaces_all_that_there_was(hostile, source):
    foreign = ThrowAwayAuthority("b.example").bundle
    for name in ("spiffe://b.example", "spiffe://c.example"):
        serial = hostile.grant(federated={name: foreign[0]}).serial
        until(lambda serial=serial: has_serial(source, serial))
        assert set(source.current().bundles) == {"td.example", name[9:]}


@pytest.mark.slow
def test_w7_a_federated_bundle_that_is_absent_is_dropped(hostile, source):
    foreign = ThrowAwayAuthority("b.example").bundle[0]
    hostile.grant(federated={"spiffe://b.example": foreign})
    until(lambda: "b.example" in source.current().bundles)
    hostile.grant()
    until(lambda: "b.example" not in source.current().bundles)


@pytest.mark.slow
def test_w7_our_svid_is_dropped_where_an_answer_does_not_hold_it(hostile, source):
    told = threading.Event()
    source.subscribe(told.set)
    hostile.lie("another's SVID")
    assert told.wait(1)
    assert f"the agent's answer holds no SVID of {ME}" in reason(source)
    serial = hostile.grant().serial
    until(lambda: has_serial(source, serial))


def test_w8_our_svid_is_dropped_where_an_answer_holds_none(hostile, source):
    told = threading.Event()
    source.subscribe(told.set)
    hostile.lie("nothing")
    assert told.wait(1)
    assert "the agent's answer holds no SVID" in reason(source)
    assert hostile.streams == 1


@pytest.mark.slow
def test_w8_our_svid_is_dropped_within_a_second_of_its_withdrawal(hostile, source):
    told = threading.Event()
    source.subscribe(told.set)
    hostile.withdraw()
    assert told.wait(1)
    assert "PERMISSION_DENIED: 'as the test wants'" in reason(source)
    serial = hostile.grant().serial
    until(lambda: has_serial(source, serial))


def test_w9_the_leaf_comes_first(authority, hostile):
    svid = authority.intermediate().forge(ME)
    hostile.answer = hostile.response(svid)
    with WorkloadSource(hostile.socket, timeout_s=20) as source:
        assert source.current().svid.chain_der == svid.chain_der


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("leaf last", "our own SVID would be refused"),
        ("chain in PEM", "not a sequence of DER"),
        ("key in PEM", "not unencrypted PKCS#8"),
        ("encrypted key", "not unencrypted PKCS#8"),
        ("SEC1 key", "not unencrypted PKCS#8"),
    ],
)
def test_w9_chain_and_key_in_another_form_are_refused(
    authority, hostile, wrong, message
):
    svid = authority.intermediate().forge(ME)
    encrypted = serialization.BestAvailableEncryption(b"secret")
    clear = serialization.NoEncryption()
    answer = hostile.response(svid)
    mine = answer.svids[0]

    def key_as(form, protection):
        return svid.key.private_bytes(serialization.Encoding.DER, form, protection)

    match wrong:
        case "leaf last":
            mine.x509_svid = b"".join(reversed(svid.chain_der))
        case "chain in PEM":
            mine.x509_svid = svid.chain_pem()
        case "key in PEM":
            mine.x509_svid_key = svid.key_pem()
        case "encrypted key":
            form = serialization.PrivateFormat.PKCS8
            mine.x509_svid_key = key_as(form, encrypted)
        case "SEC1 key":
            form = serialization.PrivateFormat.TraditionalOpenSSL
            mine.x509_svid_key = key_as(form, clear)
    hostile.answer = answer
    with pytest.raises(IdentityError, match=message):
        WorkloadSource(hostile.socket, timeout_s=0.5)


def hinted(authority, hostile, *pairs):
    """An answer with an SVID for each pair of SPIFFE ID and hint."""
    answer = X509SVIDResponse()
    for spiffe_id, hint in pairs:
        one = hostile.response(authority.issue(spiffe_id)).svids[0]
        one.hint = hint
        answer.svids.append(one)
    return answer


@pytest.mark.parametrize(
    ("hint", "expected"), [(None, ME), ("internal", OTHER), ("external", THIRD)]
)
def test_w10_the_hint_chooses_and_without_one_the_first_is_ours(
    authority, hostile, hint, expected
):
    hostile.answer = hinted(
        authority, hostile, (ME, ""), (OTHER, "internal"), (THIRD, "external")
    )
    with WorkloadSource(hostile.socket, hint=hint, timeout_s=20) as source:
        assert source.current().svid.id == expected


@pytest.mark.parametrize("wanted", [ME, OTHER, THIRD])
@pytest.mark.parametrize("parameter", ["spiffe_id", "preferred"])
def test_of_several_svids_a_process_takes_its_own(
    authority, hostile, parameter, wanted
):
    hostile.answer = hinted(authority, hostile, (ME, ""), (OTHER, ""), (THIRD, ""))
    chosen = {parameter: SpiffeId(wanted)}
    with WorkloadSource(hostile.socket, timeout_s=20, **chosen) as source:
        assert source.current().svid.id == wanted


def test_a_preferred_svid_that_is_not_there_leaves_the_first(authority, hostile):
    hostile.answer = hinted(authority, hostile, (ME, ""), (OTHER, ""))
    preferred = SpiffeId(THIRD)
    with WorkloadSource(hostile.socket, timeout_s=20, preferred=preferred) as source:
        assert source.current().svid.id == ME


@pytest.mark.slow
def test_an_own_svid_that_is_not_there_is_waited_for(authority, hostile):
    hostile.answer = hinted(authority, hostile, (OTHER, ""))
    with pytest.raises(IdentityError, match=f"no SVID of {ME}, but of '{OTHER}'; mend"):
        WorkloadSource(hostile.socket, timeout_s=0.3, spiffe_id=SpiffeId(ME))


def test_w10_of_two_with_one_hint_the_first_counts(authority, hostile):
    hostile.answer = hinted(
        authority, hostile, (OTHER, "a"), (ME, "internal"), (THIRD, "internal")
    )
    with WorkloadSource(hostile.socket, hint="internal", timeout_s=20) as source:
        assert source.current().svid.id == ME
        hostile.answer = hinted(
            authority, hostile, (OTHER, "internal"), (ME, "internal")
        )
        until(lambda: source._identity is None)
        wanted = f"no SVID of {ME} with the hint 'internal'"
        assert wanted in reason(source)


@pytest.mark.slow
def test_w10_a_hint_that_is_absent_is_no_identity(hostile):
    with pytest.raises(IdentityError, match="no SVID of any SPIFFE ID with the hint"):
        WorkloadSource(hostile.socket, hint="internal", timeout_s=0.4)


def test_w10_the_order_may_change_and_we_stay_who_we_are(authority, hostile):
    hostile.answer = hinted(authority, hostile, (ME, ""), (OTHER, ""))
    with WorkloadSource(hostile.socket, timeout_s=20) as source:
        before = source.current().svid.serial
        hostile.answer = hinted(authority, hostile, (OTHER, ""), (ME, ""))
        until(lambda: not has_serial(source, before))
        assert source.current().svid.id == ME


@pytest.mark.slow
def test_an_answer_that_says_the_same_again_tells_nobody(hostile, source):
    told = []
    source.subscribe(lambda: told.append(source.current().svid.serial))
    hostile.stop()
    hostile.start()
    until(lambda: hostile.streams == 2)
    serial = hostile.grant().serial
    until(lambda: has_serial(source, serial))
    assert told == [serial]


# --- when the agent goes and comes ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("going", ["stop", "kill"])
def test_w15_an_agent_that_returns_is_heard_within_a_second(hostile, source, going):
    for away_s in (0.3, 4.0):  # 4 s: long enough for the longest pause
        getattr(hostile, going)()
        time.sleep(away_s)
        serial = hostile.grant().serial
        hostile.start()
        until(lambda serial=serial: has_serial(source, serial), 1.0)


@pytest.mark.slow
def test_w15_a_socket_that_was_made_anew_is_followed_within_a_second(hostile, source):
    for _ in range(2):
        hostile.remake()
        serial = hostile.grant().serial
        until(lambda serial=serial: has_serial(source, serial), 1.0)


@pytest.mark.slow
def test_w15_an_agent_on_tcp_that_returns_is_heard(on_tcp):
    endpoint = f"tcp://127.0.0.1:{on_tcp.port}"
    with WorkloadSource(endpoint, timeout_s=20) as source:
        on_tcp.stop()
        serial = on_tcp.grant().serial
        time.sleep(0.5)
        on_tcp.start()
        until(lambda: has_serial(source, serial), 3.0)


@pytest.mark.slow
def test_an_agent_that_is_away_is_asked_ever_less_often(hostile, source):
    hostile.answer = grpc.StatusCode.UNAVAILABLE
    before = hostile.streams
    time.sleep(4)
    assert 3 <= hostile.streams - before <= 9
    assert source.current().svid.id == ME


@pytest.mark.slow
def test_an_identity_that_expires_is_dropped_and_told_without_a_call(
    authority, private
):
    path = private / "agent.sock"
    with (
        HostileAgent(path, authority, ME, ttl_s=1) as agent,
        WorkloadSource(agent.socket, timeout_s=20) as source,
    ):
        told = threading.Event()
        ends = source.current().svid.not_after
        source.subscribe(told.set)
        assert told.wait(5)
        assert abs(types.now() - ends) < timedelta(seconds=0.5)
        assert source._identity is None
        assert "the SVID expired and was not renewed" in reason(source)


@pytest.mark.slow
def test_an_identity_arrives_and_is_renewed(authority, scripted, response):
    first, second = authority.issue(ME), authority.issue(ME)
    scripted.send(response(first, authority.bundle))
    with WorkloadSource(scripted.socket, timeout_s=20) as source:
        assert source.current().svid.serial == first.serial
        changed = threading.Event()
        unsubscribe = source.subscribe(changed.set)
        scripted.send(response(second, authority.bundle))
        assert changed.wait(20)
        assert source.current().svid.serial == second.serial
        unsubscribe()
        changed.clear()
        scripted.send(response(first, authority.bundle))
        until(lambda: source.current().svid.serial == first.serial)
        assert not changed.is_set()
    assert scripted.calls == 1


def test_federated_bundles_arrive_with_the_identity(authority, scripted, response):
    foreign = ThrowAwayAuthority("b.example")
    federated = {"spiffe://b.example": foreign.bundle[0]}
    scripted.send(response(authority.issue(ME), authority.bundle, federated=federated))
    with WorkloadSource(scripted.socket, timeout_s=20) as source:
        assert source.current().bundles["b.example"] == foreign.bundle


@pytest.mark.slow
def test_an_agent_that_is_away_is_named_with_what_to_do(private):
    began = time.monotonic()
    with pytest.raises(IdentityError) as caught:
        WorkloadSource(f"unix://{private}/none.sock", timeout_s=0.4)
    assert time.monotonic() - began < 2
    assert f"unix://{private}/none.sock within 0.4 s" in str(caught.value)
    assert "is the agent running?" in str(caught.value)


@pytest.mark.slow
def test_an_agent_that_is_silent_is_not_waited_for_longer_than_said(scripted):
    with pytest.raises(IdentityError, match=r"within 0\.4 s: .*not answered"):
        WorkloadSource(scripted.socket, timeout_s=0.4)


@pytest.mark.slow
def test_an_agent_that_comes_late_is_waited_for(authority, scripted, response):
    scripted.stop()
    scripted.send(response(authority.issue(ME), authority.bundle))
    timer = threading.Timer(0.3, scripted.start)
    timer.start()
    with WorkloadSource(scripted.socket, timeout_s=10) as source:
        assert source.current().svid.id == ME
    timer.join()


@pytest.mark.slow
def test_w15_an_agent_that_comes_back_is_followed_again(authority, scripted, response):
    scripted.send(response(authority.issue(ME), authority.bundle))
    with WorkloadSource(scripted.socket, timeout_s=20) as source:
        scripted.stop()
        assert source.current().svid.id == ME
        again = authority.issue(ME)
        scripted.send(response(again, authority.bundle))
        scripted.start()
        until(lambda: source.current().svid.serial == again.serial)


@pytest.mark.slow
def test_w8_an_identity_is_dropped_when_the_agent_no_longer_grants_it(
    authority, scripted, response
):
    scripted.send(response(authority.issue(ME), authority.bundle))
    with WorkloadSource(scripted.socket, timeout_s=20) as source:
        dropped = threading.Event()
        source.subscribe(dropped.set)
        scripted.send(grpc.StatusCode.PERMISSION_DENIED)
        assert dropped.wait(20)
        with pytest.raises(IdentityError, match="PERMISSION_DENIED: 'as scripted'"):
            source.current()
        scripted.send(response(authority.issue(ME), authority.bundle))
        until(lambda: source._identity is not None)


@pytest.mark.slow
def test_an_identity_is_refused_once_expired_and_its_key_dropped(
    authority, scripted, response
):
    clock = Clock()
    scripted.send(response(authority.issue(ME, ttl_s=60), authority.bundle))
    with WorkloadSource(scripted.socket, timeout_s=20, clock=clock) as source:
        clock.ahead = timedelta(seconds=90)
        with pytest.raises(IdentityError, match="expired at"):
            source.current()
        scripted.send(grpc.StatusCode.UNAVAILABLE)
        until(lambda: source._identity is None)
        with pytest.raises(IdentityError, match="no identity from the SPIFFE agent"):
            source.current()


def test_a_renewal_that_does_not_hold_leaves_the_old_identity(
    authority, scripted, response, caplog
):
    good, other = authority.issue(ME), authority.issue(ME)
    scripted.send(response(good, authority.bundle))
    with WorkloadSource(scripted.socket, timeout_s=20) as source:
        scripted.send(response(other, authority.bundle, key=good.key_der()))
        until(lambda: "the private key is not the certificate's" in caplog.text)
        assert source.current().svid.serial == good.serial


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["nothing", "foreign", "other id"])
def test_a_first_answer_that_does_not_hold_is_no_identity(
    authority, scripted, response, wrong
):
    svid = authority.issue(ME)
    item, message = {
        "nothing": (X509SVIDResponse(), "holds no SVID"),
        "foreign": (
            response(svid, ThrowAwayAuthority("td.example").bundle),
            "no valid path",
        ),
        "other id": (
            response(svid, authority.bundle, spiffe_id=ME + "x"),
            "announced for",
        ),
    }[wrong]
    scripted.send(*[item] * 20)
    with pytest.raises(IdentityError, match=message):
        WorkloadSource(scripted.socket, timeout_s=1.5)


def test_w2_an_agent_that_does_not_understand_us_is_not_asked_again(scripted):
    scripted.send(grpc.StatusCode.INVALID_ARGUMENT)
    began = time.monotonic()
    with pytest.raises(IdentityError, match="INVALID_ARGUMENT: 'as scripted'"):
        WorkloadSource(scripted.socket, timeout_s=30)
    assert time.monotonic() - began < 5
    assert scripted.calls == 1


def test_a_listener_that_fails_does_not_end_rotation(
    authority, scripted, response, caplog
):
    scripted.send(response(authority.issue(ME), authority.bundle))
    with WorkloadSource(scripted.socket, timeout_s=20) as source:
        source.subscribe(lambda: 1 / 0)
        second = authority.issue(ME)
        scripted.send(response(second, authority.bundle))
        until(lambda: source.current().svid.serial == second.serial)
        until(lambda: "a listener to a change of identity failed" in caplog.text)


@pytest.mark.slow
def test_a_hung_agent_is_asked_anew_before_the_identity_expires(
    authority, scripted, response
):
    clock = Clock()
    clock.ahead = timedelta(seconds=57)  # 3 to 4 s before the first one's end
    second = authority.issue(ME)
    scripted.send(response(authority.issue(ME, ttl_s=60), authority.bundle))
    with WorkloadSource(scripted.socket, timeout_s=20, clock=clock) as source:
        until(lambda: scripted.calls == 2)
        scripted.send(response(second, authority.bundle))
        until(lambda: source._identity and source.current().svid.id == ME)


def test_a_closed_source_has_no_identity(authority, scripted, response):
    scripted.send(response(authority.issue(ME), authority.bundle))
    source = WorkloadSource(scripted.socket, timeout_s=20)
    source.close()
    source.close()
    with pytest.raises(IdentityError, match="this source is closed"):
        source.current()
    assert not source._follower.is_alive()


@pytest.mark.slow
def test_svids_of_the_agent_are_renewed_at_half_of_their_life(authority, private):
    rules = Rules(trust_domain="td.example", default_id=ME)
    with (
        Agent(authority, private, rules, ttl_s=4) as agent,
        WorkloadSource(agent.socket, timeout_s=20) as source,
    ):
        serials = {source.current().svid.serial}
        until(lambda: serials.add(source.current().svid.serial) or len(serials) == 2)
        assert agent.status()["issued"] == 2


@pytest.mark.slow
def test_a_process_tells_an_agent_that_was_started_anew_who_it_is(private):
    rules = Rules(trust_domain="td.example", local_ids=(ME,), default_id=OTHER)
    agents = [Agent(ThrowAwayAuthority("td.example"), private, rules) for _ in range(2)]
    agents[0].start()
    introduce = partial(register, agents[0].admin_socket, ME, timeout_s=1)
    introduce()
    with WorkloadSource(
        agents[0].socket, timeout_s=20, reconnecting=introduce
    ) as source:
        before = source.current()
        agents[0].stop()
        agents[1].start()
        try:
            until(lambda: source.current().bundles != before.bundles)
            assert source.current().svid.id == before.svid.id == ME
        finally:
            agents[1].stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_source_that_nobody_follows_any_more_has_no_identity(hostile):
    def fail():
        raise RuntimeError("not what it may raise")

    with WorkloadSource(hostile.socket, timeout_s=20, reconnecting=fail) as source:
        hostile.kill()
        until(lambda: source._identity is None)
        assert "it ended the stream" in reason(source) or "UNAVAILABLE" in reason(
            source
        )


def test_what_the_agent_says_is_one_line_of_a_log(hostile, source):
    forged = "x\n2026-01-01 00:00:00 INFO all is well" + "y" * 1000
    error = Mock(code=lambda: grpc.StatusCode.UNAVAILABLE, details=lambda: forged)
    assert source._retry_after(error)
    assert "UNAVAILABLE: 'x\\n2026" in source._problem
    one = hostile.response(hostile.grant()).svids[0]
    one.spiffe_id = forged
    source._id = SpiffeId(OTHER)
    with pytest.raises(IdentityError, match="but of 'x") as caught:
        source._chosen(X509SVIDResponse(svids=[one]))
    for text in (source._problem, str(caught.value)):
        assert "\n" not in text
        assert len(text) < 600


@pytest.mark.slow
def test_a_socket_at_which_nobody_listens_is_named_in_plain_words(private, authority):
    agent = HostileAgent(private / "agent.sock", authority, ME)
    agent.kill()
    with pytest.raises(IdentityError, match="nobody listens at its socket; is the"):
        WorkloadSource(agent.socket, timeout_s=0.5)
