import random
from collections import Counter
from dataclasses import dataclass

import pytest

from ztserve.errors import DeadlineExceeded, Interrupted, Overloaded, Unavailable
from ztserve.transport.replicas import Replicas
from ztserve.transport.retry import Attempts, Budget


@dataclass(eq=False)
class Path:
    """A channel to nowhere."""

    address: str
    in_flight: int = 0
    aside_until: float = 0.0
    left: bool = False
    is_up: bool = True

    @property
    def is_closed(self) -> bool:
        return self.left and not self.in_flight

    def leave(self) -> None:
        self.left = True


def replicas(*addresses: str) -> Replicas[Path]:
    made = Replicas(Path)
    made.keep_only(addresses)
    return made


def test_calls_go_where_fewer_are_in_flight() -> None:
    made = replicas("a", "b")
    busy = made.take()
    assert Counter(made.take(avoid=()).address for _ in range(1))[busy.address] == 0


def test_a_replica_that_was_tried_or_refused_is_avoided_if_another_is_there() -> None:
    made = replicas("a", "b")
    assert {made.take(avoid={"a"}).address for _ in range(20)} == {"b"}
    one = made.take(avoid={"b"})
    made.give_back(one, refused=True)
    assert {made.take().address for _ in range(20)} == {"b"}
    assert made.take(avoid={"a", "b"}).address in {"a", "b"}


def test_a_replica_without_a_connection_is_left_aside_if_another_has_one() -> None:
    made = replicas("a", "b")
    gone = made.take(avoid={"b"})
    gone.is_up = False
    assert {made.take().address for _ in range(20)} == {"b"}
    for one in made:
        one.is_up = False
    assert {made.take().address for _ in range(40)} == {"a", "b"}


def test_the_random_numbers_of_the_user_stay_as_they_are() -> None:
    made, before = replicas("a", "b", "c"), random.getstate()
    for _ in range(20):
        made.take()
    assert random.getstate() == before


def test_without_a_replica_there_is_no_call() -> None:
    with pytest.raises(Unavailable, match="no replica is known"):
        replicas().take()


def test_addresses_that_are_gone_take_no_more_calls() -> None:
    made = replicas("a", "b")
    gone = made.take(avoid={"b"})
    made.keep_only({"b", "c"})
    assert gone.left
    assert {made.take().address for _ in range(20)} == {"b", "c"}


def test_a_retired_channel_is_known_until_it_is_closed() -> None:
    made = replicas("a", "b")
    running = made.take(avoid={"b"})
    made.keep_only({"b"})
    assert {one.address for one in made} == {"a", "b"}
    assert made.in_flight == 1
    made.give_back(running)
    assert {one.address for one in made} == {"b"}


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


def test_who_waited_too_long_is_told_why_it_was_tried_again() -> None:
    attempts = Attempts(Budget(), 5)
    attempts.pause_s(Unavailable("x", "nobody at home"))
    late = attempts.late()
    assert late.public == "no answer within 5 s"
    assert (
        str(late) == "no answer within 5 s; the attempt before failed: nobody at home"
    )
