"""An agent that hands on what SPIRE issues: a simulated SPIRE, real sockets."""

import os
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from tests.unit.identity.federated import until
from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import (
    Agent,
    JwtSource,
    Rules,
    SpiffeId,
    WorkloadSource,
    register,
    verify_peer,
)
from ztserve.identity.agent import attestation, delegation, spire, subscription
from ztserve.identity.agent.delegation import Delegation
from ztserve.identity.v1 import delegated_identity_pb2 as messages
from ztserve.testing import SimulatedSpire, ThrowAwayAuthority

ME = "spiffe://td.example/ns/ml/sa/digits"
OTHER = "spiffe://td.example/ns/ml/sa/price"
GATEWAY = "spiffe://td.example/ns/ml-api/sa/api-gateway"
UID = f"unix:uid:{os.geteuid()}"

pytestmark = pytest.mark.slow


@pytest.fixture
def upstream(private):
    authority = ThrowAwayAuthority("td.example")
    with SimulatedSpire(private / "spire.sock", authority) as running:
        running.authority = authority
        yield running


@pytest.fixture
def events():
    return []


@pytest.fixture
def broker(upstream, private, events):
    """An agent over it, whose own directory is not SPIRE's."""
    with delegating(upstream, private, events) as agent:
        yield agent


@contextmanager
def delegating(upstream, private, events=None, *, rules=None, **more):
    events = [] if events is None else events
    made = Delegation(
        upstream.socket,
        "td.example",
        timeout_s=5,
        on_event=lambda kind, facts: events.append((kind, facts)),
        **more,
    )
    directory = private / f"agent{len(list(private.iterdir()))}"
    directory.mkdir(mode=0o700)
    rules = rules or Rules(trust_domain="td.example")
    with closing(made), Agent(made, directory, rules) as agent:
        agent.delegation = made
        yield agent


def refused(agent, words):
    with pytest.raises(IdentityError, match=words):
        WorkloadSource(agent.socket, timeout_s=0.5)


def test_a_process_gets_what_spires_entry_for_its_selectors_says(upstream, broker):
    svid = upstream.add(ME, UID)
    upstream.add(OTHER, UID, "unix:path:/bin/other")
    with WorkloadSource(broker.socket) as source:
        mine = source.current()
        assert mine.svid.id == ME
        assert mine.svid.serial == svid.serial  # SPIRE's own, handed on
        peer = verify_peer(
            mine.svid.chain_der, upstream.authority.bundles, now=types.now()
        )
        assert peer.id == ME
    (asked,) = set(upstream.asked)
    program = Path("/proc/self/exe").readlink()
    assert {UID, f"unix:gid:{os.getegid()}", f"unix:path:{program}"} <= asked
    assert any(one.startswith("unix:sha256:") for one in asked)
    assert broker.status()["spire"] == upstream.socket


def test_what_ray_says_of_a_process_are_selectors_that_spire_is_asked_with(
    upstream, private
):
    upstream.add(ME, UID, "ray:deployment:Digits")
    upstream.add(OTHER, UID, "ray:deployment:Price")
    with (
        delegating(
            upstream, private, further=lambda _: ("ray:deployment:Digits", "ray:app:a")
        ) as agent,
        WorkloadSource(agent.socket) as source,
    ):
        assert source.current().svid.id == ME
    (asked,) = set(upstream.asked)
    assert {"ray:deployment:Digits", "ray:app:a"} <= asked


def test_a_process_without_an_entry_gets_nothing_until_there_is_one(upstream, broker):
    refused(broker, "no registration entry applies")
    upstream.add(ME, UID)
    with WorkloadSource(broker.socket, timeout_s=5) as source:
        assert source.current().svid.id == ME


def test_a_removed_entry_takes_the_svid_back_at_once(upstream, broker):
    upstream.add(ME, UID)
    with WorkloadSource(broker.socket) as source:
        upstream.remove(ME)
        began = time.monotonic()
        until(lambda: gone(source))
        assert time.monotonic() - began < 1
        with pytest.raises(IdentityError, match="no registration entry applies"):
            source.current()


def gone(source):
    try:
        source.current()
    except IdentityError:
        return True
    return False


def test_rotation_and_a_new_root_reach_the_workload(upstream, broker):
    upstream.add(ME, UID)
    with WorkloadSource(broker.socket) as source:
        first = source.current().svid.serial
        upstream.rotate()
        until(lambda: source.current().svid.serial != first)
        upstream.authority.roll()
        until(lambda: len(source.current().bundles["td.example"]) == 2)


def test_an_outage_changes_nothing_and_is_recovered_from(upstream, broker):
    upstream.add(ME, UID)
    with WorkloadSource(broker.socket) as source:
        first = source.current().svid.serial
        upstream.stop()
        time.sleep(0.5)
        assert source.current().svid.serial == first
        with WorkloadSource(broker.socket) as late:  # what is held is handed on
            assert late.current().svid.serial == first
        upstream.start()
        upstream.rotate()
        until(lambda: source.current().svid.serial != first)


def test_what_is_held_through_an_outage_ends_with_its_life(private):
    authority = ThrowAwayAuthority("td.example")
    with SimulatedSpire(private / "s.sock", authority, ttl_s=2) as upstream:
        upstream.add(ME, UID)
        with delegating(upstream, private) as agent:
            with WorkloadSource(agent.socket) as source:
                upstream.stop()
                until(lambda: gone(source))
            refused(agent, "expired")


def test_a_broker_that_is_no_delegate_any_more_hands_out_nothing(upstream, broker):
    upstream.add(ME, UID)
    with WorkloadSource(broker.socket) as source:
        upstream.authorized = False
        until(lambda: gone(source))
        refused(broker, "does not let this agent act for others.*authorized_delegates")
        upstream.authorized = True
        until(lambda: not gone(source))


def test_a_broker_that_is_no_delegate_does_not_start(upstream):
    upstream.authorized = False
    with pytest.raises(IdentityError, match="PERMISSION_DENIED: caller not configured"):
        Delegation(upstream.socket, "td.example", timeout_s=5)


def test_spire_that_is_away_or_of_another_domain_is_named(upstream, private):
    away = f"unix://{private}/away.sock"
    with pytest.raises(IdentityError, match=f"no trust bundle .* {away}: UNAVAILABLE"):
        Delegation(away, "td.example", timeout_s=0.5)
    with pytest.raises(IdentityError, match=r"no trust bundle of other\.example"):
        Delegation(upstream.socket, "other.example", timeout_s=0.5)


def edited(change):
    def lie(answer):
        lied = messages.SvidsResponse.FromString(answer.SerializeToString())
        for one in lied.svids:
            change(one)
        return lied

    return lie


FOREIGN = ThrowAwayAuthority("td.example")
ELSEWHERE = ThrowAwayAuthority("b.example")


def another_authority(one):
    svid = FOREIGN.issue(ME)
    one.svid.certificates[:], one.key = svid.chain_der, svid.key_der()


def another_domain(one):
    svid = ELSEWHERE.issue("spiffe://b.example/ns/ml/sa/digits")
    one.svid.id.trust_domain = "b.example"
    one.svid.certificates[:], one.key = svid.chain_der, svid.key_der()


def announced_otherwise(one):
    one.svid.id.path = "/ns/ml/sa/price"


def another_key(one):
    one.key = FOREIGN.issue(ME).key_der()


def nonsense(one):
    one.svid.id.path = "/a\nb"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_authority, "would be refused"),
        (another_domain, "of another domain"),
        (announced_otherwise, "is that of"),
        (another_key, "private key is not the certificate's"),
        (nonsense, "path"),
    ],
)
def test_what_no_peer_would_believe_is_not_handed_on(
    upstream, broker, events, change, words
):
    upstream.add(ME, UID)
    upstream.lie = edited(change)
    refused(broker, "no registration entry applies")
    kind, facts = events[0]
    assert kind == "svid-refused"
    assert words in facts["reason"]
    upstream.lie = lambda answer: answer
    with WorkloadSource(broker.socket, timeout_s=5) as source:
        assert source.current().svid.id == ME


def test_too_many_svids_are_refused_and_the_former_stay(upstream, broker, monkeypatch):
    upstream.add(ME, UID)
    with WorkloadSource(broker.socket) as source:
        monkeypatch.setattr(subscription, "MAX_SVIDS", 1)
        upstream.add(OTHER, UID)
        time.sleep(0.3)
        assert source.current().svid.id == ME
        with WorkloadSource(broker.socket) as late:
            assert late.current().svid.id == ME


def test_the_sets_of_selectors_that_are_followed_are_bounded(
    upstream, broker, child, monkeypatch
):
    upstream.add(ME, UID)
    monkeypatch.setattr(delegation, "MAX_SUBSCRIPTIONS", 0)
    refused(broker, "0 sets of selectors are followed")


def test_processes_that_ended_are_followed_no_more(upstream, broker):
    upstream.add(ME, UID)
    script = (
        "import sys; from ztserve.identity import WorkloadSource\n"
        "print(WorkloadSource(sys.argv[1]).current().svid.id)"
    )
    followed = broker.delegation._followed
    out = subprocess.run(
        [sys.executable, "-c", script, broker.socket],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert out.stdout.strip() == ME
    with WorkloadSource(broker.socket):
        (one,) = followed.values()
        assert [process.pid for process in one.processes] == [os.getpid()]


def test_processes_of_one_entry_share_its_key_and_the_docs_say_so(upstream, broker):
    upstream.add(ME, UID)
    with WorkloadSource(broker.socket) as one, WorkloadSource(broker.socket) as other:
        assert one.current().svid.key_der() == other.current().svid.key_der()
    assert "share a key" in delegation.__doc__


def test_tokens_are_spires_and_verified_before_they_are_handed_on(upstream, broker):
    upstream.add(ME, UID)
    with (
        WorkloadSource(broker.socket),
        JwtSource(broker.socket, spiffe_id=SpiffeId.parse(ME)) as tokens,
    ):
        token = tokens.fetch("spiffe://td.example/ns/ml/sa/price")
        assert token.id == ME
        upstream.stop()
        with pytest.raises(IdentityError, match=r"no JWT-SVID of .* from SPIRE"):
            tokens.fetch("another")


def test_a_token_of_another_authority_is_not_handed_on(upstream, broker, monkeypatch):
    upstream.add(ME, UID)
    with WorkloadSource(broker.socket):
        made, me = broker.delegation, attestation.this_process()
        monkeypatch.setattr(upstream.authority, "issue_jwt", FOREIGN.issue_jwt)
        with pytest.raises(IdentityError, match="from SPIRE: JWT-SVID"):
            made.token(me, SpiffeId(ME), ["a"])
        with pytest.raises(IdentityError, match="several audiences"):
            made.token(me, SpiffeId(ME), ["a", "b"])
        with pytest.raises(IdentityError, match=f"sent no JWT-SVID of {OTHER}"):
            made.token(me, SpiffeId(OTHER), ["a"])
        upstream.remove(ME)
        with pytest.raises(IdentityError, match="PERMISSION_DENIED: no identity"):
            made.token(me, SpiffeId(ME), ["a"])


def test_bundles_of_others_go_where_the_entry_federates(upstream, broker):
    upstream.federate(ELSEWHERE.trust_bundle())
    upstream.add(ME, UID)
    with WorkloadSource(broker.socket) as source:
        assert set(source.current().bundles) == {"td.example"}
        upstream.add(ME, UID, federates_with=["b.example"])
        until(lambda: "b.example" in source.current().bundles)
        assert source.current().bundles["b.example"] == ELSEWHERE.bundle


def test_a_partners_broken_bundle_takes_its_own_domain_away_alone(upstream, broker):
    upstream.add(ME, UID, federates_with=["b.example"])
    upstream.federate(ELSEWHERE.trust_bundle())
    with WorkloadSource(broker.socket) as source:
        until(lambda: "b.example" in source.current().bundles)
        upstream._foreign["b.example"] = SimpleNamespace(
            trust_domain="b.example", x509_authorities=(b"junk",), jwt_authorities={}
        )
        upstream.rotate()
        until(lambda: set(source.current().bundles) == {"td.example"})


def test_no_worker_becomes_the_gateway_whatever_spires_entries_say(upstream, private):
    upstream.add(GATEWAY, UID)
    upstream.add(ME, UID)
    rules = Rules(
        trust_domain="td.example",
        worker_parent=os.getppid(),
        local_ids=(GATEWAY,),
    )
    with delegating(upstream, private, rules=rules) as agent:
        refused(agent, "has registered no identity")
        with pytest.raises(IdentityError, match="is a Ray worker"):
            register(agent.admin_socket, SpiffeId.parse(GATEWAY))
        register(agent.admin_socket, SpiffeId.parse(ME))
        with WorkloadSource(agent.socket) as source:
            assert source.current().svid.id == ME
    with (
        delegating(
            upstream,
            private,
            rules=Rules(trust_domain="td.example", local_ids=(GATEWAY,)),
        ) as agent,
        WorkloadSource(agent.socket, spiffe_id=SpiffeId.parse(GATEWAY)) as source,
    ):  # without a workers' parent it is that process's, so the rule is what refuses
        assert source.current().svid.id == GATEWAY


def test_one_registration_of_several_entries_is_kept(upstream, broker):
    upstream.add(ME, UID)
    upstream.add(OTHER, UID)
    register(broker.admin_socket, SpiffeId.parse(OTHER))
    with WorkloadSource(broker.socket) as source:
        assert source.current().svid.id == OTHER
    with pytest.raises(IdentityError, match="cannot become"):
        register(broker.admin_socket, SpiffeId.parse(ME))


def test_the_agent_knows_itself_by_its_own_entry(upstream, broker):
    own = SpiffeId.parse("spiffe://td.example/ns/ztserve/sa/agent")
    with pytest.raises(IdentityError, match="gives this process no identity"):
        broker.delegation.own(own)
    upstream.add(own, UID)
    until(lambda: broker.delegation.grants(attestation.this_process()))
    assert broker.delegation.own(own).current().svid.id == own


def test_entries_or_federation_beside_spires_are_refused(broker, private):
    rules = Rules(trust_domain="td.example")
    for beside in ({"entries": private / "e.toml"}, {"federation": broker.delegation}):
        with pytest.raises(IdentityError, match="SPIRE's entries and bundles hold"):
            Agent(broker.delegation, private, rules, **beside)


class Half(SimulatedSpire):
    """A SPIRE whose stream of SVIDs can be denied or silent while bundles come."""

    svids_denied = False
    silent = False

    def _svids(self, request, context):
        for answer in super()._svids(request, context):
            if self.svids_denied:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "not these")
            if not self.silent:
                yield answer


@pytest.fixture
def half(private):
    authority = ThrowAwayAuthority("td.example")
    with Half(private / "half.sock", authority) as running:
        running.authority = authority
        yield running


def looks(made, seconds=0.6):
    """What this process is granted, at each look for a while."""
    found, until_ = set(), time.monotonic() + seconds
    while time.monotonic() < until_:
        try:
            found |= {g.spiffe_id for g in made.grants(attestation.this_process())}
        except IdentityError:
            found.add(None)
        time.sleep(0.01)
    return found


def test_what_was_withdrawn_while_we_were_denied_does_not_come_back(half, private):
    half.add(ME, UID)
    with delegating(half, private) as agent, WorkloadSource(agent.socket) as source:
        half.authorized = False
        until(lambda: gone(source))
        until(lambda: looks(agent.delegation, 0.05) == {None})
        half.silent = True
        half.remove(ME)
        half.authorized = True
        assert ME not in looks(agent.delegation)


def test_a_denied_stream_gives_nothing_however_many_bundles_come(half, private):
    half.add(ME, UID)
    with delegating(half, private) as agent, WorkloadSource(agent.socket) as source:
        half.svids_denied = True
        half.rotate()
        until(lambda: gone(source))
        for _ in range(5):
            half.rotate()
            assert looks(agent.delegation, 0.1) == {None}
        half.svids_denied = False
        until(lambda: not gone(source))


def test_a_stream_that_is_denied_takes_nothing_from_the_others(half, private, child):
    half.add(ME, UID)
    kinds = [("ray:node:a",), ("ray:node:b",)]
    mine = attestation.this_process()

    def further(process):
        return kinds[process != mine]

    other = replace(mine, pid=child.pid, started=attestation._stat(child.pid)[1])
    with delegating(half, private, further=further) as agent:
        made = agent.delegation
        assert made.grants(mine)
        assert made.grants(other)
        one = made._subscription(other)
        one._deny("for a moment")
        with pytest.raises(IdentityError, match="for a moment"):
            made.grants(other)
        assert [grant.spiffe_id for grant in made.grants(mine)] == [ME]


def test_two_entries_of_one_id_keep_their_keys_apart(private, child):
    """SPIRE may have an ID twice, with other selectors; so may its answers."""
    authority = ThrowAwayAuthority("td.example")
    mine = attestation.this_process()
    other = replace(mine, pid=child.pid, started=attestation._stat(child.pid)[1])
    svids = {}

    class Twice(SimulatedSpire):
        def _matching(self, selectors):
            node = "a" if "ray:node:a" in selectors else "b"
            svid = svids.setdefault(node, authority.issue(ME))
            (entry,) = super()._matching(selectors)
            return [replace(entry, svid=svid)]

    def further(process):
        return ("ray:node:a",) if process == mine else ("ray:node:b",)

    with Twice(private / "twice.sock", authority) as upstream:
        upstream.add(ME, UID)
        with delegating(upstream, private, further=further) as agent:
            made, name = agent.delegation, SpiffeId(ME)
            assert made.grants(mine)
            assert made.grants(other)
            assert made.svid(mine, name).serial == svids["a"].serial
            assert made.svid(other, name).serial == svids["b"].serial


def test_a_thread_that_cannot_start_costs_one_question_alone(upstream, broker):
    upstream.add(ME, UID)
    made, me = broker.delegation, attestation.this_process()

    def full(_self):
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        with pytest.raises(attestation.CannotTell, match="can't start new thread"):
            made.grants(me)
    assert [grant.spiffe_id for grant in made.grants(me)] == [ME]


def test_an_svid_that_is_refused_again_and_again_is_told_once(upstream, broker, events):
    upstream.add(ME, UID)
    upstream.lie = edited(another_key)
    refused(broker, "no registration entry applies")
    for _ in range(20):
        upstream.lie = upstream.lie
    time.sleep(0.5)
    assert len(events) == 1


def test_an_answer_that_changes_nothing_wakes_nobody(upstream, broker):
    upstream.add(ME, UID)
    told = []
    with WorkloadSource(broker.socket):
        broker.delegation.subscribe(lambda: told.append(1))
        upstream._notify()  # all is sent again
        time.sleep(0.3)
        assert told == []
        upstream.rotate()
        until(lambda: told)


def test_bundles_without_our_own_are_no_bundles(upstream, broker):
    upstream.add(ME, UID)
    own = upstream.authority.bundle
    with WorkloadSource(broker.socket) as source, pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "_bundles", lambda: (ELSEWHERE.trust_bundle(),))
        upstream.rotate()
        time.sleep(0.3)
        assert broker.delegation.bundle == own
        assert source.current().bundles["td.example"] == own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "_bundles", lambda: (ELSEWHERE.trust_bundle(),))
        with pytest.raises(IdentityError, match=r"SPIRE sent no bundle of td\.example"):
            Delegation(upstream.socket, "td.example", timeout_s=0.5)


def test_a_partner_with_an_illegal_name_is_left_out_alone(upstream):
    roots = b"".join(upstream.authority.bundle)
    found = spire.read_bundles(
        "td.example", {"spiffe://td.example": roots, "spiffe://B.example": roots}, {}
    )
    assert set(found) == {"td.example"}
    many = {f"spiffe://d{n}.example": roots for n in range(64)}
    with pytest.raises(IdentityError, match="over 64 trust domains"):
        spire.read_bundles("td.example", {"spiffe://td.example": roots, **many}, {})


def test_a_closed_delegation_asks_nothing_more(upstream, broker):
    broker.delegation.close()
    with pytest.raises(attestation.CannotTell):
        broker.delegation.grants(attestation.this_process())
