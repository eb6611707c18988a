from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import Authority, dns_name, verify_peer
from ztserve.testing import ThrowAwayAuthority

ME = "spiffe://td.example/ns/a/sa/b"


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
    then = types.now() - timedelta(days=364, hours=23)
    old = Authority("td.example", clock=types.now)
    old._clock = lambda: then
    old._root = old._make_root()
    old._clock = types.now
    svid = old.issue(ME, ttl_s=86400)
    assert svid.not_after == old._root.not_valid_after_utc
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


def test_a_root_is_a_trust_domains_own_certificate_that_signs_leaves_only():
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
