"""How long a call may take, and how its messages end."""

import threading
import time

import pytest

from ztserve.errors import Cancelled, DeadlineExceeded
from ztserve.transport import Limits
from ztserve.transport.loop.exchange import Cut
from ztserve.transport.rpc import GRACE_S, Reaper, Rpc


class Exchange:
    """Gives what it is told to."""

    def __init__(self, *items) -> None:
        self.items = iter(items)
        self.dues = []

    def receive(self):
        self.dues.append(self.rpc.due)
        item = next(self.items, None)
        if item is Cut:
            raise Cut
        return item


def made(*items) -> Rpc:
    exchange = Exchange(*items)
    exchange.rpc = Rpc(exchange, Limits(body_s=30, stream_idle_s=60))
    return exchange.rpc


def test_no_patience_outlasts_the_deadline():
    rpc = made(b"first")
    rpc.deadline = time.monotonic() + 5
    assert (rpc.read(), rpc.more()) == (b"first", None)
    rpc.sending()
    assert [*rpc._exchange.dues, rpc.due] == [rpc.deadline + GRACE_S] * 3


def test_patience_ends_a_call_before_its_deadline():
    rpc = made()
    rpc.deadline = time.monotonic() + 600
    rpc.sending()
    assert rpc.due < time.monotonic() + 60
    rpc.running()
    assert rpc.due == rpc.deadline + GRACE_S


@pytest.mark.parametrize(("left_s", "error"), [(-1, DeadlineExceeded), (5, Cancelled)])
def test_a_call_that_is_cut_says_whether_it_was_too_late(left_s, error):
    rpc = made(Cut)
    rpc.deadline = time.monotonic() + left_s
    with pytest.raises(error):
        rpc.read()


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
