import base64
import json
import pickle
import threading
from datetime import UTC, datetime
from functools import cache

import jwt
import pytest
import spiffe
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve.errors import IdentityError, Overloaded, Unauthenticated
from ztserve.identity import (
    JwtSvid,
    ReplayWindow,
    TrustBundle,
    bearer_token,
    sign_jwt_svid,
    verify_jwt_svid,
)
from ztserve.identity.jwk import base64url_encode
from ztserve.identity.jwt.jws import ALGORITHMS, sign

TD, US = "td.example", "spiffe://td.example/ns/a/sa/us"
ME = "spiffe://td.example/ns/a/sa/me"
NOW = 1_800_000_000.0
KEY = ec.generate_private_key(ec.SECP256R1())
BUNDLES = {TD: {"k": KEY.public_key()}, "b.example": {}}
CLAIMS = {"sub": ME, "aud": [US], "iat": NOW, "exp": NOW + 60}


@cache
def key_for(algorithm):
    curves = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}
    if algorithm in curves:
        return ec.generate_private_key(curves[algorithm]())
    return (
        key_for("RSA") if algorithm != "RSA" else rsa.generate_private_key(65537, 2048)
    )


def compact(header, claims, signature):
    """What is not text is made JSON."""
    parts = (
        part if isinstance(part, str) else json.dumps(part) for part in (header, claims)
    )
    signed = ".".join(base64url_encode(part.encode()) for part in parts)
    return f"{signed}.{base64url_encode(signature(signed.encode()))}"


def token(header=None, claims=None, *, key=KEY, algorithm="ES256", without=()):
    """A token with anything in it, truly signed."""
    header = {"alg": algorithm, "kid": "k", "typ": "JWT"} | (header or {})
    claims = CLAIMS | (claims or {})
    for name in without:
        header.pop(name, None)
        claims.pop(name, None)
    return compact(header, claims, lambda signed: sign(algorithm, key, signed))


def verify(text, *, bundles=BUNDLES, audience=US, now=NOW):
    return verify_jwt_svid(text, bundles, audience=audience, now=now)


def assert_refused(text, message, **more):
    with pytest.raises(Unauthenticated, match=message) as caught:
        verify(text, **more)
    assert caught.value.public == "the peer's identity could not be verified"
    assert text not in caught.value.reason


def issue(**more):
    parts = {"key": KEY, "key_id": "k", "now": NOW, "ttl_s": 60.0} | more
    return sign_jwt_svid(parts.pop("id", ME), parts.pop("audience", [US]), **parts)


def header_of(text):
    return jwt.get_unverified_header(text)


# --- the way there and back -----------------------------------------------------


def test_what_we_sign_we_verify():
    signed = issue()
    assert verify(signed.token) == signed
    assert signed == JwtSvid(
        token=signed.token,
        id=ME,
        audience=(US,),
        issued_at=datetime.fromtimestamp(NOW, UTC),
        expires_at=datetime.fromtimestamp(NOW + 60, UTC),
        key_id="k",
    )


def test_no_two_tokens_are_the_same():
    assert issue().token.rpartition(".")[0] != issue().token.rpartition(".")[0]


def test_a_token_lives_as_long_as_it_was_asked_to_rounded_up():
    at = datetime.fromtimestamp(NOW + 0.25, UTC)
    for ttl_s, expected in ((1, 2), (1.5, 2), (60, 61), (3600, 3600)):
        signed = issue(now=at, ttl_s=ttl_s)
        assert signed.expires_at.timestamp() == NOW + expected
        assert verify(signed.token, now=at) == signed


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"audience": []}, "an audience is required"),
        ({"audience": [""]}, "an audience is required"),
        ({"audience": US}, "an audience is required"),
        ({"audience": ["a" * 7000]}, "bytes, at most 8192"),
        ({"id": "spiffe://td.example"}, "needs a path"),
        ({"ttl_s": 0.5}, "ttl_s is 0.5, expected 1 to 3600"),
        ({"ttl_s": 3601}, "ttl_s is 3601, expected 1 to 3600"),
        ({"ttl_s": float("nan")}, "ttl_s is nan"),
        ({"algorithm": "HS256"}, "alg 'HS256' is not for this EC key"),
        ({"algorithm": "ES384"}, "alg 'ES384' is not for this EC key"),
        ({"algorithm": "RS256"}, "alg 'RS256' is not for this EC key"),
        (
            {"algorithm": "ES256", "key": key_for("RSA")},
            "alg 'ES256' is not for this RSA",
        ),
    ],
)
def test_what_cannot_be_signed_is_refused(parts, message):
    with pytest.raises(IdentityError, match=message):
        issue(**parts)


def test_a_token_is_neither_shown_nor_pickled():
    signed = issue()
    assert signed.token not in repr(signed)
    assert "token" not in repr(signed)
    with pytest.raises(IdentityError, match="as good as a password"):
        pickle.dumps(signed)


def test_a_moment_without_time_zone_and_no_audience_are_the_callers_mistakes():
    with pytest.raises(ValueError, match="naive"):
        verify(issue().token, now=datetime(2027, 1, 1))
    with pytest.raises(ValueError, match="audience: expected the name"):
        verify(token(claims={"aud": ""}), audience="")


# --- the standard, id by id -----------------------------------------------------


def test_j1_only_the_compact_form_is_read():
    head, claims, signature = issue().token.split(".")
    as_json = json.dumps(
        {"payload": claims, "signatures": [{"protected": head, "signature": signature}]}
    )
    assert_refused(as_json, "compact form: expected three parts")
    flat = json.dumps({"protected": head, "payload": claims, "signature": signature})
    assert_refused(flat, "compact form: expected three parts")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "..x", "not base64url"),
        (lambda text: text + ".", "expected three parts"),
        (lambda text: text.rpartition(".")[0], "expected three parts"),
        (lambda text: text.rpartition(".")[0] + ".", "not base64url"),
        (lambda text: text + "=", "not base64url"),
        (lambda text: text + "\n", "not base64url"),
        (lambda text: " " + text, "not base64url"),
        (lambda text: text[:-3] + "+/A", "not base64url"),
        (lambda text: text + "é", "not base64url"),
        (lambda text: text + "A" * 8192, "characters, at most 8192"),
        (lambda text: text[:-6], "signature is not the authority's"),
        (lambda text: text + "AAAA", "signature is not the authority's"),
    ],
)
def test_j1_a_token_out_of_form_is_refused(change, message):
    assert_refused(change(issue().token), message)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_j2_each_algorithm_of_the_standard_signs_and_verifies(algorithm):
    key = key_for(algorithm)
    signed = issue(key=key, algorithm=algorithm)
    assert header_of(signed.token)["alg"] == algorithm
    bundles = {TD: {"k": key.public_key()}}
    assert verify(signed.token, bundles=bundles) == signed
    theirs = jwt.decode(
        signed.token,
        key.public_key(),
        algorithms=[algorithm],
        audience=US,
        options={"verify_exp": False, "verify_iat": False, "verify_nbf": False},
    )
    assert theirs["sub"] == ME


def test_j2_the_default_algorithm_is_that_of_the_key():
    for name in ("ES256", "ES384", "ES512", "RS256"):
        assert header_of(issue(key=key_for(name)).token)["alg"] == name


@pytest.mark.parametrize("algorithm", ["none", "HS256", "EdDSA", "ES256K", "es256", ""])
def test_j2_any_other_algorithm_is_refused(algorithm):
    assert_refused(
        token({"alg": algorithm}), f"alg '{algorithm}': expected ES, RS or PS"
    )


@pytest.mark.parametrize(
    ("algorithm", "other"),
    [
        ("ES256", "RS256"),
        ("RS256", "ES256"),
        ("PS512", "ES512"),
        ("ES384", "ES256"),
        ("ES256", "ES512"),
    ],
)
def test_j2_an_algorithm_that_is_not_the_keys_is_refused(algorithm, other):
    text = token({"alg": other}, key=key_for(algorithm), algorithm=algorithm)
    bundles = {TD: {"k": key_for(algorithm).public_key()}}
    assert_refused(text, f"alg '{other}' is not for this", bundles=bundles)


@pytest.mark.parametrize(
    ("algorithm", "other"), [("RS256", "PS256"), ("PS256", "RS384")]
)
def test_j2_a_signature_of_another_scheme_is_refused(algorithm, other):
    text = token({"alg": other}, key=key_for("RSA"), algorithm=algorithm)
    bundles = {TD: {"k": key_for("RSA").public_key()}}
    assert_refused(text, "signature is not the authority's", bundles=bundles)


def test_j3_the_type_is_left_out_or_jwt_or_jose():
    assert verify(token(without=["typ"])).id == ME
    for good in ("JWT", "JOSE"):
        assert verify(token({"typ": good})).id == ME
    for wrong in ("jwt", "at+jwt", "", None, ["JWT"]):
        assert_refused(token({"typ": wrong}), "typ: expected JWT or JOSE")


def test_j4_the_header_that_we_write_has_three_members():
    assert header_of(issue().token) == {"alg": "ES256", "kid": "k", "typ": "JWT"}


@pytest.mark.parametrize("name", ["jwk", "jku", "x5c", "x5u", "crit", "b64", "cty"])
def test_j4_any_other_header_is_refused(name):
    assert_refused(token({name: []}), f"header '{name}': expected alg, kid and typ")


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (None, "sub: expected a text"),
        ([ME], "sub: expected a text"),
        ("", "must begin with spiffe://"),
        ("spiffe://td.example", "needs a path"),
        (ME + "\n", "a path has only letters"),
        (ME + "/", "trailing slash"),
        ("spiffe://TD.example/a", "lower-case"),
        ("spiffe://td.example/%61", "percent-encoding"),
    ],
)
def test_j5_the_subject_is_a_workloads_spiffe_id(subject, message):
    assert_refused(token(claims={"sub": subject}), message)
    assert_refused(token(without=["sub"]), "sub: expected a text")


def test_j6_the_audience_is_ours_and_ours_alone():
    for good in (US, [US]):
        assert verify(token(claims={"aud": good})).audience == (US,)
    for wrong in (None, "", [], "other", US + "/", US.upper(), {US: 1}, [[US]]):
        assert_refused(
            token(claims={"aud": wrong}), "for the audience .* expected '.*us"
        )
    assert_refused(token(without=["aud"]), "for the audience None, expected")


@pytest.mark.parametrize("depth", [100, 900, 990, 1500])
def test_claims_within_claims_are_refused_at_any_depth(depth):
    deep = "[" * depth + "]" * depth
    text = compact(
        {"alg": "ES256", "kid": "k"},
        f'{{"sub":"{ME}","aud":{deep},"exp":{NOW + 60}}}',
        lambda signed: sign("ES256", KEY, signed),
    )
    assert_refused(text, "for the audience|recursion")


@pytest.mark.parametrize("aud", [[US, "other"], ["other", US], [US, US]])
def test_j6_a_token_for_several_audiences_is_refused(aud):
    assert_refused(token(claims={"aud": aud}), "expected 'spiffe.*' alone")


def test_j6_for_others_a_token_may_have_several_audiences():
    signed = issue(audience=["one", "two"])
    assert signed.audience == ("one", "two")
    assert_refused(signed.token, "alone", audience="one")


def test_j7_the_expiry_is_there_and_enforced_to_the_instant():
    assert verify(token(claims={"exp": NOW + 0.5})).expires_at.timestamp() == NOW + 0.5
    for late in (NOW, NOW - 0.5, NOW - 3600, 0):
        assert_refused(token(claims={"exp": late}), "me: expired at 20|expired at 1970")
    assert_refused(token(without=["exp"]), "never expires")


@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected a number"),
        (True, "expected a number"),
        ("1800000060", "expected a number"),
        (-1, "expected seconds since 1970"),
        (2**33, "expected seconds since 1970"),
        (10**300, "expected seconds since 1970"),
    ],
)
def test_j7_times_are_numbers_that_mean_a_time(name, value, message):
    assert_refused(token(claims={name: value}), f"{name}: {message}")


def test_times_beyond_json_are_refused():
    for value in ("1e999", "-1e999"):
        claims = json.dumps(CLAIMS | {"exp": 0}).replace('"exp": 0', f'"exp": {value}')
        text = compact(
            {"alg": "ES256", "kid": "k"}, claims, lambda s: sign("ES256", KEY, s)
        )
        assert_refused(text, "exp: expected seconds since 1970")


@pytest.mark.parametrize("name", ["iat", "nbf"])
def test_a_token_from_the_future_is_refused_beyond_the_leeway(name):
    assert verify(token(claims={name: NOW + 30})).id == ME
    assert_refused(token(claims={name: NOW + 31}), f"me: {name} is ahead, at 20")


def test_a_token_lives_an_hour_at_most():
    assert verify(token(claims={"exp": NOW + 3600})).id == ME
    too_long = "lives 3601 s, at most 3600"
    assert_refused(token(claims={"exp": NOW + 3601}), too_long)
    assert_refused(token(claims={"iat": NOW - 3600, "exp": NOW + 1}), too_long)
    assert_refused(token(claims={"exp": NOW + 3601}, without=["iat"]), too_long)
    assert verify(token(without=["iat"])).issued_at is None


def test_j8_the_key_is_the_one_that_the_token_names():
    other = ec.generate_private_key(ec.SECP256R1())
    both = {TD: {"k": KEY.public_key(), "other": other.public_key()}}
    assert verify(token({"kid": "other"}, key=other), bundles=both).key_id == "other"
    assert_refused(token(key=other), "signature is not the authority's", bundles=both)
    assert_refused(token({"kid": "third"}), "no JWT authority 'third' in the trust bun")
    assert_refused(token(without=["kid"]), "kid: expected a text")
    assert_refused(token({"kid": 1}), "kid: expected a text")


def test_j8_only_the_bundle_of_the_subjects_trust_domain_counts():
    text = token(claims={"sub": "spiffe://b.example/x"})
    assert_refused(text, "no JWT authority 'k' in the trust bundle of b.example")
    text = token(claims={"sub": "spiffe://c.example/x"})
    assert_refused(text, "no JWT authority 'k' in the trust bundle of c.example")


def test_j9_the_token_travels_as_a_bearer_token():
    signed = issue()
    assert signed.authorization == f"Bearer {signed.token}"
    assert bearer_token(signed.authorization) == signed.token
    assert bearer_token(f"bearer {signed.token}") == signed.token
    for wrong in ("", signed.token, "Basic abc", "Bearer", "Bearer ", "Bearertoken x"):
        with pytest.raises(Unauthenticated, match="expected `Bearer` and a JWT-SVID"):
            bearer_token(wrong)
    assert_refused(bearer_token(f"Bearer  {signed.token}"), "not base64url")


@pytest.mark.parametrize(
    ("header", "claims", "message"),
    [
        ("{", "{}", "header: not JSON"),
        ("[]", "{}", "header: expected a JSON object"),
        ('{"alg":"ES256"}', "1", "claims: expected a JSON object"),
        ('{"alg":"ES256","alg":"ES256"}', "{}", "header: .* a name occurs twice"),
        ('{"alg":"ES256"}', '{"a":{"b":1,"b":2}}', "claims: .* a name occurs twice"),
        ('{"alg":"ES256"}', '{"exp":NaN}', "NaN is not JSON"),
        ("[" * 3000, "{}", "header: not JSON"),
        ("{}", "{}", "alg: expected a text"),
        ('{"alg":null}', "{}", "alg: expected a text"),
        ('{"alg":"ES256"}', "{}", "kid: expected a text"),
    ],
)
def test_parts_that_are_no_objects_are_refused(header, claims, message):
    assert_refused(compact(header, claims, lambda _: b"x"), message)


# --- beside others --------------------------------------------------------------


def test_the_spiffe_package_validates_what_we_sign():
    bundle = TrustBundle(TD, (), {"k": KEY.public_key()})
    theirs = spiffe.JwtBundle.parse(spiffe.TrustDomain(TD), bundle.jwks())
    now = datetime.now(UTC)
    signed = issue(now=now)
    read = spiffe.JwtSvid.parse_and_validate(signed.token, theirs, {US})
    assert str(read.spiffe_id) == ME
    assert verify(signed.token, bundles={TD: bundle.jwt_authorities}, now=now) == signed


# --- the replay window ----------------------------------------------------------


def test_a_token_is_used_once():
    window, first, second = ReplayWindow(60, 10), issue(), issue()
    assert window.use(first, now=NOW) is first
    assert window.use(second, now=NOW) is second
    for at in (NOW, NOW + 59.9):
        with pytest.raises(Unauthenticated, match=r"me: .* was used before"):
            window.use(first, now=at)


def test_a_token_that_outlives_the_window_or_has_expired_is_refused():
    window = ReplayWindow(30, 10)
    for at in (NOW, NOW + 60, NOW + 61):
        with pytest.raises(
            Unauthenticated, match=r"me: expires at .*, expected within 30"
        ):
            window.use(issue(), now=at)
    assert ReplayWindow(30, 10).use(issue(), now=NOW + 30)


def test_a_full_window_refuses_new_tokens_and_forgets_none_that_lives():
    window = ReplayWindow(60, 2)
    short, long = issue(ttl_s=10), issue(ttl_s=60)
    window.use(short, now=NOW)
    window.use(long, now=NOW)
    with pytest.raises(
        Overloaded, match="window is full: 2 living JWT-SVIDs"
    ) as caught:
        window.use(issue(), now=NOW + 9)
    assert caught.value.public == "too many tokens in use"
    for used in (short, long):
        with pytest.raises(Unauthenticated, match="used before"):
            window.use(used, now=NOW + 9)
    window.use(issue(), now=NOW + 10)  # the short one has made room
    with pytest.raises(Unauthenticated, match="used before"):
        window.use(long, now=NOW + 10)


@pytest.mark.parametrize(("seconds", "capacity"), [(0, 1), (3601, 1), (60, 0)])
def test_a_window_without_bounds_is_refused(seconds, capacity):
    with pytest.raises(ValueError, match="expected 0 < seconds <= 3600, capacity >= 1"):
        ReplayWindow(seconds, capacity)


def test_of_many_threads_with_one_token_one_wins():
    window, tokens = ReplayWindow(60, 1000), [issue() for _ in range(100)]
    won = []

    def use_all():
        for signed in tokens:
            try:
                won.append(window.use(signed, now=NOW))
            except Unauthenticated:
                continue

    threads = [threading.Thread(target=use_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(won) == len(tokens)


# --- fuzz -----------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
objects = st.dictionaries(
    st.sampled_from([*CLAIMS, "alg", "kid", "typ", "nbf", "crit"]),
    scalars | st.lists(scalars, max_size=3),
    max_size=4,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(objects, objects)
def test_any_truly_signed_token_is_verified_or_refused(header, claims):
    text = token(header, claims)
    try:
        verified = verify(text)
    except Unauthenticated:
        return
    # What got through still says what each rule asks for.
    head, body = (
        json.loads(base64.urlsafe_b64decode(part + "=="))
        for part in text.split(".")[:2]
    )
    assert head["alg"] == "ES256"
    assert head["kid"] == "k"
    assert set(head) <= {"alg", "kid", "typ"}
    assert head.get("typ", "JWT") in ("JWT", "JOSE")
    assert (body["sub"], verified.id) == (ME, ME)
    assert body["aud"] in (US, [US])
    assert NOW < body["exp"] <= NOW + 3630
    assert max(body.get("iat", 0), body.get("nbf", 0)) <= NOW + 30


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.data())
def test_any_change_to_a_token_is_refused(data):
    good = issue().token
    changed = list(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        size = data.draw(st.integers(0, 2))
        changed[at : at + size] = data.draw(st.text("AQgw-_.=é\n", max_size=2))
    text = "".join(changed)
    if text != good:
        with pytest.raises(Unauthenticated):
            verify(text)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_refused(text):
    with pytest.raises(Unauthenticated):
        verify(text)
