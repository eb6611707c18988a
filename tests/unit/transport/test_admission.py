import pytest

from ztserve.errors import Overloaded
from ztserve.transport.admission import Admission
from ztserve.transport.limits import Limits


def test_one_principal_cannot_take_all_places() -> None:
    admission = Admission(Limits(max_in_flight=3, max_in_flight_per_principal=2))
    admission.enter("a")
    admission.enter("a")
    with pytest.raises(Overloaded, match="a has 2 calls in flight"):
        admission.enter("a")
    admission.enter("b")
    with pytest.raises(Overloaded, match="3 calls in flight, the limit is 3"):
        admission.enter("c")


def test_a_call_that_left_makes_room() -> None:
    admission = Admission(Limits(max_in_flight=1))
    admission.enter("a")
    admission.leave("a")
    admission.enter("b")
    assert admission.in_flight == 1


def test_health_has_a_reserve_and_that_has_an_end() -> None:
    admission = Admission(Limits(max_in_flight=1))
    admission.enter("a")
    admission.enter("a", reserve=1)
    with pytest.raises(Overloaded):
        admission.enter("a", reserve=1)


def test_what_is_held_counts_as_in_flight_whatever_the_limit():
    admission = Admission(Limits(max_in_flight=1, max_in_flight_per_principal=1))
    admission.hold("a")
    admission.hold("a")
    assert admission.in_flight == 2
    with pytest.raises(Overloaded):
        admission.enter("b")
    admission.leave("a")
    admission.leave("a")
    admission.enter("a")
