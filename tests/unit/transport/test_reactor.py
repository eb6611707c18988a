"""The loop that its leader may leave."""

import contextlib
import errno
import socket
import threading
import time
from collections import deque
from contextlib import contextmanager

import pytest

from tests.unit.transport.support import CLI, SERVER, Echo, serving
from ztserve.transport import Client
from ztserve.transport.loop import answers, reactor
from ztserve.transport.loop.reactor import Reactor


class Talk:
    """A protocol that gives back what it hears, and fails where it hears a fault."""

    opened: "list[Talk]" = []  # noqa: RUF012 - reset by the fixture

    def __init__(self) -> None:
        self.lost = self.paused = 0
        Talk.opened.append(self)

    def connection_made(self, plug) -> None:
        self.plug = plug
        plug.set_write_buffer_limits(1000)

    def data_received(self, data: bytes) -> None:
        if data == b"fault":
            raise RuntimeError("a fault of one connection")
        self.plug.write(data)

    def eof_received(self) -> None:
        pass

    def connection_lost(self, error) -> None:
        self.lost += 1

    def pause_writing(self) -> None:
        self.paused += 1
        self.plug.pause_reading()

    def resume_writing(self) -> None:
        self.paused -= 1
        self.plug.resume_reading()


@pytest.fixture(autouse=True)
def opened():
    Talk.opened.clear()
    yield Talk.opened
    Talk.opened.clear()


class Jobs:
    """What the leader does at the end of its turns."""

    def __init__(self) -> None:
        self.waiting = deque()
        self.led = []
        self.loop = None

    def __call__(self) -> bool:
        while self.waiting:
            self.led.append(self.loop.away(*self.waiting.popleft()))
            if not self.led[-1]:
                return False
        return True

    def give(self, work, then) -> None:
        self.waiting.append((work, then))
        self.loop.post(int)


@contextmanager
def running():
    others = threads()  # of servers that tests elsewhere keep
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    jobs = Jobs()
    loop = jobs.loop = Reactor(listener, Talk, jobs)
    loop.jobs = jobs
    loop.start()
    until(lambda: loop.may_leave)
    try:
        yield loop, address
    finally:
        loop.stop(5)
        until(lambda: threads() <= others)


def threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name == "ztserve-loop"}


def until(fact, seconds=5.0) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def echoed(address, data: bytes = b"hello") -> bytes:
    with socket.create_connection(address, timeout=5) as one:
        one.sendall(data)
        return one.recv(1000)


def test_what_comes_in_goes_out_and_what_is_posted_is_done_in_order() -> None:
    done: list[int] = []
    with running() as (loop, address):
        assert echoed(address) == b"hello"
        for n in range(100):
            loop.post(done.append, n)
        until(lambda: len(done) == 100)
    assert done == list(range(100))


def test_a_fault_of_one_connection_ends_no_other(opened) -> None:
    with running() as (_, address), socket.create_connection(address) as stays:
        assert echoed(address, b"fault") == b""
        stays.sendall(b"still here")
        assert stays.recv(100) == b"still here"
    assert [one.lost for one in opened] == [1, 1]


def test_a_fault_of_a_turn_ends_no_server(caplog) -> None:
    def fault() -> None:
        raise RuntimeError("a fault of ours")

    with running() as (loop, address):
        loop.jobs.give(fault, print)
        assert echoed(address) == b"hello"
        until(lambda: "a turn of the loop ended early" in caplog.text)
        assert echoed(address) == b"hello"


def test_timers_go_off_in_order_of_their_time() -> None:
    done: list[str] = []
    with running() as (loop, _):
        loop.post(loop.later, 0.06, done.append, "later")
        loop.post(loop.later, 0.02, done.append, "sooner")
        until(lambda: len(done) == 2)
    assert done == ["sooner", "later"]


def test_a_leader_that_is_away_for_too_long_is_followed_by_its_deputy() -> None:
    go, found = threading.Event(), []
    with running() as (loop, address):
        first = loop._leader

        def work() -> str:
            go.wait(10)
            return "found"

        loop.jobs.give(work, found.append)
        assert echoed(address) == b"hello"  # somebody leads
        assert loop._leader is not first
        assert not loop.may_leave
        go.set()
        until(lambda: found == ["found"])
        assert loop.jobs.led == [False]
        until(lambda: loop.may_leave)  # who was away stands by now


def test_a_leader_that_is_soon_back_leads_on() -> None:
    found: list[int] = []
    with running() as (loop, _):
        first = loop._leader
        for n in range(200):
            loop.jobs.give(lambda n=n: n, found.append)
        until(lambda: len(found) == 200)
        assert loop._leader is first
    assert found == list(range(200))


def test_it_ends_although_a_leader_never_comes_back() -> None:
    go, found = threading.Event(), []
    with running() as (loop, _):
        loop.jobs.give(lambda: go.wait(10), found.append)
        until(lambda: loop._away_since is not None)
        loop.stop(5)
        assert loop._ended.is_set()
        go.set()
    assert found == []  # there is no loop any more to tell
    loop.post(found.append, 1)  # rings nobody's file
    assert found == []


def test_without_files_for_more_connections_it_waits_and_goes_on(
    monkeypatch,
) -> None:
    monkeypatch.setattr(reactor, "EXHAUSTED_S", 0.05)
    failed: list[int] = []
    with running() as (loop, address):
        accept = loop._listener.accept

        class Listener:
            def __getattr__(self, name):
                return getattr(listener, name)

            def accept(self):
                if len(failed) < 3:
                    failed.append(1)
                    raise OSError(errno.EMFILE, "too many open files")
                return accept()

        listener, loop._listener = loop._listener, Listener()
        assert echoed(address) == b"hello"
    assert len(failed) == 3


def test_a_peer_that_takes_nothing_pauses_its_protocol_and_no_other(opened) -> None:
    with running() as (_, address), socket.create_connection(address) as deaf:
        deaf.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                deaf.sendall(bytes(1 << 20))
        assert opened[0].paused == 1
        assert echoed(address) == b"hello"
        deaf.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while deaf.recv(1 << 20):
                pass
        assert opened[0].paused == 0


class Sudden(Echo):
    """A model that is short until it is told to take a nap."""

    takes_several = True

    def infer_all(self, calls):
        for at, (call, receive) in enumerate(calls):
            yield at, self.infer(call, receive)


def naps(authority, patience_s: float, monkeypatch) -> tuple[bool, set[str]]:
    """Return whether another caller was answered during the nap, and by whom calls."""
    monkeypatch.setattr(reactor, "PATIENCE_S", patience_s)
    service, names = Sudden(), set()
    answer = service.infer

    def watched(call, receive):
        names.add(threading.current_thread().name)
        return answer(call, receive)

    service.infer = watched
    with (
        serving(authority, service) as served,
        Client(served.address, source=authority.source(CLI), server_id=SERVER) as one,
        Client(served.address, source=authority.source(CLI), server_id=SERVER) as two,
    ):
        two.ready()
        for _ in range(60):
            one.infer({"t": "hi"})
        assert names == {"ztserve-call", "ztserve-loop"}  # first there, then here
        names.clear()
        napping = threading.Thread(target=lambda: one.infer({"t": "wait"}))
        napping.start()
        assert service.running.acquire(timeout=5)
        told = threading.Thread(target=two.ready)
        told.start()
        told.join(1.0)
        answered = not told.is_alive()
        service.go.set()
        napping.join(5)
        told.join(5)
        one.infer({"t": "hi"})
    return answered, names


@pytest.mark.slow
def test_a_model_that_takes_a_nap_holds_up_nobody_else(authority, monkeypatch) -> None:
    answered, names = naps(authority, 0.02, monkeypatch)
    assert answered
    # Once it took too long, it is not believed to be short for a while.
    assert names == {"ztserve-loop", "ztserve-call"}


@pytest.mark.slow
def test_without_a_deputy_the_nap_would_hold_up_everybody(
    authority, monkeypatch
) -> None:
    answered, _ = naps(authority, 60.0, monkeypatch)
    assert not answered


def test_calls_that_take_long_are_answered_elsewhere(authority, monkeypatch) -> None:
    monkeypatch.setattr(answers, "SHORT_S", 0.0)
    service, names = Sudden(), set()
    answer = service.infer
    service.infer = lambda call, receive: (
        names.add(threading.current_thread().name),
        answer(call, receive),
    )[1]
    with (
        serving(authority, service) as served,
        Client(served.address, source=authority.source(CLI), server_id=SERVER) as one,
    ):
        for _ in range(60):
            one.infer({"t": "hi"})
    assert names == {"ztserve-call"}
