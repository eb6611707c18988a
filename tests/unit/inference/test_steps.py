"""Pieces of a generator: several at a turn where it is quick, else one by one."""

import time

import pytest

from ztserve.inference.steps import Steps


def turns(stream) -> list[list[object]]:
    steps, taken = Steps(stream, lambda piece: piece), []
    while not steps.over:
        taken.append(list(steps.take()))
    return taken


def test_all_pieces_leave_in_order_the_first_one_alone():
    taken = turns(iter(range(2000)))
    assert [piece for turn in taken for piece in turn] == list(range(2000))
    assert taken[0] == [0]
    assert len(taken) < 500


def test_no_piece_waits_for_the_next_one_of_a_slow_model():
    def stream():
        for at in range(5):
            time.sleep(0.001)
            yield at

    assert turns(stream()) == [[0], [1], [2], [3], [4], []]


def test_a_model_that_turns_slow_holds_back_what_came_just_before_and_no_more():
    def stream():
        yield from range(100)
        for at in range(100, 104):
            time.sleep(0.001)
            yield at

    assert turns(stream())[-4:] == [[101], [102], [103], []]


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_what_came_before_an_error_leaves_before_it(kind):
    def stream():
        yield from range(50)
        raise kind("the model's own")

    steps, taken = Steps(stream(), lambda piece: piece), []
    with pytest.raises(kind, match="the model's own"):
        taken.extend(piece for _ in range(60) for piece in steps.take())
    assert taken == list(range(50))
    assert steps.over
