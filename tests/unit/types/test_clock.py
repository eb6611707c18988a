import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from ztserve import types
from ztserve.types.clock import Clock


class Hands:
    """Two clocks that the test moves: `wall` can be set, `steady` only passes."""

    def __init__(self):
        self.wall, self.steady = 1_000_000.0, 50.0
        self.clock = Clock(lambda: self.wall, lambda: self.steady)
        self.steps = []
        self.unsubscribe = self.clock.on_step(self.steps.append)

    def pass_(self, seconds):
        self.wall += seconds
        self.steady += seconds

    def now(self):
        return self.clock.now().timestamp()


@pytest.fixture
def hands():
    return Hands()


def test_time_is_utc_and_what_the_wall_clock_says():
    told = types.now()
    assert told.tzinfo is UTC
    assert abs(told - datetime.now(UTC)) < timedelta(seconds=1)


def test_a_clock_that_is_set_back_goes_on_as_if_it_had_not_been(hands):
    hands.wall -= 3600
    hands.pass_(10)
    assert hands.now() == 1_000_010


def test_what_the_clock_was_ahead_once_it_does_not_take_back(hands):
    # Forward and back again: what expired in between must not come to life.
    hands.wall += 3600
    assert hands.now() == 1_003_600
    hands.wall -= 3600
    hands.pass_(1)
    assert hands.now() == 1_003_601


def test_a_clock_that_is_set_forward_is_believed_at_once(hands):
    hands.wall += 86_400
    assert hands.now() == 1_086_400


@pytest.mark.parametrize("seconds", [61.0, -61.0, 86_400.0, -86_400.0])
def test_a_step_of_over_a_minute_is_told_once_with_its_seconds(hands, caplog, seconds):
    hands.wall += seconds
    for _ in range(3):
        hands.now()
        hands.pass_(1)
    assert hands.steps == [pytest.approx(seconds)]
    assert f"clock-stepped: the wall clock was set by {seconds:+.3f} s" in caplog.text


@pytest.mark.parametrize("seconds", [59.0, -59.0, 0.0])
def test_a_smaller_step_is_not_told(hands, seconds):
    hands.wall += seconds
    hands.now()
    assert hands.steps == []


def test_small_steps_that_add_up_are_told(hands):
    for _ in range(3):
        hands.wall -= 25
        hands.now()
    assert hands.steps == [pytest.approx(-75)]


def test_the_way_back_is_told_as_well(hands):
    hands.wall += 3600
    hands.now()
    hands.wall -= 3600
    hands.now()
    assert hands.steps == [pytest.approx(3600), pytest.approx(-3600)]


def test_who_does_not_listen_any_more_is_not_told(hands):
    hands.unsubscribe()
    hands.unsubscribe()
    hands.wall += 3600
    hands.now()
    assert hands.steps == []


def test_a_listener_may_ask_for_the_time_or_fail(hands, caplog):
    asked = []
    hands.clock.on_step(lambda _: asked.append(hands.now()))
    hands.clock.on_step(lambda _: 1 / 0)
    hands.wall += 3600
    assert hands.now() == 1_003_600
    assert asked == [1_003_600]
    assert "a listener to steps of the clock failed" in caplog.text


def test_the_clock_of_the_process_has_listeners():
    unsubscribe = types.on_clock_step(lambda _: None)
    unsubscribe()


@pytest.mark.slow
def test_the_time_never_runs_backward_while_threads_ask_and_the_clock_jumps():
    ahead = [0.0]
    clock = Clock(lambda: time.time() + ahead[0], time.monotonic)
    until = time.monotonic() + 0.5
    backward = []

    def ask():
        last = clock.now()
        while time.monotonic() < until:
            told = clock.now()
            if last - told > timedelta(milliseconds=1):
                backward.append(last - told)
            last = told

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    furthest = 0.0
    while time.monotonic() < until:
        for jump in (0.5, -90.0, 30.0, -0.01, 120.0):
            ahead[0] += jump
            furthest = max(furthest, ahead[0])
            time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert backward == []
    # Nor does it run ahead of the furthest that the wall clock ever was.
    assert clock.now().timestamp() - time.time() <= furthest + 0.01
