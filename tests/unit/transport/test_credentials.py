import pytest

from tests.unit.transport.support import CLI, SERVER, MovingSource
from ztserve.errors import IdentityError, Unauthenticated, Unavailable
from ztserve.identity import Identity
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport.credentials import ServerCredentials


@pytest.fixture
def source(authority) -> MovingSource:
    return MovingSource(Identity(authority.issue(SERVER), authority.bundles))


@pytest.fixture
def credentials(source) -> ServerCredentials:
    return ServerCredentials(source)


def facts(svid, **wrong):
    leaf, *rest = svid.chain_pem().split(b"-----END CERTIFICATE-----\n")[:-1]
    end = b"-----END CERTIFICATE-----\n"
    known = {
        "ssl_tls_version": [b"TLSv1.3"],
        "ssl_session_reused": [b"false"],
        "x509_pem_cert": [leaf + end],
    }
    if rest:
        known["x509_pem_cert_chain"] = [b"".join(one + end for one in rest)]
    return {k: v for k, v in (known | wrong).items() if v is not None}


def test_a_good_peer_is_known_and_remembered(credentials, authority) -> None:
    known = facts(authority.issue(CLI))
    assert credentials.peer(known).id == CLI
    assert credentials.peer(known) is credentials.peer(known)


def test_a_chain_with_an_intermediate_is_followed(credentials, authority) -> None:
    svid = authority.intermediate().forge(CLI)
    assert len(svid.chain_der) == 2
    assert credentials.peer(facts(svid)).id == CLI


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"ssl_tls_version": [b"TLSv1.2"]}, "not TLS 1.3"),
        ({"ssl_tls_version": None}, "not TLS 1.3"),
        ({"ssl_session_reused": [b"true"]}, "resumed"),
        ({"ssl_session_reused": None}, "resumed"),
        ({"x509_pem_cert": None}, "no client certificate"),
        ({"x509_pem_cert": [b"x" * 200_000]}, "too long"),
        ({"x509_pem_cert": [b"nonsense"]}, "no certificate"),
    ],
)
def test_a_connection_without_all_facts_is_refused(
    credentials, authority, wrong, match: str
) -> None:
    with pytest.raises(Unauthenticated, match=match) as caught:
        credentials.peer(facts(authority.issue(CLI), **wrong))
    assert caught.value.public == "the peer's identity could not be verified"


def test_what_is_remembered_is_forgotten_with_its_bundle(credentials, source) -> None:
    partner = ThrowAwayAuthority("partner.example")
    who = "spiffe://partner.example/a"
    svid, own = partner.issue(who), source.current()
    with pytest.raises(Unauthenticated, match="no trust bundle"):
        credentials.peer(facts(svid))
    source.move(Identity(own.svid, {**own.bundles, **partner.bundles}))
    assert credentials.peer(facts(svid)).id == who
    source.move(own)
    with pytest.raises(Unauthenticated, match="no trust bundle"):
        credentials.peer(facts(svid))


def test_without_an_identity_of_our_own_no_peer_is_judged(
    credentials, source, authority
) -> None:
    own = source.current()
    assert credentials.id == SERVER
    source.move(None)
    with pytest.raises(Unavailable, match="expired or withdrawn"):
        credentials.peer(facts(authority.issue(CLI)))
    with pytest.raises(Unavailable):
        _ = credentials.id
    source.move(own)
    assert credentials.peer(facts(authority.issue(CLI))).id == CLI


def test_an_identity_that_expired_unnoticed_serves_nobody(authority) -> None:
    late = authority.forge(SERVER, starts_s=-60, ends_s=-1)
    expired = ServerCredentials(MovingSource(Identity(late, authority.bundles)))
    with pytest.raises(Unavailable):
        expired.peer(facts(authority.issue(CLI)))


def test_the_memory_is_bounded(credentials, authority, monkeypatch) -> None:
    monkeypatch.setattr("ztserve.transport.credentials.MAX_KNOWN", 3)
    for _ in range(10):
        credentials.peer(facts(authority.issue(CLI)))
        assert len(credentials._state.known) <= 3


def test_a_source_without_identity_makes_no_credentials(source) -> None:
    source.move(None)
    with pytest.raises(IdentityError):
        ServerCredentials(source)


def test_a_closed_one_follows_no_more(credentials, source) -> None:
    credentials.close()
    assert source._callbacks == []


def test_a_change_while_it_is_built_is_not_lost(authority: ThrowAwayAuthority) -> None:
    first, second = (authority.source(CLI).current() for _ in range(2))

    class Hasty:
        """A source that changes just before anybody can listen."""

        identity = first

        def current(self):
            return self.identity

        def subscribe(self, _):
            self.identity = second
            return lambda: None

    credentials = ServerCredentials(Hasty())
    assert credentials._state is not None
    assert credentials._state.not_after == second.svid.not_after.timestamp()
    assert credentials._take_fresh() is not None
    credentials.close()
