"""Attacks on where our own identity comes from: the agent, the files and the clock.

Each is seen to succeed where the control that stops it is taken out.
"""

import contextlib
import os
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import serialization

from tests.unit.transport.support import CLI, SERVER, Echo, serving
from ztserve import errors, types
from ztserve.errors import IdentityError
from ztserve.identity import (
    FileSource,
    FixedSource,
    Identity,
    SpiffeId,
    Svid,
    WorkloadSource,
    guarded_files,
    workload,
    workload_api,
)
from ztserve.identity.source import LiveSource
from ztserve.identity.svid import pem
from ztserve.testing import HostileAgent, ThrowAwayAuthority
from ztserve.transport import Client
from ztserve.types.clock import Clock

TD = "dev.ztserve.internal"
OTHER = f"spiffe://{TD}/ns/other/sa/other"
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change owners")
LIES = [
    "an SVID of another authority",
    "no roots",
    "roots cut short",
    "another's SVID as mine",
    "another's key",
    "no key",
    "expired",
    "not yet valid",
    "a signing certificate",
    "two names",
    "our own domain as a federated one",
    "1000 bundles",
    "too much",
    "garbage",
]
"""All of `HostileAgent.lies` but those that do not hold our SVID: a withdrawal."""


def until(fact, within_s=10.0):
    deadline = time.monotonic() + within_s
    while not fact():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def authority():
    return ThrowAwayAuthority(TD)


@pytest.fixture
def private(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def agent(private, authority):
    with HostileAgent(private / "agent.sock", authority, CLI) as made:
        yield made


@pytest.fixture
def source(agent):
    with WorkloadSource(agent.socket, timeout_s=20) as made:
        yield made


# --- a lying agent --------------------------------------------------------------------


def believe(material, *, now):
    """What a client does that parses and does not judge."""
    with contextlib.suppress(ValueError):
        key = serialization.load_der_private_key(material.key, None)
        own = material.spiffe_id.split("/")[2]
        names = [name.removeprefix("spiffe://") for name in material.federated]
        return Identity(
            Svid(
                id=str.__new__(SpiffeId, material.spiffe_id),
                chain_der=(material.chain,),
                key=key,
                serial=0,
                not_before=now - timedelta(days=1),
                not_after=now + timedelta(days=1),
            ),
            dict.fromkeys((own, *names), ()),
        )
    raise IdentityError("even the parser refuses it")


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_no_lie_of_an_agent_is_believed(agent, source, lie, caplog):
    before = source.current()
    told = []
    source.subscribe(lambda: told.append(source._identity))
    caplog.clear()
    agent.lie(lie)
    until(lambda: any(r.name == "ztserve.identity.source" for r in caplog.records))
    assert source.current() is before
    assert told == []
    agent.grant()
    until(lambda: source.current() is not before)


def test_each_lie_is_told(agent):
    withdrawals = {"another's SVID", "an ID with a newline", "nothing"}
    assert set(agent.lies) == {*LIES, *withdrawals}


@pytest.mark.parametrize(
    "lie",
    [
        "an SVID of another authority",
        "no roots",
        "another's SVID as mine",
        "another's key",
        "expired",
        "not yet valid",
        "a signing certificate",
        "two names",
        "1000 bundles",
    ],
)
def test_without_judgement_the_same_lie_is_believed(agent, source, lie, monkeypatch):
    monkeypatch.setattr(workload, "read_identity", believe)
    agent.lie(lie)
    until(lambda: source.current().svid.serial == 0)


def test_the_limit_whoever_is_our_agent_says_whom_we_trust(agent, source):
    # This lie is whole. Nothing but the protection of the socket stands before it.
    foreign = ThrowAwayAuthority(TD)
    agent.answer = agent.response(foreign.issue(CLI), bundle=foreign.bundle[0])
    until(lambda: source.current().bundles == foreign.bundles)


@pytest.mark.slow
def test_an_answer_without_bound_is_not_read(agent, source, monkeypatch):
    before = source.current()
    agent.lie("too much")
    until(lambda: "RESOURCE_EXHAUSTED" in source._problem)
    assert source.current() is before
    limit = ("grpc.max_receive_message_length", 64 * 1024 * 1024)
    monkeypatch.setattr(workload, "_OPTIONS", (limit,))
    until(lambda: source.current() is not before)


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_flood_of_answers_is_read_at_our_pace(agent, source, guarded, monkeypatch):
    if not guarded:
        monkeypatch.setattr(workload, "_LEAST_S", 0.0)
    told = []
    source.subscribe(lambda: told.append(1))
    until_ = time.monotonic() + 1
    while time.monotonic() < until_:
        agent.grant()
        time.sleep(0.002)
    assert (len(told) <= 25) is guarded, len(told)


# --- who we are -----------------------------------------------------------------------


def test_an_agent_cannot_rename_a_process(agent, source):
    agent.lie("another's SVID")
    until(lambda: source._identity is None)
    with pytest.raises(IdentityError, match=f"holds no SVID of {CLI}"):
        source.current()


def test_without_its_own_name_in_mind_a_process_is_renamed(agent, source, monkeypatch):
    monkeypatch.setattr(
        LiveSource, "_id", property(lambda _: None, lambda *_: None), raising=False
    )
    agent.lie("another's SVID")
    until(lambda: source.current().svid.id == OTHER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "withdrawn", ["PERMISSION_DENIED", "nothing", "an ID with a newline"]
)
@pytest.mark.parametrize("guarded", [True, False])
def test_what_is_withdrawn_is_used_no_longer(
    agent, source, withdrawn, guarded, monkeypatch
):
    if not guarded:
        monkeypatch.setattr(LiveSource, "_drop", lambda *_, **__: None)
    streams = agent.streams
    if withdrawn == "PERMISSION_DENIED":
        agent.withdraw()
        until(lambda: agent.streams > streams, 1.0)
    else:
        agent.lie(withdrawn)
        until(lambda: "no SVID" in source._problem, 1.0)
    if guarded:
        until(lambda: source._identity is None, 1.0)
        with pytest.raises(IdentityError, match=r"PERMISSION_DENIED|holds no SVID"):
            source.current()
    else:
        assert source.current().svid.id == CLI


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_what_expired_is_used_no_longer(private, authority, guarded, monkeypatch):
    if not guarded:
        monkeypatch.setattr(LiveSource, "_drop", lambda *_, **__: None)
        monkeypatch.setattr("ztserve.identity.source.check_valid", lambda *_, **__: 0)
    with (
        HostileAgent(private / "a.sock", authority, CLI, ttl_s=1) as agent,
        WorkloadSource(agent.socket, timeout_s=20) as source,
    ):
        ends = source.current().svid.not_after
        until(lambda: types.now() > ends + timedelta(seconds=0.3))
        if guarded:
            with pytest.raises(IdentityError, match="expired"):
                source.current()
        else:
            assert source.current().svid.id == CLI


def test_a_key_is_not_sent_across_a_network(private, authority, monkeypatch):
    with HostileAgent(private / "a.sock", authority, CLI, tcp=True) as agent:
        endpoint = f"tcp://0.0.0.0:{agent.port}"  # as good as another machine's
        with pytest.raises(IdentityError, match="our private key would cross"):
            WorkloadSource(endpoint, timeout_s=20)
        monkeypatch.setattr(
            workload_api, "grpc_target", lambda _: f"ipv4:127.0.0.1:{agent.port}"
        )
        WorkloadSource(endpoint, timeout_s=20).close()


# --- the clock ------------------------------------------------------------------------


def test_a_clock_that_is_set_back_revives_nothing(authority):
    wall, ahead = time.time, [0.0]
    ours = Clock(lambda: wall() + ahead[0])
    naive = lambda: datetime.fromtimestamp(wall() + ahead[0], UTC)  # noqa: E731
    identity = Identity(authority.issue(CLI, ttl_s=60), authority.bundles)
    steps = []
    ours.on_step(steps.append)
    ahead[0] = 120  # it expires ...
    with pytest.raises(IdentityError, match="expired"):
        FixedSource(identity, clock=ours.now).current()
    ahead[0] = -30  # ... and the clock is set back to when it was good
    with pytest.raises(IdentityError, match="expired"):
        FixedSource(identity, clock=ours.now).current()
    assert [round(step) for step in steps] == [120, -150]
    assert FixedSource(identity, clock=naive).current() is identity


# --- files ----------------------------------------------------------------------------


class Files:
    def __init__(self, folder, authority):
        self.folder = folder
        self.paths = [folder / name for name in ("svid.pem", "key.pem", "bundle.pem")]
        self.publish(authority.issue(CLI), authority.bundle)

    def publish(self, svid, roots):
        texts = svid.chain_pem(), svid.key_pem(), pem(roots)
        for path, text in zip(self.paths, texts, strict=True):
            path.write_bytes(text)
            path.chmod(0o600)

    def open(self, interval_s=0.05):
        return FileSource(*self.paths, trust_domain=TD, interval_s=interval_s)


@pytest.fixture
def files(private, authority):
    return Files(private, authority)


def writable_by_all(files):
    files.paths[2].chmod(0o666)


def readable_by_all(files):
    files.paths[1].chmod(0o604)


def folder_writable_by_all(files):
    files.folder.chmod(0o777)


def somebody_elses(files):
    os.chown(files.paths[2], 12345, 0)


def folder_somebody_elses(files):
    os.chown(files.folder, 12345, 0)


@ROOT_ONLY
@pytest.mark.parametrize(
    "opening",
    [
        writable_by_all,
        readable_by_all,
        folder_writable_by_all,
        somebody_elses,
        folder_somebody_elses,
    ],
)
def test_files_that_another_user_could_change_are_not_believed(
    files, opening, monkeypatch
):
    opening(files)
    with pytest.raises(IdentityError, match=r"others can change|belongs to uid 12345"):
        files.open()
    monkeypatch.setattr(guarded_files, "_check_mode", lambda *_: None)
    monkeypatch.setattr(guarded_files, "_check_owner", lambda *_: None)
    files.open().close()


def test_a_link_to_somebody_elses_roots_is_not_followed(private, files, monkeypatch):
    foreign = ThrowAwayAuthority(TD)
    theirs = private / "theirs"
    theirs.mkdir(mode=0o700)
    evil = Files(theirs, foreign)
    for path, target in zip(files.paths, evil.paths, strict=True):
        path.unlink()
        path.symlink_to(target)
    with pytest.raises(IdentityError, match="only those of a Kubernetes volume"):
        files.open()
    followed = guarded_files._FLAGS & ~os.O_NOFOLLOW
    monkeypatch.setattr(guarded_files, "_FLAGS", followed)
    with files.open() as source:
        assert source.current().bundles == foreign.bundles


def test_a_certificate_is_not_paired_with_another_key(files, authority, monkeypatch):
    files.paths[1].write_bytes(authority.issue(CLI).key_pem())
    with pytest.raises(IdentityError, match="private key is not the certificate's"):
        files.open()
    monkeypatch.setattr("ztserve.identity.file_source.read_identity", believe)
    files.open().close()


def test_a_pipe_in_a_files_place_holds_nobody_up(files, monkeypatch):
    files.paths[2].unlink()
    os.mkfifo(files.paths[2], 0o600)
    with pytest.raises(IdentityError, match="not a regular file"):
        files.open()
    blocking = guarded_files._FLAGS & ~os.O_NONBLOCK
    monkeypatch.setattr(guarded_files, "_FLAGS", blocking)

    def open_them():
        with pytest.raises(IdentityError):
            files.open()

    held = threading.Thread(target=open_them)
    held.start()
    held.join(0.05)
    assert held.is_alive()
    os.close(os.open(files.paths[2], os.O_WRONLY))
    held.join(5)


# --- under load -----------------------------------------------------------------------


class Load:
    """Calls from many threads, all the while; what failed is kept."""

    def __init__(self, client, threads=12):
        self.client, self.count, self.failed = client, 0, []
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def _ask(self):
        while not self._done.is_set():
            try:
                self.client.infer({"t": "hi"})
                self.count += 1
            except errors.ZTServeError as error:
                self.failed.append(error)
                self._done.wait(0.01)


class Everything:
    """An agent, a source and one end of the wire, for the server and the client."""

    def __init__(self, private, authority, stack, **how):
        self.agents = [
            stack.enter_context(
                HostileAgent(private / f"{name}.sock", authority, spiffe_id, **how)
            )
            for name, spiffe_id in (("server", SERVER), ("client", CLI))
        ]
        self.sources = [
            stack.enter_context(WorkloadSource(agent.socket, timeout_s=20))
            for agent in self.agents
        ]
        self.service = Echo()
        self.served = stack.enter_context(
            serving(authority, self.service, source=self.sources[0])
        )
        self.client = stack.enter_context(
            Client(self.served.address, source=self.sources[1], server_id=SERVER)
        )
        self.client.infer({"t": "hi"})

    def each(self, act):
        for agent in self.agents:
            act(agent)

    def renewed(self):
        """Renew both identities, and wait until both ends have them."""
        for agent, source in zip(self.agents, self.sources, strict=True):
            serial = agent.grant().serial
            until(
                lambda source=source, serial=serial: (
                    source.current().svid.serial == serial
                )
            )


@pytest.fixture
def everything(private, authority):
    with contextlib.ExitStack() as stack:
        yield Everything(private, authority, stack)


def killed(everything):
    everything.each(HostileAgent.kill)
    time.sleep(0.4)
    everything.each(HostileAgent.start)


def socket_removed_and_made_anew(everything):
    everything.each(HostileAgent.remake)


def slow(everything):
    for agent in everything.agents:
        agent.delay_s = 0.3
    everything.each(HostileAgent.kill)
    everything.each(HostileAgent.start)
    time.sleep(0.5)


def silent(everything):
    everything.each(HostileAgent.silence)
    everything.each(HostileAgent.remake)
    time.sleep(0.5)


def lying(everything):
    for lie in LIES:
        everything.each(lambda agent, lie=lie: agent.lie(lie))
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chaos", [killed, socket_removed_and_made_anew, slow, silent, lying]
)
def test_no_call_fails_that_could_be_served_whatever_the_agent_does(everything, chaos):
    with Load(everything.client) as load:
        for _ in range(2):
            chaos(everything)
            everything.renewed()
        time.sleep(0.3)
    assert [repr(error) for error in load.failed] == []
    assert load.count > 100
    assert {call.peer.id for call in everything.service.calls} == {CLI}


@pytest.mark.slow
def test_a_client_whose_svid_is_withdrawn_calls_no_more_within_a_second(everything):
    with Load(everything.client) as load:
        time.sleep(0.3)
        everything.agents[1].withdraw()
        time.sleep(1.0)
        count, failed = load.count, len(load.failed)
        time.sleep(0.5)
        assert load.count == count
        assert len(load.failed) > failed
    assert isinstance(load.failed[-1], IdentityError)


@pytest.mark.slow
def test_a_server_whose_svid_is_withdrawn_serves_no_more_within_a_second(everything):
    with Load(everything.client) as load:
        time.sleep(0.3)
        everything.agents[0].withdraw()
        time.sleep(1.0)
        count = len(everything.service.calls)
        time.sleep(0.5)
        assert len(everything.service.calls) == count
        everything.agents[0].grant()
        until(lambda: len(everything.service.calls) > count)
    assert {type(error) for error in load.failed} <= {
        errors.Unavailable,
        errors.Interrupted,
    }
