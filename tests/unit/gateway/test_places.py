import pytest

from ztserve.errors import Overloaded
from ztserve.gateway import Limits
from ztserve.gateway.places import Places


def test_connections_are_counted_in_total_and_by_address():
    places = Places(Limits(max_connections=3, max_connections_per_address=2))
    assert [places.connect("a") for _ in range(3)] == [True, True, False]
    assert [places.connect("b") for _ in range(2)] == [True, False]
    places.disconnect("a")
    assert places.connect("b")
    for address in "abb":
        places.disconnect(address)
    assert [places.connect("a") for _ in range(2)] == [True, True]


def test_requests_are_counted_in_total_and_by_peer():
    places = Places(Limits(max_in_flight=2, max_in_flight_per_peer=1))
    with places.request("a"):
        with pytest.raises(Overloaded, match="a has 1 requests in flight"):
            places.request("a").__enter__()
        with (
            places.request("b"),
            pytest.raises(Overloaded, match="2 requests in flight, the limit is 2"),
        ):
            places.request("c").__enter__()
        assert places.in_flight == 1
    assert places.in_flight == 0


def test_bodies_are_counted_in_bytes_and_given_back_on_failure():
    places = Places(Limits(max_bodies_bytes=10))
    full = "10 bytes of bodies are here, 1 more"
    with pytest.raises(Overloaded, match=full), places.body(10):
        places.body(1).__enter__()
    with places.body(10):
        pass
