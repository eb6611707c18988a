"""Which replicas the directory lists."""

import threading

import pytest

from tests.unit.inference.support import eventually
from ztserve.serving import listing
from ztserve.serving.listing import Listing

KEY, PLACE = "ml/digits", ("default", "Digits")


def replica(name, **more):
    facts = {"model": "digits", "version": "1", "digest": "sha256:ab"}
    return {"ztserve": True, "address": f"{name}:1", "replica": name, **facts, **more}


def addresses(known):
    return {key: [e.address for e in found] for key, found in known.all().items()}


@pytest.fixture
def known():
    made = Listing()
    made.update(KEY, PLACE, [replica("a"), replica("b"), {"somebody": "else"}])
    return made


def test_what_serve_says_is_listed_and_nothing_that_is_not_ours(known):
    assert addresses(known) == {KEY: ["a:1", "b:1"]}
    (first, _) = known.all()[KEY]
    assert (first.model, first.version, first.digest) == ("digits", "1", "sha256:ab")


def test_places_of_one_identity_are_listed_together(known):
    known.update(KEY, ("other", "Digits"), [replica("c")])
    known.update("ml/else", ("other", "Else"), [])
    assert addresses(known) == {KEY: ["a:1", "b:1", "c:1"], "ml/else": []}


def test_who_left_is_listed_no_longer_whatever_serve_says(known):
    known.leave("a")
    known.leave("a")
    assert addresses(known) == {KEY: ["b:1"]}
    known.update(KEY, PLACE, [replica("a"), replica("b")])
    assert addresses(known) == {KEY: ["b:1"]}
    # What came in its place, at the same address, is another replica.
    known.update(KEY, PLACE, [replica("d", address="a:1"), replica("b")])
    assert addresses(known) == {KEY: ["a:1", "b:1"]}


def test_who_leaves_before_it_is_listed_never_is(known):
    known.leave("late")
    known.update(KEY, PLACE, [replica("late")])
    assert addresses(known) == {KEY: []}


def test_of_those_that_left_the_newest_are_remembered(known):
    for number in range(listing.MAX_ENDPOINTS):
        known.leave(f"r{number}")
    known.leave("a")
    assert len(known._left) == listing.MAX_ENDPOINTS
    assert addresses(known) == {KEY: ["b:1"]}


def test_who_watches_hears_of_it_at_once(known, monkeypatch):
    monkeypatch.setattr(listing, "LOOK_UP_S", 60.0)
    heard, wanted = [], [True]

    def watch():
        for endpoints in known.watch(KEY, lambda: wanted[0]):
            heard.append([e.address for e in endpoints])

    thread = threading.Thread(target=watch)
    thread.start()
    eventually(lambda: heard == [["a:1", "b:1"]])
    known.leave("b")
    eventually(lambda: heard == [["a:1", "b:1"], ["a:1"]])
    wanted[0] = False
    known.update(KEY, PLACE, [])
    thread.join(10)
    assert not thread.is_alive()


def test_what_does_not_change_is_told_once(known, monkeypatch):
    monkeypatch.setattr(listing, "LOOK_UP_S", 0.001)
    looks = iter([True] * 5)
    told = list(known.watch(KEY, lambda: next(looks, False)))
    assert len(told) == 1
