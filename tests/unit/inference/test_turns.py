import random
import threading
import time
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest

from tests.unit.inference.support import a_call, eventually, in_threads
from ztserve.errors import CallError, Cancelled, DeadlineExceeded
from ztserve.inference.turns import Turns, any_wanted, still_wanted


def gone() -> bool:
    return True


def test_a_call_is_wanted_until_it_is_cancelled_or_late():
    still_wanted(a_call())
    with pytest.raises(Cancelled, match="was cancelled"):
        still_wanted(a_call(cancelled=gone))
    with pytest.raises(DeadlineExceeded, match="the deadline passed"):
        still_wanted(a_call(-1))


def test_a_batch_is_wanted_while_one_of_its_calls_is():
    any_wanted(())
    any_wanted((a_call(-1), a_call()))
    any_wanted((a_call(), a_call(cancelled=gone)))
    with pytest.raises(Cancelled):
        any_wanted((a_call(-1), a_call(cancelled=gone)))


def test_turns_come_in_order_of_arrival():
    turns, order = Turns(), []

    def waiter(i):
        eventually(lambda: len(turns._waiting) == i)
        with turns.turn(a_call()):
            order.append(i)

    def holder():
        with turns.turn(a_call()):
            eventually(lambda: len(turns._waiting) == 8)

    with turns.turn(None):
        first = threading.Thread(target=holder)
        first.start()
        eventually(lambda: turns._waiting)
        threads = [threading.Thread(target=waiter, args=(i,)) for i in range(1, 9)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(turns._waiting) == 9)  # all of them, and in order
    for thread in (first, *threads):
        thread.join(10)
    assert order == list(range(1, 9))


def test_a_turn_goes_to_whoever_waits_once_the_slice_is_over(monkeypatch):
    monkeypatch.setattr("ztserve.inference.turns.SLICE_S", 0)
    turns = Turns()
    with turns.turn(None):
        other = threading.Thread(target=turns._take, args=(None,))
        other.start()
        eventually(lambda: turns._waiting)
    assert turns._taken  # never free in between: nobody else can have taken it
    other.join(10)
    turns._pass_on()
    assert not turns._taken


def test_within_the_slice_whoever_comes_first_takes_it(monkeypatch):
    monkeypatch.setattr("ztserve.inference.turns.SLICE_S", 60)
    turns, rings = Turns(), []
    with turns.turn(None):
        turns._waiting.append(waiter := SimpleNamespace(has_it=False, thread=1))
        waiter.bell = SimpleNamespace(release=lambda: rings.append(1))
    assert not turns._taken
    with turns.turn(None):  # the one who waits has been woken, and is late
        assert rings == [1]
        assert not turns._got(waiter)
    assert rings == [1, 1]  # and is woken again
    assert turns._got(waiter)
    assert turns._taken
    assert not turns._waiting


@pytest.mark.slow
def test_whoever_asks_again_at_once_waits_behind_the_others():
    turns, taken = Turns(), []

    def greedy(name):
        for _ in range(20):
            with turns.turn(a_call()):
                taken.append(name)
                time.sleep(0.001)

    with turns.turn(None):
        threads = [threading.Thread(target=greedy, args=(n,)) for n in "ab"]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join(20)
    # strictly by turns, whoever began, until one has had all of its own
    assert all(one != other for one, other in pairwise(taken[:38]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "error"),
    [({"seconds": 0.05}, DeadlineExceeded), ({"cancelled": gone}, Cancelled)],
)
def test_a_call_that_is_not_wanted_any_more_stops_waiting(call, error):
    turns = Turns()
    with turns.turn(None), pytest.raises(error):  # noqa: SIM117
        with turns.turn(a_call(**call)):
            raise AssertionError("it has no turn")
    assert not turns._waiting
    assert not turns._taken


@pytest.mark.slow
def test_what_interrupts_the_waiting_takes_the_call_out():
    def interrupted():
        raise KeyboardInterrupt

    turns = Turns()
    with turns.turn(None), pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with turns.turn(a_call(cancelled=interrupted)):
            raise AssertionError("it has no turn")
    assert not turns._waiting
    with turns.turn(a_call()):
        assert turns._taken
    assert not turns._taken


@pytest.mark.slow
def test_a_turn_that_comes_to_one_who_just_left_goes_to_the_next():
    turns, held = Turns(), threading.Lock()

    def work(seed):
        dice = random.Random(seed)
        for _ in range(30):
            try:
                with turns.turn(a_call(dice.uniform(0, 0.15))):
                    assert held.acquire(blocking=False)  # nobody else is in
                    time.sleep(dice.uniform(0, 0.004))
                    held.release()
            except CallError:
                continue

    results = in_threads(*[partial(work, seed) for seed in range(12)])
    assert results == [None] * 12
    assert not turns._taken
    assert not turns._waiting
