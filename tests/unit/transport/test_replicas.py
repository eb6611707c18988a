from collections import Counter

import pytest

from ztserve.errors import DeadlineExceeded, Interrupted, Overloaded, Unavailable
from ztserve.transport.replicas import Lane, Replicas
from ztserve.transport.retry import Attempts, Budget


def replicas(*addresses: str) -> tuple[Replicas[str], list[str]]:
    closed: list[str] = []
    made: Replicas[str] = Replicas(closed.append)
    for address in addresses:
        made.install(Lane(address, f"channel to {address}", 0))
    return made, closed


def test_calls_go_where_fewer_are_in_flight() -> None:
    made, _ = replicas("a", "b")
    busy = made.take()
    assert Counter(made.take(avoid=()).address for _ in range(1))[busy.address] == 0


def test_a_replica_that_was_tried_or_refused_is_avoided_if_another_is_there() -> None:
    made, _ = replicas("a", "b")
    assert {made.take(avoid={"a"}).address for _ in range(20)} == {"b"}
    lane = made.take(avoid={"b"})
    made.give_back(lane, refused=True)
    assert {made.take().address for _ in range(20)} == {"b"}
    assert made.take(avoid={"a", "b"}).address in {"a", "b"}


def test_without_a_replica_there_is_no_call() -> None:
    made, _ = replicas()
    with pytest.raises(Unavailable, match="no replica is known"):
        made.take()


def test_a_replaced_lane_is_closed_after_its_last_call() -> None:
    made, closed = replicas("a")
    old = made.take()
    made.install(Lane("a", "new channel", 1))
    assert made.take().channel == "new channel"
    assert closed == []
    made.give_back(old)
    assert closed == ["channel to a"]


def test_addresses_that_are_gone_take_no_more_calls() -> None:
    made, closed = replicas("a", "b")
    made.keep_only({"b"})
    assert closed == ["channel to a"]
    assert made.outdated(["b", "c"], 0) == ["c"]
    assert made.outdated(["b"], 1) == ["b"]


def test_what_runs_on_a_retired_lane_can_be_broken_off_once() -> None:
    made, closed = replicas("a", "b")
    old, other = made.take(avoid={"b"}), made.take(avoid={"a"})
    made.install(Lane("a", "new channel", 1))
    made.cut(0)
    assert (closed, old.cut) == ([], False)
    made.cut(1)
    assert (closed, old.cut, other.cut) == (["channel to a"], True, False)
    made.give_back(old)
    made.cut(1)
    assert closed == ["channel to a"]


def test_only_what_surely_did_not_run_is_tried_again() -> None:
    attempts = Attempts(Budget(), 5)
    assert attempts.pause_s(Unavailable("x"), "a") > 0
    assert attempts.pause_s(Overloaded("x"), "b") > 0
    assert attempts.tried == {"a", "b"}
    with pytest.raises(Interrupted):
        attempts.pause_s(Interrupted("x"), "c")


def test_attempts_end() -> None:
    attempts = Attempts(Budget(), 5)
    for _ in range(3):
        attempts.pause_s(Unavailable("x"))
    with pytest.raises(Unavailable):
        attempts.pause_s(Unavailable("x"))


def test_retries_have_a_budget_that_success_refills() -> None:
    budget = Budget()
    assert sum(budget.spend() for _ in range(20)) == 10
    with pytest.raises(Unavailable):
        Attempts(budget, 5).pause_s(Unavailable("x"))
    for _ in range(10):
        budget.earn()
    assert budget.spend()


def test_no_attempt_outlasts_the_timeout() -> None:
    with pytest.raises(Unavailable):
        Attempts(Budget(), 0.001).pause_s(Unavailable("x"))
    with pytest.raises(DeadlineExceeded, match=r"no answer within 0 s"):
        Attempts(Budget(), 0).left_s()
