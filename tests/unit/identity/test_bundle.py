import base64
import json
from dataclasses import replace

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from spiffe import JwtBundle, TrustDomain

from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import TrustBundle, parse_bundle_map, verify_peer
from ztserve.identity.bundle import (
    MAX_BUNDLE_MAP_BYTES,
    MAX_JWKS_BYTES,
    newer,
    read_authority,
)
from ztserve.identity.jwk import base64url_encode, key_members
from ztserve.testing import ThrowAwayAuthority

TD = "td.example"
ME = f"spiffe://{TD}/ns/a/sa/b"
A, OTHER = ThrowAwayAuthority(TD), ThrowAwayAuthority(TD)
ROOT, OTHER_ROOT = A.bundle[0], OTHER.bundle[0]
KEY = ec.generate_private_key(ec.SECP256R1()).public_key()


@pytest.fixture(scope="module")
def rsa_key():
    return rsa.generate_private_key(65537, 2048).public_key()


def parse(*entries, **more):
    """Parse a JWK Set of `entries`, each a dict."""
    document = {"keys": list(entries), **more}
    return TrustBundle.parse(json.dumps(document).encode(), TD)


def x509_entry(*ders, **more):
    x5c = [base64.b64encode(der).decode() for der in ders]
    return {"kty": "EC", "use": "x509-svid", "x5c": x5c, **more}


def jwt_entry(kid="k", key=KEY, **more):
    return {"use": "jwt-svid", "kid": kid, **key_members(key), **more}


def entries(bundle):
    return json.loads(bundle.jwks())["keys"]


# --- the standard, id by id -----------------------------------------------------


def test_b1_no_keys_means_that_all_svids_are_refused():
    bundle = parse()
    assert (bundle.x509_authorities, dict(bundle.jwt_authorities)) == ((), {})
    with pytest.raises(Unauthenticated):
        verify_peer(
            A.issue(ME).chain_der, {TD: bundle.x509_authorities}, now=types.now()
        )


@pytest.mark.parametrize("document", [{}, {"keys": None}, {"keys": {}}])
def test_b1_keys_must_be_there(document):
    with pytest.raises(IdentityError, match=r"td.example: expected .* array `keys`"):
        TrustBundle.parse(json.dumps(document).encode(), TD)


@pytest.mark.parametrize(
    "change",
    [
        {"kty": "OKP"},
        {"kty": "oct", "k": "c2VjcmV0"},
        {"kty": "ec"},
        {"kty": None},
        {"kty": ["EC"]},
        {"use": "sig"},
        {"use": "JWT-SVID"},
        {"use": None},
        {"use": {}},
        {"crv": "secp256k1"},
        {"crv": None},
    ],
    ids=str,
)
def test_b2_an_entry_of_unknown_type_or_use_is_ignored(change):
    unknown = {
        name: value
        for name, value in {**jwt_entry(), **change}.items()
        if value is not None
    }
    bundle = parse(unknown, jwt_entry("good"), x509_entry(ROOT))
    assert list(bundle.jwt_authorities) == ["good"]
    assert bundle.x509_authorities == (ROOT,)


def test_b3_each_certificate_is_published_alone_and_without_a_key_id():
    bundle = TrustBundle(TD, (ROOT, OTHER_ROOT), {})
    published = entries(bundle)
    assert [base64.b64decode(*entry["x5c"]) for entry in published] == [
        ROOT,
        OTHER_ROOT,
    ]
    for entry in published:
        assert entry["use"] == "x509-svid"
        assert "kid" not in entry


@pytest.mark.parametrize("x5c", [None, []])
def test_b3_an_entry_without_a_certificate_is_ignored(x5c):
    bundle = parse({"kty": "EC", "use": "x509-svid", "x5c": x5c}, x509_entry(ROOT))
    assert bundle.x509_authorities == (ROOT,)


def test_b3_only_the_first_certificate_of_an_entry_counts():
    assert parse(x509_entry(ROOT, OTHER_ROOT)).x509_authorities == (ROOT,)
    assert parse(x509_entry(ROOT, b"nonsense")).x509_authorities == (ROOT,)


def test_b4_keys_of_jwt_svids_are_published_with_their_key_ids():
    bundle = TrustBundle(TD, (), {"one": KEY, "two": KEY})
    assert [entry["kid"] for entry in entries(bundle)] == ["one", "two"]


@pytest.mark.parametrize("kid", [None, 1, ""])
def test_b4_a_key_of_jwt_svids_without_a_key_id_is_refused(kid):
    with pytest.raises(IdentityError, match=r"td.example.*(needs a `kid`|key ID of 0)"):
        parse(jwt_entry(kid))


def test_b5_only_keys_for_jwt_svids_become_their_authorities():
    own = read_authority(ROOT, "root").public_key()
    bundle = parse(x509_entry(ROOT, **jwt_entry("root", own) | x509_entry(ROOT)))
    assert bundle.x509_authorities == (ROOT,)
    assert dict(bundle.jwt_authorities) == {}


def test_b6_a_newer_bundle_takes_the_place_of_an_older_one():
    held, later = TrustBundle(TD, (ROOT,), {}, 4), TrustBundle(TD, (), {}, 5)
    assert newer(held, later) is later
    again = replace(held, refresh_hint_s=60)
    assert newer(held, again) is again
    uncounted = replace(held, sequence=None)
    assert newer(uncounted, uncounted) is uncounted
    assert newer(uncounted, held) is held


@pytest.mark.parametrize(
    ("fetched", "message"),
    [
        (TrustBundle(TD, (ROOT,), {}, 3), "sequence 3 after 4: an old bundle was"),
        (TrustBundle(TD, (ROOT,), {}), "sequence None after 4"),
        (TrustBundle(TD, (OTHER_ROOT,), {}, 4), "other authorities under the same"),
        (TrustBundle(TD, (ROOT,), {"k": KEY}, 4), "other authorities under the same"),
    ],
)
def test_b6_a_sequence_that_does_not_grow_is_refused(fetched, message):
    with pytest.raises(IdentityError, match=message):
        newer(TrustBundle(TD, (ROOT,), {}, 4), fetched)


@pytest.mark.parametrize("name", ["spiffe_sequence", "spiffe_refresh_hint"])
def test_b6_b7_sequence_and_refresh_hint_are_whole_numbers_of_64_bits(name):
    for value in (0, 300, 2**64 - 1):
        bundle = parse(**{name: value})
        assert value in (bundle.sequence, bundle.refresh_hint_s)
        assert json.loads(bundle.jwks())[name] == value
    for wrong in (-1, 2**64, 1.0, "300", True, [300]):
        with pytest.raises(IdentityError, match=f"{name}: expected a whole number"):
            parse(**{name: wrong})


def test_b7_without_a_refresh_hint_there_is_none():
    assert parse().refresh_hint_s is None
    assert "spiffe_refresh_hint" not in json.loads(parse().jwks())


def test_b8_members_that_the_standard_does_not_name_are_tolerated():
    bundle = parse(
        x509_entry(ROOT, note=1, kid="ignored"),
        jwt_entry(alg="ES256", key_ops=["verify"]),
        comment={"a": [1]},
    )
    assert bundle == TrustBundle(TD, (ROOT,), {"k": KEY})


def bundle_map(**domains):
    return json.dumps({"trust_domains": domains}).encode()


def test_b9_a_bundle_map_holds_each_trust_domains_own_bundle():
    assert parse_bundle_map(bundle_map()) == {}
    data = json.dumps(
        {
            "trust_domains": {
                "a.example": {"keys": [x509_entry(ROOT)], "spiffe_sequence": 3},
                "b.example": {"keys": [jwt_entry()]},
            }
        }
    ).encode()
    assert parse_bundle_map(data) == {
        "a.example": TrustBundle("a.example", (ROOT,), {}, 3),
        "b.example": TrustBundle("b.example", (), {"k": KEY}),
    }


@pytest.mark.parametrize("twice", [b"a.example", rb"\u0061.example"])
def test_b9_a_trust_domain_that_occurs_twice_is_refused(twice):
    data = b'{"trust_domains":{"a.example":{"keys":[]},"%b":{"keys":[]}}}' % twice
    with pytest.raises(IdentityError, match=r"bundle map: .*a name occurs twice"):
        parse_bundle_map(data)


def test_b9_a_refresh_hint_within_a_map_is_ignored():
    bundles = parse_bundle_map(bundle_map(a={"keys": [], "spiffe_refresh_hint": 1}))
    assert bundles["a"].refresh_hint_s is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{}", "bundle map: expected an object `trust_domains`"),
        (b'{"trust_domains":[]}', "bundle map: expected an object `trust_domains`"),
        (b"[]", "bundle map: expected a JSON object"),
        (bundle_map(A={"keys": []}), "a trust domain has only lower-case"),
        (bundle_map(**{"a/b": {"keys": []}}), "expected the bare name"),
        (bundle_map(a=[]), "bundle map: trust bundle of a: expected an object"),
        (bundle_map(a={}, b={"keys": []}), "trust bundle of a: expected an object"),
        (bundle_map(**{f"d{n}": {"keys": []} for n in range(65)}), "65 trust domains"),
        (b" " * (MAX_BUNDLE_MAP_BYTES + 1), "1048577 bytes, at most 1048576"),
    ],
)
def test_b9_a_map_that_is_not_in_order_is_refused_whole(data, message):
    with pytest.raises(IdentityError, match=message):
        parse_bundle_map(data)


def test_f1_bundles_of_two_trust_domains_are_never_merged():
    ours, theirs = TrustBundle(TD, (ROOT,), {}), TrustBundle("b.example", (), {})
    with pytest.raises(IdentityError, match=r"cannot be replaced by b.example's"):
        newer(ours, theirs)


def test_f2_a_bundle_bears_the_name_of_its_trust_domain():
    assert parse().trust_domain == TD
    again = TrustBundle.parse(TrustBundle(TD, (ROOT,), {}).jwks(), TD)
    assert again.trust_domain == TD


def test_f7_the_name_is_known_beforehand_and_never_taken_from_the_document():
    assert parse(trust_domain="b.example", sub="b.example").trust_domain == TD
    for wrong in ("", "B.example", "spiffe://b.example", "b/c", "b\n", "b" * 256):
        with pytest.raises(IdentityError, match="SPIFFE ID"):
            TrustBundle.parse(b'{"keys":[]}', wrong)
        with pytest.raises(IdentityError, match="SPIFFE ID"):
            TrustBundle(wrong, (), {})


def test_x9_only_what_may_sign_is_an_authority():
    root = OTHER.intermediate().forge(ME).chain_der[1]  # a CA without a SPIFFE ID
    for good in (
        ROOT,
        root,
        OTHER.intermediate(f"spiffe://{TD}").forge(ME).chain_der[1],
    ):
        assert TrustBundle(TD, (good,), {}).x509_authorities == (good,)


@pytest.mark.parametrize(
    ("certificate", "message"),
    [
        (A.issue(ME).chain_der[0], "is not a CA"),
        (A.forge(ME, ca=True).chain_der[0], r"may not sign .*\(keyCertSign\)"),
        (A.forge(ME, ca=True, key_usage=None).chain_der[0], "may not sign"),
        (
            A.forge(ME, ca=True, key_usage=["key_cert_sign"]).chain_der[0],
            "ns/a/sa/b is a workload, not a trust domain",
        ),
        (
            A.intermediate(ME).forge(ME).chain_der[1],
            "is a workload, not a trust domain",
        ),
        (
            A.intermediate("spiffe://a", "spiffe://b").forge(ME).chain_der[1],
            "2 URI names, at most one",
        ),
        (A.intermediate("https://a").forge(ME).chain_der[1], "must begin with spiffe"),
        (
            A.forge(
                "spiffe://a",
                ca=True,
                key_usage=["key_cert_sign"],
                key_usage_critical=False,
            ).chain_der[0],
            "key usage is not critical",
        ),
        (b"\x30\0", "malformed certificate"),
        (b"", "malformed certificate"),
        (ROOT + b"\0", "malformed certificate"),
    ],
)
def test_x9_x10_what_may_not_sign_is_refused_by_name(certificate, message):
    where = "trust bundle of td.example: X.509 authority 1: "
    with pytest.raises(IdentityError, match=where + ".*" + message):
        TrustBundle(TD, (ROOT, certificate), {})
    with pytest.raises(IdentityError, match=where + ".*" + message):
        parse(x509_entry(ROOT), x509_entry(certificate))


# --- keys -----------------------------------------------------------------------


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_ec_keys_come_back_as_they_were(curve):
    # Some coordinates begin with zeros, which count.
    for _ in range(8 if curve is ec.SECP521R1 else 2):
        key = ec.generate_private_key(curve()).public_key()
        assert parse(jwt_entry(key=key)).jwt_authorities["k"] == key


def test_a_bundle_comes_back_as_it_was(rsa_key):
    bundle = TrustBundle(
        TD, (ROOT, OTHER_ROOT, ROOT), {"ec": KEY, "rsa": rsa_key}, 7, 60
    )
    assert bundle.x509_authorities == (ROOT, OTHER_ROOT)  # each once
    assert TrustBundle.parse(bundle.jwks(), TD) == bundle


def test_others_read_what_we_publish(rsa_key):
    jwks = TrustBundle(TD, (), {"ec": KEY, "rsa": rsa_key}, 7, 60).jwks()
    keys = {one.key_id: one.key for one in jwt.PyJWKSet.from_json(jwks.decode()).keys}
    assert keys == {"ec": KEY, "rsa": rsa_key}
    theirs = JwtBundle.parse(TrustDomain(TD), jwks)
    assert theirs.get_jwt_authority("rsa") == rsa_key


def numbers(modulus, exponent):
    return {
        "n": base64url_encode(modulus.to_bytes((modulus.bit_length() + 7) // 8)),
        "e": base64url_encode(exponent.to_bytes((exponent.bit_length() + 7) // 8)),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x: expected a text in base64url"),
        ({"x": "A" * 43}, "[Ii]nvalid|not on"),
        ({"x": "AAAA"}, "x and y: expected 32 bytes each"),
        ({"x": key_members(KEY)["x"] + "="}, "not base64url"),
        ({"x": key_members(KEY)["x"][:-1] + "/"}, "not base64url"),
        ({"x": "A" * 42 + "B"}, "canonical form"),
        ({"x": "A" * 4096}, "x: expected a text in base64url"),
        ({"d": "AAAA"}, "holds a private key: all who read it can sign"),
        ({"kty": "RSA"}, "n: expected a text in base64url"),
        ({"kty": "RSA", **numbers(2**1023 + 1, 65537)}, "below the floor"),
        ({"kty": "RSA", **numbers(2**8200 + 1, 65537)}, "too costly"),
        ({"kty": "RSA", **numbers(2**2047 + 1, 2**33 + 1)}, "too costly"),
        ({"kty": "RSA", **numbers(2**2047 + 1, 2)}, "e must be|odd"),
        ({"kid": "k" * 256}, "key ID of 256 characters, expected 1 to 255"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_key_that_does_not_hold_is_refused(change, message):
    with pytest.raises(IdentityError, match=message) as caught:
        parse({**jwt_entry(), **change})
    assert str(caught.value).startswith("trust bundle of td.example: ")


def test_one_key_id_for_two_keys_is_refused():
    with pytest.raises(IdentityError, match=r"keys\[1\]: kid 'k' is another key's"):
        parse(jwt_entry(), jwt_entry())


def test_a_key_of_a_type_that_signs_no_svid_is_refused():
    foreign = ed25519.Ed25519PrivateKey.generate().public_key()
    with pytest.raises(IdentityError, match="JWT authority 'k': key below the floor"):
        TrustBundle(TD, (), {"k": foreign})


def test_a_bundle_cannot_be_changed():
    keys = {"k": KEY}
    bundle = TrustBundle(TD, (), keys)
    keys["other"] = KEY
    assert list(bundle.jwt_authorities) == ["k"]
    with pytest.raises(TypeError):
        bundle.jwt_authorities["other"] = KEY


# --- bounds ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jwks", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b"1" * 5000, "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"keys":[],"keys":[]}', "a name occurs twice in one object"),
        (b'{"keys":[{"use":"a","use":"b"}]}', "a name occurs twice in one object"),
        (b'{"keys":[NaN]}', "NaN is not JSON"),
        (b'{"keys":[]} x', "not JSON"),
        ('{"keys":[]}'.encode("utf-16"), "not JSON"),
        (b'{"keys":[1]}', r"keys\[0\]: expected an object"),
        (b'{"keys":[' + b"{}," * 256 + b"{}]}", "257 keys, at most 256"),
        (b" " * (MAX_JWKS_BYTES + 1), "262145 bytes, at most 262144"),
        (
            b'{"keys":[{"kty":"EC","use":"x509-svid","x5c":"MII="}]}',
            "x5c: expected an array",
        ),
        (b'{"keys":[{"kty":"EC","use":"x509-svid","x5c":[1]}]}', "x5c: expected an"),
        (b'{"keys":[{"kty":"EC","use":"x509-svid","x5c":["*"]}]}', "x5c: not base64"),
        (b'{"keys":[{"kty":"EC","use":"x509-svid","x5c":["\xc3\xa9"]}]}', "not base64"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_document_out_of_order_or_bounds_is_refused(jwks, message):
    with pytest.raises(IdentityError, match=message) as caught:
        TrustBundle.parse(jwks, TD)
    assert str(caught.value).startswith("trust bundle of td.example: ")


def test_too_many_authorities_are_refused():
    with pytest.raises(IdentityError, match="65 authorities of one kind, at most 64"):
        parse(*(jwt_entry(f"k{n}") for n in range(65)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)
    ),
    max_leaves=6,
)
members = st.fixed_dictionaries(
    {},
    optional={
        name: st.sampled_from([*sample, "", "A" * 43]) | json_values
        for name, sample in {
            "kty": ["EC", "RSA"],
            "use": ["x509-svid", "jwt-svid"],
            "kid": ["k"],
            "crv": ["P-256", "P-384"],
            "x": [key_members(KEY)["x"]],
            "y": [key_members(KEY)["y"]],
            "n": ["_" * 342],
            "e": ["AQAB"],
            "x5c": [[base64.b64encode(ROOT).decode()], ["MIIB"]],
        }.items()
    },
)


def assert_total(data):
    for read in (lambda: TrustBundle.parse(data, TD), lambda: parse_bundle_map(data)):
        try:
            value = read()
        except IdentityError:
            continue
        if isinstance(value, TrustBundle):
            assert TrustBundle.parse(value.jwks(), TD) == value


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(members, max_size=4), json_values, st.booleans())
def test_any_document_gives_a_bundle_or_the_named_error(keys, more, as_map):
    bundle = {"keys": keys, "spiffe_sequence": more, "spiffe_refresh_hint": more}
    document = {"trust_domains": {TD: bundle}} if as_map else bundle
    assert_total(json.dumps(document).encode())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_give_a_bundle_or_the_named_error(data):
    good = bytearray(TrustBundle(TD, (ROOT,), {"k": KEY}, 1, 2).jwks())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    assert_total(bytes(good))
    assert_total(data.draw(st.binary()))
