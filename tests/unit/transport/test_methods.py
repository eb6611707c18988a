import pytest

from ztserve.transport import WATCH, Method


@pytest.mark.parametrize("given", [{}, {"answer": max, "stream": iter}])
def test_a_method_answers_or_streams(given) -> None:
    with pytest.raises(ValueError, match="/s/M: give either an answer or a stream"):
        Method("/s/M", WATCH, **given)
