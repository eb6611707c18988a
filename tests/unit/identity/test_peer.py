import hashlib
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import PeerVerifier, SpiffeId, verify_peer
from ztserve.identity import peer as peer_module
from ztserve.testing import ThrowAwayAuthority

ME = "spiffe://td.example/ns/a/sa/b"
NOW = datetime.now(UTC)


def refusal(chain, bundles, now=None):
    with pytest.raises(Unauthenticated) as caught:
        verify_peer(chain, bundles, now=now or types.now())
    assert caught.value.public == "the peer's identity could not be verified"
    return caught.value.reason


def test_a_good_chain_gives_the_peer_it_proves(authority):
    svid = authority.issue(ME, ttl_s=600)
    peer = verify_peer(svid.chain_der, authority.bundles, now=types.now())
    assert type(peer.id) is SpiffeId
    assert (peer.id, peer.serial) == (ME, svid.serial)
    assert (peer.not_before, peer.not_after) == (svid.not_before, svid.not_after)
    assert peer.chain_sha256 == hashlib.sha256(svid.chain_der[0]).hexdigest()


def test_a_chain_through_an_intermediate_is_good_until_the_first_one_expires(authority):
    between = authority.intermediate("spiffe://td.example", ends_s=60)
    svid = between.forge(ME, ends_s=3600)
    peer = verify_peer(svid.chain_der, authority.bundles, now=types.now())
    assert len(svid.chain_der) == 2
    assert peer.not_after < svid.not_after
    late = types.now() + timedelta(seconds=90)
    assert "not valid at validation time" in refusal(
        svid.chain_der, authority.bundles, late
    ) or "expired" in refusal(svid.chain_der, authority.bundles, late)


@pytest.mark.parametrize(
    "flaws",
    [
        {"extended": None},
        {"dns": ["a.example"]},
        {"key": rsa.generate_private_key(65537, 2048)},
        {"key": ec.generate_private_key(ec.SECP384R1())},
    ],
    ids=["no extended key usage", "a DNS name", "RSA 2048", "EC P-384"],
)
def test_what_the_standard_allows_is_accepted(authority, flaws):
    svid = authority.forge(ME, **flaws)
    assert verify_peer(svid.chain_der, authority.bundles, now=types.now()).id == ME


BAD_LEAVES = {
    "two URIs": ({"uris": [ME, "spiffe://td.example/x"]}, "2 URI names"),
    "the same URI twice": ({"uris": [ME, ME]}, "2 URI names"),
    "no URI": ({"uris": [], "dns": ["a.example"]}, "0 URI names"),
    "no name at all": ({"uris": []}, "no SPIFFE ID"),
    "no path": ({"uris": ["spiffe://td.example"]}, "needs a path"),
    "a newline": ({"uris": [ME + "\n"]}, "control character"),
    "a URL": ({"uris": ["https://td.example/a"]}, "must begin with spiffe://"),
    "a CA": ({"ca": True}, "leaf is a CA"),
    "keyCertSign": (
        {"key_usage": ["digital_signature", "key_cert_sign"]},
        "leaf has keyCertSign",
    ),
    "cRLSign": ({"key_usage": ["digital_signature", "crl_sign"]}, "leaf has cRLSign"),
    "no digitalSignature": ({"key_usage": []}, "digitalSignature is not set"),
    "no key usage": ({"key_usage": None}, "no key usage"),
    "key usage not critical": ({"key_usage_critical": False}, "is not critical"),
    "only serverAuth": ({"extended": ["server"]}, "lacks serverAuth or clientAuth"),
    "only clientAuth": ({"extended": ["client"]}, "lacks serverAuth or clientAuth"),
    "expired": ({"starts_s": -90, "ends_s": -60}, "not valid at validation time"),
    "not yet valid": ({"starts_s": 60}, "not valid at validation time"),
    "empty subject": ({"no_subject": True}, "MUST be critical"),
    "RSA 1024": ({"key": rsa.generate_private_key(65537, 1024)}, "below the floor"),
    "EC P-224": ({"key": ec.generate_private_key(ec.SECP224R1())}, "below the floor"),
    "EC secp256k1": ({"key": ec.generate_private_key(ec.SECP256K1())}, "the floor"),
}


@pytest.mark.parametrize("name", BAD_LEAVES)
def test_a_bad_leaf_is_refused_with_the_reason(authority, name):
    flaws, message = BAD_LEAVES[name]
    chain = authority.forge(ME, **flaws).chain_der
    assert message in refusal(chain, authority.bundles)
    with pytest.raises(Unauthenticated, match=message):
        PeerVerifier(authority.bundles).verify(chain)


def test_a_workload_that_signs_makes_no_peer(authority):
    chain = authority.intermediate("spiffe://td.example/ns/a/sa/signer").forge(ME)
    reason = refusal(chain.chain_der, authority.bundles)
    assert "signed by spiffe://td.example/ns/a/sa/signer, a workload" in reason


def test_an_intermediate_needs_no_name(authority):
    chain = authority.intermediate().forge(ME).chain_der
    assert verify_peer(chain, authority.bundles, now=types.now()).id == ME


def test_a_trust_domain_without_bundle_or_with_an_empty_one_has_no_peers(authority):
    chain = authority.issue(ME).chain_der
    assert "no trust bundle for td.example" in refusal(chain, {})
    assert "0 roots" in refusal(chain, {"td.example": ()})


def test_a_missing_intermediate_and_a_wrong_order_are_refused(authority):
    leaf, between = authority.intermediate("spiffe://td.example").forge(ME).chain_der
    assert "no valid path" in refusal([leaf], authority.bundles)
    assert refusal([between, leaf], authority.bundles)


def test_chains_out_of_bounds_are_refused_before_they_are_parsed(authority):
    leaf = authority.issue(ME).chain_der[0]
    assert refusal([], authority.bundles) == "no certificate"
    assert "9 certificates, at most 8" in refusal([leaf] * 9, authority.bundles)
    assert "at most 65536" in refusal([leaf, b"\0" * 65536], authority.bundles)


@pytest.mark.parametrize("bytes_", [b"", b"\0", b"-----BEGIN CERTIFICATE-----"])
def test_bytes_that_are_no_certificate_are_refused(authority, bytes_):
    leaf = authority.issue(ME).chain_der[0]
    assert "malformed certificate" in refusal([bytes_], authority.bundles)
    assert "malformed certificate" in refusal([leaf, bytes_], authority.bundles)
    assert "malformed certificate" in refusal([leaf + b"\0"], authority.bundles)
    assert "trust bundle of td.example" in refusal([leaf], {"td.example": [bytes_]})


def test_time_may_be_seconds_or_an_aware_datetime(authority):
    svid = authority.issue(ME, ttl_s=60)
    verifier = PeerVerifier(authority.bundles)
    end = svid.not_after
    for moment in (end, end.timestamp(), end - timedelta(seconds=1)):
        assert verify_peer(svid.chain_der, authority.bundles, now=moment).id == ME
        assert verifier.verify(svid.chain_der, now=moment).id == ME
    for moment in (end + timedelta(milliseconds=1), end.timestamp() + 0.001):
        assert "expired" in refusal(svid.chain_der, authority.bundles, moment)
        with pytest.raises(Unauthenticated, match="expired"):
            verifier.verify(svid.chain_der, now=moment)
    with pytest.raises(ValueError, match="naive"):
        verify_peer(svid.chain_der, authority.bundles, now=end.replace(tzinfo=None))


def test_an_expired_root_vouches_for_nobody():
    past = ThrowAwayAuthority("td.example", clock=lambda: NOW - timedelta(days=400))
    svid = past.forge(ME, ends_s=500 * 86400)
    assert svid.not_after > NOW
    assert refusal(svid.chain_der, past.bundles, NOW)


def test_a_known_peer_is_judged_in_time_at_each_call(authority):
    svid = authority.issue(ME, ttl_s=60)
    verifier = PeerVerifier(authority.bundles)
    assert verifier.verify(svid.chain_der) is verifier.verify(list(svid.chain_der))
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify(svid.chain_der, now=types.now() + timedelta(seconds=90))
    with pytest.raises(Unauthenticated, match="not valid until"):
        verifier.verify(svid.chain_der, now=types.now() - timedelta(hours=1))
    assert verifier.verify(svid.chain_der).id == ME


def test_the_chain_is_walked_once_for_a_known_peer(authority, monkeypatch):
    svid = authority.issue(ME)
    verifier = PeerVerifier(authority.bundles)
    verifier.verify(svid.chain_der)
    monkeypatch.delattr(peer_module, "_walk")
    assert verifier.verify(svid.chain_der).id == ME


def test_a_refused_chain_is_never_remembered(authority):
    chain = authority.forge(ME, ca=True).chain_der
    verifier = PeerVerifier(authority.bundles)
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            verifier.verify(chain)
    assert not verifier._known


def test_the_memory_of_peers_is_bounded_and_forgets_the_least_used(authority):
    verifier = PeerVerifier(authority.bundles, capacity=2)
    first, second, third = (authority.issue(ME).chain_der for _ in range(3))
    for chain in (first, second, first, third):
        verifier.verify(chain)
    assert list(verifier._known) == [first, third]


def test_a_verifier_with_new_bundles_knows_nobody_of_old(authority):
    chain = authority.issue(ME).chain_der
    PeerVerifier(authority.bundles).verify(chain)
    successor = ThrowAwayAuthority("td.example")
    with pytest.raises(Unauthenticated, match="no valid path"):
        PeerVerifier(successor.bundles).verify(chain)
    both = {"td.example": authority.bundle + successor.bundle}
    assert PeerVerifier(both).verify(chain).id == ME


@pytest.mark.parametrize(
    ("bundles", "message"),
    [
        ({"td.example": ()}, "0 roots, expected 1 to 64"),
        ({"td.example": (b"x",)}, "trust bundle of td.example"),
        ({"spiffe://td.example": (b"x",)}, "SPIFFE ID"),
    ],
)
def test_a_verifier_is_not_made_of_bad_bundles(bundles, message):
    with pytest.raises(IdentityError, match=message):
        PeerVerifier(bundles)


@pytest.mark.slow
def test_one_verifier_serves_many_threads(authority):
    chains = [authority.issue(ME).chain_der for _ in range(8)]
    verifier = PeerVerifier(authority.bundles, capacity=4)
    wrong = []

    def work():
        for turn in range(200):
            peer = verifier.verify(chains[turn % 8])
            if peer.id != ME:
                wrong.append(peer)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(verifier._known) <= 4


AUTHORITY = ThrowAwayAuthority("td.example")
CHAIN = AUTHORITY.intermediate("spiffe://td.example").forge(ME).chain_der
VERIFIER = PeerVerifier(AUTHORITY.bundles)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 1),
    st.integers(0, 2000),
    st.integers(0, 3),
    st.binary(min_size=0, max_size=4),
)
def test_changed_bytes_give_the_same_peer_or_a_refusal(which, at, cut, put):
    broken = list(CHAIN)
    at %= len(broken[which])
    broken[which] = broken[which][:at] + put + broken[which][at + cut :]
    for verify in (
        lambda: verify_peer(broken, AUTHORITY.bundles, now=NOW),
        lambda: VERIFIER.verify(broken, now=NOW),
    ):
        try:
            assert verify().id == ME
        except Unauthenticated:
            assert broken != list(CHAIN)
        else:
            # Bytes of the leaf are all covered by its signature or compared with it.
            assert broken[0] == CHAIN[0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=10))
def test_any_bytes_at_all_are_refused_as_unauthenticated(chain):
    with pytest.raises(Unauthenticated):
        verify_peer(chain, AUTHORITY.bundles, now=NOW)
    with pytest.raises(Unauthenticated):
        VERIFIER.verify(chain, now=NOW)
