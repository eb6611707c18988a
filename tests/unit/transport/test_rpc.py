"""How long a call may take, and how its messages end."""

import threading
import time
from types import SimpleNamespace

import grpc
import pytest

from ztserve.errors import Cancelled, DeadlineExceeded
from ztserve.transport import Limits
from ztserve.transport.loop.exchange import Cut
from ztserve.transport.rpc import GRACE_S, Reaper, Rpc


def made(messages, **context) -> Rpc:
    context = SimpleNamespace(is_active=lambda: True, **context)
    return Rpc(messages, context, Limits(body_s=30, stream_idle_s=60))


def test_no_patience_outlasts_the_deadline():
    dues = []

    def messages():
        dues.append(rpc.due)
        yield b"first"
        dues.append(rpc.due)

    rpc = made(messages(), raises_when_cut=True)
    rpc.deadline = time.monotonic() + 5
    assert (rpc.read(), rpc.more()) == (b"first", None)
    rpc.sending()
    assert [*dues, rpc.due] == [rpc.deadline + GRACE_S] * 3


def test_patience_ends_a_call_before_its_deadline():
    rpc = made(iter(()))
    rpc.deadline = time.monotonic() + 600
    rpc.sending()
    assert rpc.due < time.monotonic() + 60
    rpc.running()
    assert rpc.due == rpc.deadline + GRACE_S


@pytest.mark.parametrize(("left_s", "error"), [(-1, DeadlineExceeded), (5, Cancelled)])
def test_a_call_that_is_cut_says_whether_it_was_too_late(left_s, error):
    def messages():
        raise Cut
        yield

    rpc = made(messages(), raises_when_cut=True)
    rpc.deadline = time.monotonic() + left_s
    with pytest.raises(error):
        rpc.read()


def test_an_end_that_is_sure_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    assert issubclass(Cut, grpc.RpcError)
    assert made(iter(()), raises_when_cut=True).more() is None


@pytest.mark.slow
def test_a_fault_in_judging_one_call_ends_that_call_and_no_sweep() -> None:
    def fault() -> None:
        raise OSError("the audit's disk is full")

    class Call:
        due = float("inf")

        def __init__(self, still):
            self.still, self.cancelled = still, threading.Event()

        def cancel(self):
            self.cancelled.set()

    reaper = Reaper()
    reaper.start()
    for _ in range(2):
        call = Call(fault)
        reaper.add(call)
        assert call.cancelled.wait(5)
    reaper.close()
