import threading
import time
from datetime import timedelta
from functools import partial

import grpc
import pytest

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import Agent, Rules, WorkloadSource, register
from ztserve.identity.workload_api import X509SVIDResponse, socket_path
from ztserve.testing import ThrowAwayAuthority

ME = "spiffe://td.example/ns/a/sa/b"
OTHER = "spiffe://td.example/ns/a/sa/other"


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


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "/run/agent.sock",
        "unix:/run/agent.sock",
        "unix://run/agent.sock",
        "unix:///",
        "unix:///a b",
        "unix:///a\n",
        "unix:///a%2fb",
        "unix:///a?b",
        "unix:///" + "a" * 107,
        "unix-abstract:name",
        "tcp://127.0.0.1:8081",
        "http://127.0.0.1:8081",
    ],
)
def test_an_endpoint_that_is_no_absolute_unix_path_is_refused_at_once(endpoint):
    with pytest.raises(IdentityError, match="expected unix:///absolute/path"):
        WorkloadSource(endpoint, timeout_s=60)


def test_an_endpoints_path_may_have_107_bytes():
    assert len(socket_path("unix:///" + "a" * 106)) == 107


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
def test_an_agent_that_comes_back_is_followed_again(authority, scripted, response):
    scripted.send(response(authority.issue(ME), authority.bundle))
    with WorkloadSource(scripted.socket, timeout_s=20) as source:
        scripted.stop()
        assert source.current().svid.id == ME
        again = authority.issue(ME)
        scripted.send(response(again, authority.bundle))
        scripted.start()
        until(lambda: source.current().svid.serial == again.serial)


@pytest.mark.slow
def test_an_identity_is_dropped_when_the_agent_no_longer_grants_it(
    authority, scripted, response
):
    scripted.send(response(authority.issue(ME), authority.bundle))
    with WorkloadSource(scripted.socket, timeout_s=20) as source:
        dropped = threading.Event()
        source.subscribe(dropped.set)
        scripted.send(grpc.StatusCode.PERMISSION_DENIED)
        assert dropped.wait(20)
        with pytest.raises(IdentityError, match="PERMISSION_DENIED: as scripted"):
            source.current()
        scripted.send(response(authority.issue(ME), authority.bundle))
        until(lambda: source._identity is not None)


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


def test_an_agent_that_does_not_understand_us_is_not_asked_again(scripted):
    scripted.send(grpc.StatusCode.INVALID_ARGUMENT)
    began = time.monotonic()
    with pytest.raises(IdentityError, match="INVALID_ARGUMENT: as scripted"):
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
        until(lambda: "a listener to identity changes failed" in caplog.text)


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
    assert not source._thread.is_alive()


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
