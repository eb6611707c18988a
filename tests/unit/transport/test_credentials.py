"""Who is at the other end of a connection that stands, judged by this moment."""

from datetime import timedelta

import pytest

from tests.unit.transport.support import CLI, SERVER, MovingSource
from ztserve import types
from ztserve.errors import Unauthenticated, Unavailable
from ztserve.identity import FixedSource, Identity, Quarantine
from ztserve.identity.quarantine import file as quarantine_file
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport.loop.credentials import Credentials, Visitor
from ztserve.transport.tls import Ends

FOREIGN = "spiffe://partner.example/a"


@pytest.fixture
def source(authority) -> MovingSource:
    return MovingSource(Identity(authority.issue(SERVER), authority.bundles))


@pytest.fixture
def credentials(source) -> Credentials:
    return Credentials(Ends(source), None)


def test_a_peer_is_judged_once_for_each_state_of_ours(credentials, authority) -> None:
    visitor = Visitor(authority.issue(CLI).chain_der)
    assert credentials.peer(visitor).id == CLI
    assert credentials.peer(visitor) is credentials.peer(visitor)


def test_nobody_is_judged_anew_without_a_chain(credentials) -> None:
    with pytest.raises(Unauthenticated) as caught:
        credentials.peer(Visitor())
    assert caught.value.public == "the peer's identity could not be verified"


def test_what_was_found_is_forgotten_with_its_bundle(credentials, source) -> None:
    partner = ThrowAwayAuthority("partner.example")
    own, visitor = source.current(), Visitor(partner.issue(FOREIGN).chain_der)
    with pytest.raises(Unauthenticated, match="no trust bundle"):
        credentials.peer(visitor)
    source.move(Identity(own.svid, {**own.bundles, **partner.bundles}))
    assert credentials.peer(visitor).id == FOREIGN
    source.move(own)
    for _ in range(2):
        with pytest.raises(Unauthenticated, match="no trust bundle"):
            credentials.peer(visitor)


def test_a_peer_that_was_found_is_refused_once_it_expires(
    credentials, authority, monkeypatch
) -> None:
    visitor = Visitor(authority.issue(CLI, ttl_s=60).chain_der)
    assert credentials.peer(visitor).id == CLI
    later = types.now() + timedelta(seconds=61)
    monkeypatch.setattr(types, "now", lambda: later)
    with pytest.raises(Unauthenticated, match="expired"):
        credentials.peer(visitor)


def test_a_peer_that_was_found_is_refused_once_it_is_in_quarantine(
    source, authority, tmp_path
) -> None:
    tmp_path.chmod(0o700)
    path, visitor = tmp_path / "list.json", Visitor(authority.issue(CLI).chain_der)
    with Quarantine.open(path) as quarantine:
        credentials = Credentials(Ends(source), quarantine)
        assert credentials.peer(visitor).id == CLI
    quarantine_file.add(path, CLI, reason="stolen", by="me", on_event=lambda *_: None)
    with Quarantine.open(path) as quarantine:
        credentials = Credentials(Ends(source), quarantine)
        with pytest.raises(Unauthenticated, match="in quarantine"):
            credentials.peer(visitor)


def test_without_an_identity_of_our_own_no_peer_is_judged(
    credentials, source, authority
) -> None:
    own, visitor = source.current(), Visitor(authority.issue(CLI).chain_der)
    assert credentials.id == SERVER
    source.move(None)
    with pytest.raises(Unavailable, match="withdrawn by the test"):
        credentials.peer(visitor)
    with pytest.raises(Unavailable):
        _ = credentials.id
    source.move(own)
    assert credentials.peer(visitor).id == CLI


def test_an_identity_that_expired_unnoticed_serves_nobody(authority) -> None:
    own = Identity(authority.issue(SERVER, ttl_s=60), authority.bundles)
    clock = [types.now()]
    source = FixedSource(own, clock=lambda: clock[0])
    credentials = Credentials(Ends(source), None)
    visitor = Visitor(authority.issue(CLI).chain_der)
    assert credentials.peer(visitor).id == CLI
    clock[0] += timedelta(seconds=61)
    with pytest.raises(Unavailable, match="expired"):
        credentials.peer(visitor)
