import pickle
import threading
import time
from datetime import timedelta
from itertools import pairwise

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import Authority, dns_name, verify_peer
from ztserve.identity.authority.rotation import Rotation
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.jwt.svid import verify_jwt_svid
from ztserve.testing import ThrowAwayAuthority

ME = "spiffe://td.example/ns/a/sa/b"
AUDIENCE = "spiffe://td.example/ns/a/sa/c"


class Clock:
    """A time that a test moves."""

    def __init__(self) -> None:
        self.now = types.now().replace(microsecond=0)

    def __call__(self):
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def accepts(bundle, svid, now) -> bool:
    try:
        return verify_peer(svid.chain_der, {"td.example": bundle}, now=now).id == ME
    except Unauthenticated:
        return False


def test_each_svid_has_its_own_key_and_serial(authority):
    one, other = authority.issue(ME), authority.issue(ME)
    assert one.serial != other.serial
    assert one.key.public_key() != other.key.public_key()
    assert isinstance(one.key.curve, ec.SECP256R1)


def test_an_svid_bears_one_uri_the_derived_dns_name_and_no_common_name(authority):
    leaf = x509.load_der_x509_certificate(authority.issue(ME).chain_der[0])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [ME]
    assert names.get_values_for_type(x509.DNSName) == [dns_name(ME)]
    assert not leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)


def test_the_derived_dns_name_is_one_label_under_a_name_that_cannot_exist():
    name = dns_name(ME)
    label, rest = name.split(".", 1)
    assert rest == "svid.invalid"
    assert len(label) == 52
    assert name == name.lower() != dns_name(ME.upper())


def test_an_svid_lives_as_long_as_asked_and_no_longer_than_the_root():
    clock = Clock()
    old = Authority("td.example", clock=clock)
    root = old.bundle[0]
    clock.forward(364 * 86400 + 23 * 3600)
    svid = old.issue(ME, ttl_s=86400)
    assert svid.not_after == x509.load_der_x509_certificate(root).not_valid_after_utc
    fresh = Authority("td.example").issue(ME, ttl_s=60)
    assert 59 < (fresh.not_after - types.now()).total_seconds() <= 61


@pytest.mark.parametrize(
    ("spiffe_id", "ttl_s", "message"),
    [
        ("spiffe://other/a", 60, "is not of td.example"),
        ("spiffe://td.example", 60, "needs a path"),
        ("td.example/a", 60, "must begin with"),
        (ME, 0, "expected 1 to 86400"),
        (ME, 86401, "expected 1 to 86400"),
        (ME, float("nan"), "expected 1 to 86400"),
    ],
)
def test_what_an_authority_may_not_issue_is_refused(
    authority, spiffe_id, ttl_s, message
):
    with pytest.raises(IdentityError, match=message):
        Authority.issue(authority, spiffe_id, ttl_s=ttl_s)


def test_an_authority_needs_a_trust_domains_name():
    with pytest.raises(IdentityError, match="bare name"):
        Authority("td/a")


def test_x9_a_root_is_a_trust_domains_own_certificate_that_signs_leaves_only():
    root = x509.load_der_x509_certificate(Authority("td.example").bundle[0])
    get = root.extensions.get_extension_for_class
    names = get(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        "spiffe://td.example"
    ]
    assert get(x509.BasicConstraints).value.path_length == 0
    usage = get(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature


def test_a_throw_away_source_trusts_its_own_and_the_federated():
    ours, theirs = ThrowAwayAuthority("a.example"), ThrowAwayAuthority("b.example")
    source = ours.source("spiffe://a.example/x", federated=theirs.bundles)
    bundles = source.current().bundles
    stranger = theirs.issue("spiffe://b.example/y")
    assert verify_peer(stranger.chain_der, bundles, now=types.now()).id == stranger.id


def test_a_forged_source_shows_even_what_expired(authority):
    source = authority.forged_source(ME, starts_s=-90, ends_s=-60)
    assert source.current().svid.not_after < types.now()
    source.subscribe(lambda: None)()


# --- rotation -------------------------------------------------------------------


def test_a_root_rolls_over_without_a_gap():
    clock = Clock()
    authority = Authority("td.example", clock=clock, overlap_s=100)
    first = authority.bundle
    before = authority.issue(ME, ttl_s=600)
    authority.roll()
    both = authority.bundle
    assert both[:1] == first
    assert len(both) == 2
    clock.forward(99)
    early = authority.issue(ME, ttl_s=600)
    assert accepts(first, early, clock.now)  # whoever missed the news still follows
    clock.forward(1)
    late = authority.issue(ME, ttl_s=600)
    assert not accepts(first, late, clock.now)
    assert all(accepts(both, svid, clock.now) for svid in (before, early, late))
    assert set(authority.bundle) == set(both)
    clock.forward(599)  # `early`, the last one of the old root, ends now
    assert authority.advance() == 0
    assert accepts(authority.bundle, early, clock.now)
    clock.forward(0.001)
    authority.advance()
    assert authority.bundle == both[1:]
    assert accepts(authority.bundle, late, clock.now)


def test_a_second_rollover_waits_for_the_first():
    clock = Clock()
    authority = Authority("td.example", clock=clock, overlap_s=100)
    authority.roll()
    with pytest.raises(IdentityError, match="a rollover is under way: the next key si"):
        authority.roll()
    clock.forward(100)
    authority.advance()
    authority.roll()
    assert len(authority.bundle) == 2  # the first root never signed: it is gone


def test_a_root_is_replaced_at_half_of_its_life_by_itself():
    clock = Clock()
    authority = Authority(
        "td.example", clock=clock, root_ttl_s=4000, jwt_key_ttl_s=86400, overlap_s=100
    )
    roots = {authority.bundle[0]}
    for _ in range(100):
        svid = authority.issue(ME, ttl_s=200)
        assert (svid.not_after - clock.now).total_seconds() == 200
        assert accepts(authority.bundle, svid, clock.now)
        roots |= set(authority.bundle)
        assert len(authority.bundle) <= 2
        clock.forward(100)
    assert len(roots) == 5  # at 2000, 4000, 6000 and 8000 s


def test_an_authority_that_was_not_tended_never_signs_with_an_expired_root():
    clock = Clock()
    authority = Authority(
        "td.example", clock=clock, root_ttl_s=4000, jwt_key_ttl_s=86400, overlap_s=100
    )
    clock.forward(4001)
    svid = authority.issue(ME, ttl_s=60)
    assert accepts(authority.bundle, svid, clock.now)


def test_x9_intermediates_sign_leaves_and_rotate():
    clock = Clock()
    authority = Authority("td.example", clock=clock, intermediate_ttl_s=1000)
    seen = {}
    for _ in range(20):
        svid = authority.issue(ME, ttl_s=500)
        assert accepts(authority.bundle, svid, clock.now)
        assert (svid.not_after - clock.now).total_seconds() == 500  # never cut short
        _, between = svid.chain_der
        seen[between] = x509.load_der_x509_certificate(between)
        clock.forward(100)
    assert 3 <= len(seen) <= 5
    for certificate in seen.values():
        get = certificate.extensions.get_extension_for_class
        uris = get(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.UniformResourceIdentifier
        )
        assert uris == ["spiffe://td.example"]
        assert get(x509.BasicConstraints).value.path_length == 0
    assert len(authority.bundle) == 1  # others need to know roots only


def test_a_new_root_takes_a_new_intermediate():
    clock = Clock()
    authority = Authority(
        "td.example", clock=clock, intermediate_ttl_s=1000, overlap_s=10
    )
    authority.roll()
    clock.forward(10)
    svid = authority.issue(ME, ttl_s=60)
    assert accepts(authority.bundle[:1], svid, clock.now)


def test_lives_that_do_not_fit_each_other_are_refused():
    with pytest.raises(IdentityError, match="overlap_s is 300, expected 0 to 250"):
        Authority("td.example", root_ttl_s=1000, overlap_s=300)
    for ttl_s in (0, 1, 251, float("nan")):
        with pytest.raises(IdentityError, match=r"intermediate_ttl_s is .*2 to 250"):
            Authority(
                "td.example", root_ttl_s=1000, overlap_s=1, intermediate_ttl_s=ttl_s
            )
    authority = Authority("td.example", intermediate_ttl_s=1000)
    with pytest.raises(IdentityError, match="ttl_s is 501, expected 1 to 500"):
        authority.issue(ME, ttl_s=501)


# --- what others are told ---------------------------------------------------------


def test_b6_the_sequence_grows_with_each_change_and_across_a_restart():
    clock = Clock()
    authority = Authority("td.example", clock=clock, overlap_s=0.5)
    bundles = [authority.trust_bundle()]
    for _ in range(3):  # several changes in one second
        authority.roll()
        bundles.append(authority.trust_bundle())
        clock.forward(0.5)
        authority.advance()
        bundles.append(authority.trust_bundle())
    sequences = [bundle.sequence for bundle in bundles]
    assert sequences == sorted(sequences)
    for one, other in pairwise(bundles):
        same = one.x509_authorities == other.x509_authorities
        assert same or one.sequence < other.sequence
    clock.forward(10)
    assert Authority("td.example", clock=clock).trust_bundle().sequence > sequences[-1]


def test_b7_a_bundle_tells_its_refresh_hint_and_survives_the_wire():
    bundle = Authority("td.example", refresh_hint_s=30).trust_bundle()
    assert bundle.refresh_hint_s == 30
    assert TrustBundle.parse(bundle.jwks(), "td.example") == bundle


def test_subscribers_are_told_of_each_change_and_of_nothing_else():
    clock = Clock()
    authority = Authority("td.example", clock=clock, overlap_s=10)
    told = []
    end = authority.subscribe(lambda: told.append(authority.trust_bundle().sequence))

    def broken():
        raise RuntimeError("a listener of the test's that fails")

    authority.subscribe(broken)
    authority.issue(ME)
    assert told == []
    authority.roll()
    assert told == [authority.trust_bundle().sequence]
    end()
    clock.forward(3602)
    authority.advance()
    assert len(told) == 1


@pytest.mark.slow
def test_a_started_authority_rotates_by_itself():
    with Authority("td.example", overlap_s=0.2) as authority:
        old = authority.bundle[0]
        time.sleep(0.05)  # it sleeps by now, for minutes
        changed = threading.Event()
        authority.roll()
        authority.subscribe(changed.set)
        assert changed.wait(2)
        assert old not in authority.bundle


# --- JWT-SVIDs --------------------------------------------------------------------


def judged(authority, token, now):
    bundle = authority.trust_bundle()
    keys = {bundle.trust_domain: bundle.jwt_authorities}
    return verify_jwt_svid(token, keys, audience=AUDIENCE, now=now)


def test_j8_a_jwt_svid_is_found_by_the_key_id_in_the_bundle():
    authority = Authority("td.example")
    svid = authority.issue_jwt(ME, [AUDIENCE], ttl_s=60)
    assert judged(authority, svid.token, types.now()).id == ME
    assert svid.key_id in authority.trust_bundle().jwt_authorities


def test_b4_the_key_of_jwt_svids_is_rotated_without_a_gap():
    clock = Clock()
    authority = Authority("td.example", clock=clock, jwt_key_ttl_s=4000, overlap_s=100)
    tokens, most = {}, 0
    for _ in range(60):
        fresh = authority.issue_jwt(ME, [AUDIENCE], ttl_s=200)
        tokens[fresh.token] = fresh
        for svid in tokens.values():
            if svid.expires_at > clock.now:
                assert judged(authority, svid.token, clock.now).id == ME
        most = max(most, len(authority.trust_bundle().jwt_authorities))
        clock.forward(100)
    assert most == 2
    assert len({svid.key_id for svid in tokens.values()}) == 3


@pytest.mark.parametrize(
    ("spiffe_id", "audience", "ttl_s", "message"),
    [
        ("spiffe://other/a", [AUDIENCE], 60, "is not of td.example"),
        ("spiffe://td.example", [AUDIENCE], 60, "needs a path"),
        (ME, [AUDIENCE], 3601, "ttl_s is 3601, expected 1 to 3600"),
        (ME, [AUDIENCE], float("nan"), "expected 1 to 3600"),
        (ME, [], 60, "an audience is required"),
    ],
)
def test_a_jwt_svid_that_may_not_be_issued_is_refused(
    spiffe_id, audience, ttl_s, message
):
    with pytest.raises(IdentityError, match=message):
        Authority("td.example").issue_jwt(spiffe_id, audience, ttl_s=ttl_s)


def test_the_keys_are_never_shown_nor_pickled():
    authority = Authority("td.example", intermediate_ttl_s=7200)
    authority.issue(ME)
    assert "PRIVATE" not in repr(vars(authority))
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(authority)


def test_a_rotation_keeps_nothing_of_the_old_keys():
    now = types.now()
    rotation = Rotation(lambda _: object(), life_s=1000, overlap_s=0, now=now)
    old = rotation.current
    rotation.signed(now + timedelta(seconds=60))
    rotation.roll(now)
    assert rotation.advance(now) is False  # the same two, in another order
    assert rotation.current is not old
    assert rotation.advance(now + timedelta(seconds=61)) is True
    assert old not in rotation.published
