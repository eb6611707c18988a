"""Who has a place among a server's connections."""

import pytest

from ztserve.errors import Overloaded
from ztserve.transport import Limits
from ztserve.transport.admission import Admission
from ztserve.transport.loop.house import (
    MAX_OF_ONE_ADDRESS,
    MAX_OF_ONE_PRINCIPAL,
    House,
)


class Wire:
    def __init__(self, house, address):
        self.house, self.address, self.gone = house, address, False

    def enter(self):
        return self.house.enter(self, self.address)

    def give_way(self):
        self.gone = True
        self.house.leave(self, self.address)


def house(**limits):
    def nothing(*_):
        return None

    return House(
        limits=Limits(**limits),
        ends=None,
        credentials=None,
        methods={},
        admission=Admission(Limits()),
        answer=nothing,
        refused=nothing,
    )


def test_one_more_handshake_ends_another():
    one = house(max_handshakes=3)
    wires = [Wire(one, f"10.0.0.{n}") for n in range(10)]
    assert all(wire.enter() for wire in wires)
    assert sum(wire.gone for wire in wires) == 7
    assert not wires[-1].gone
    assert one.wires == {wire for wire in wires if not wire.gone}


def test_whoever_is_known_keeps_its_place():
    one = house(max_connections=3)
    known = [Wire(one, "10.0.0.1") for _ in range(3)]
    for wire in known:
        assert wire.enter()
        assert one.known(wire, "spiffe://a/b")
    assert not Wire(one, "10.0.0.2").enter()
    assert not any(wire.gone for wire in known)


def test_a_crowded_address_takes_no_place_of_another():
    one = house()
    elsewhere = Wire(one, "10.0.0.2")
    assert elsewhere.enter()
    crowd = [Wire(one, "10.0.0.1") for _ in range(MAX_OF_ONE_ADDRESS + 5)]
    for wire in crowd:
        assert wire.enter()
        one.known(wire, f"spiffe://a/{wire}") if wire in crowd[:250] else None
    assert not elsewhere.gone
    assert sum(wire.gone for wire in crowd) == 5
    assert one._by_address["10.0.0.1"] == MAX_OF_ONE_ADDRESS


def test_one_principal_leaves_places_of_its_address_to_others():
    one = house()
    wires = [Wire(one, "10.0.0.1") for _ in range(MAX_OF_ONE_PRINCIPAL + 1)]
    assert all(wire.enter() for wire in wires)
    *first, last = wires
    assert all(one.known(wire, "spiffe://a/b") for wire in first)
    assert not one.known(last, "spiffe://a/b")
    one.leave(last, "10.0.0.1")
    neighbour, elsewhere = Wire(one, "10.0.0.1"), Wire(one, "10.0.0.2")
    assert neighbour.enter()
    assert one.known(neighbour, "spiffe://a/c")
    assert elsewhere.enter()
    assert one.known(elsewhere, "spiffe://a/b")
    first[0].give_way()
    again = Wire(one, "10.0.0.1")
    assert again.enter()
    assert one.known(again, "spiffe://a/b")
    for wire in list(one.wires):
        one.leave(wire, wire.address)
    assert not one._by_principal
    assert not one._principals


def test_bytes_of_requests_are_counted_in_and_out():
    one = house(max_requests_bytes=100)
    one.hold(80)
    with pytest.raises(Overloaded, match="80 bytes of requests are here"):
        one.hold(30)
    one.hold(-80)
    one.hold(100)
