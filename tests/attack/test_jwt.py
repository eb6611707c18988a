"""Attacks with tokens and trust bundles: somebody wants to be who they are not.

Each attack is also shown to succeed where the control that stops it is taken out.
"""

import base64
import hashlib
import hmac
import json
import time
from collections import OrderedDict

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ztserve.errors import IdentityError, Overloaded, Unauthenticated
from ztserve.identity import (
    ReplayWindow,
    TrustBundle,
    bundle,
    jwk,
    parse_bundle_map,
    sign_jwt_svid,
    verify_jwt_svid,
)
from ztserve.identity.bundle import newer
from ztserve.identity.jwk import base64url_decode, base64url_encode, key_members
from ztserve.identity.jwt import replay as replay
from ztserve.identity.jwt import svid as jwt_svid
from ztserve.identity.jwt.jws import sign
from ztserve.testing import ThrowAwayAuthority

NOW = 1_800_000_000.0
A_KEY, B_KEY, MALLORY = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
A_ID, ADMIN = "spiffe://a.example/ns/x/sa/y", "spiffe://a.example/ns/x/sa/admin"
US, OTHER = "spiffe://a.example/ns/x/sa/us", "spiffe://a.example/ns/x/sa/other"
BUNDLES = {
    "a.example": {"a": A_KEY.public_key()},
    "b.example": {"b": B_KEY.public_key()},
}
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def issue(
    spiffe_id=A_ID, audience=(US,), *, key=A_KEY, key_id="a", now=NOW, ttl_s=60.0
):
    return sign_jwt_svid(
        spiffe_id, list(audience), key=key, key_id=key_id, now=now, ttl_s=ttl_s
    )


def verify(token, bundles=BUNDLES, *, now=NOW):
    return verify_jwt_svid(token, bundles, audience=US, now=now)


def assert_refused(token, message, bundles=BUNDLES, *, now=NOW):
    with pytest.raises(Unauthenticated, match=message):
        verify(token, bundles, now=now)


def forge(header=(), claims=(), *, key=MALLORY, raw_claims=None):
    """A token of any content, signed with ES256 by `key`."""
    head = {"alg": "ES256", "kid": "a", "typ": "JWT", **dict(header)}
    body = {"sub": ADMIN, "aud": US, "iat": NOW, "exp": NOW + 60, **dict(claims)}
    parts = (json.dumps(head), raw_claims or json.dumps(body))
    signed = ".".join(base64url_encode(part.encode()) for part in parts)
    return f"{signed}.{base64url_encode(sign('ES256', key, signed.encode()))}"


def naive_verify(token, keys):
    """What JOSE let its first libraries do: the token says how it is to be checked."""
    head, body, signature = (
        base64url_decode(p) if p else b"" for p in token.split(".")
    )
    header, signed = json.loads(head), token.rpartition(".")[0].encode()
    if header["alg"] == "none":
        return json.loads(body)
    key = keys[header["kid"]]
    if "jwk" in header:
        key = jwk.read_key(header["jwk"])
    if header["alg"] == "HS256":
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        assert hmac.digest(pem, signed, "sha256") == signature
    else:
        jwt_svid.check_signature(header["alg"], key, signature, signed)
    return json.loads(body)


# --- the header decides nothing -------------------------------------------------


def test_j2_a_token_without_signature_is_nobodys():
    head, body, _ = forge({"alg": "none"}).split(".")
    assert naive_verify(f"{head}.{body}.", BUNDLES["a.example"])["sub"] == ADMIN
    assert_refused(f"{head}.{body}.", "not base64url")
    assert_refused(f"{head}.{body}.AAAA", "alg 'none': expected ES, RS or PS")


def test_j2_the_public_key_is_no_shared_secret():
    signed = forge({"alg": "HS256"}).rpartition(".")[0]
    pem = A_KEY.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    code = hmac.digest(pem, signed.encode(), "sha256")
    forged = f"{signed}.{base64url_encode(code)}"
    assert naive_verify(forged, BUNDLES["a.example"])["sub"] == ADMIN
    assert_refused(forged, "alg 'HS256': expected ES, RS or PS")


def test_j4_a_key_that_the_token_brings_along_counts_for_nothing(monkeypatch):
    forged = forge({"jwk": key_members(MALLORY.public_key())})
    assert naive_verify(forged, BUNDLES["a.example"])["sub"] == ADMIN
    assert_refused(forged, "header 'jwk': expected alg, kid and typ")
    monkeypatch.setattr(jwt_svid, "_HEADERS", {"alg", "kid", "typ", "jwk"})
    assert_refused(forged, "signature is not the authority's")  # even then


def test_j4_an_extension_that_we_do_not_know_is_not_passed_over(monkeypatch):
    token = forge({"crit": ["bound-to"], "bound-to": "another host"}, key=A_KEY)
    assert_refused(token, "header 'bound-to': expected alg, kid and typ")
    monkeypatch.setattr(jwt_svid, "_HEADERS", {"alg", "kid", "typ", "crit", "bound-to"})
    assert verify(token).id == ADMIN  # the binding is lost


# --- whose signature counts -----------------------------------------------------


def test_a_forged_signature_is_refused(monkeypatch):
    zeros = f"{forge().rpartition('.')[0]}.{base64url_encode(bytes(64))}"
    for forged in (forge(), forge(key=B_KEY), zeros):
        assert_refused(forged, "signature is not the authority's")
    monkeypatch.setattr(jwt_svid, "check_signature", lambda *_: None)
    assert verify(forge()).id == ADMIN


@pytest.mark.parametrize(
    ("spiffe_id", "key", "key_id"),
    [(ADMIN, B_KEY, "b"), ("spiffe://b.example/ns/x/sa/y", A_KEY, "a")],
    ids=["B as A", "A as B"],
)
def test_f1_j8_a_federated_authority_cannot_sign_for_another_domain(
    spiffe_id, key, key_id
):
    forged = issue(spiffe_id, key=key, key_id=key_id).token
    assert_refused(forged, f"no JWT authority '{key_id}' in the trust bundle of")
    pool = {name: key for keys in BUNDLES.values() for name, key in keys.items()}
    merged = dict.fromkeys(BUNDLES, pool)  # bundles as they must never be
    assert verify(forged, merged).id == spiffe_id


def test_b5_a_key_that_signs_certificates_signs_no_tokens(monkeypatch):
    authority = ThrowAwayAuthority("a.example")
    held = TrustBundle("a.example", authority.bundle, {"a": A_KEY.public_key()})
    forged = issue(ADMIN, key=authority._key, key_id="root").token
    published = json.loads(held.jwks())
    published["keys"][0]["kid"] = "root"
    read = TrustBundle.parse(json.dumps(published).encode(), "a.example")
    assert_refused(
        forged, "no JWT authority 'root'", {"a.example": read.jwt_authorities}
    )

    monkeypatch.setattr(  # as if the use did not matter
        bundle,
        "_read_entry",
        lambda entry, where, _, keys: bundle._read_jwt_authority(entry, where, keys),
    )
    read = TrustBundle.parse(json.dumps(published).encode(), "a.example")
    assert verify(forged, {"a.example": read.jwt_authorities}).id == ADMIN


# --- stolen and stretched -------------------------------------------------------


def test_j6_another_audience_cannot_pass_a_token_on(monkeypatch):
    alone, both = issue(audience=[OTHER]).token, issue(audience=[OTHER, US]).token
    assert_refused(alone, "for the audience .*other'.*, expected '.*us' alone")
    assert_refused(both, "for the audience .*, expected '.*us' alone")

    def any_of(subject, value, audience):
        if audience not in value:
            raise IdentityError("not for us")

    monkeypatch.setattr(jwt_svid, "_check_audience", any_of)
    assert verify(both).id == A_ID  # the standard's minimum lets `other` be A_ID here
    monkeypatch.setattr(jwt_svid, "_check_audience", lambda *_: None)
    assert verify(alone).id == A_ID


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"exp": NOW - 1, "iat": NOW - 60}, "expired at"),
        ({"iat": NOW + 3000, "exp": NOW + 3600}, "iat is ahead"),
        ({"nbf": NOW + 3000, "exp": NOW + 3600}, "nbf is ahead"),
        ({"exp": NOW + 10 * 365 * 86400}, "lives 3.1536e[+]08 s, at most 3600"),
    ],
    ids=["expired", "issued later", "begins later", "ten years"],
)
def test_j7_a_token_out_of_its_time_is_refused(monkeypatch, claims, message):
    token = forge(claims=claims, key=A_KEY)
    assert_refused(token, message)
    monkeypatch.setattr(
        jwt_svid, "_check_times", lambda _, claims, at: (None, claims["exp"])
    )
    assert verify(token).id == ADMIN


def test_a_token_with_two_subjects_is_nobodys(monkeypatch):
    claims = f'{{"sub":"{A_ID}","sub":"{ADMIN}","aud":"{US}","exp":{NOW + 60}}}'
    token = forge(raw_claims=claims, key=A_KEY)
    assert_refused(token, "a name occurs twice in one object")
    monkeypatch.setattr(jwk, "_unique", dict)
    # A policy engine in front of us that takes the first one has seen A_ID.
    assert verify(token).id == ADMIN


# --- replay ---------------------------------------------------------------------


def test_a_token_that_was_seen_on_the_way_is_not_used_again():
    seen, window = issue().token, ReplayWindow(60, 10)
    window.use(verify(seen), now=NOW)
    assert verify(seen).id == A_ID  # without the window, again and again
    with pytest.raises(Unauthenticated, match="was used before"):
        window.use(verify(seen), now=NOW + 1)


def rewritten(token):
    """The same token with the other of ECDSA's two valid signatures."""
    signed, _, text = token.rpartition(".")
    signature = base64url_decode(text)
    other = P256_ORDER - int.from_bytes(signature[32:])
    return f"{signed}.{base64url_encode(signature[:32] + other.to_bytes(32))}"


def test_a_rewritten_signature_makes_no_new_token(monkeypatch):
    seen = issue().token
    assert rewritten(seen) != seen
    window = ReplayWindow(60, 10)
    window.use(verify(seen), now=NOW)
    with pytest.raises(Unauthenticated, match="was used before"):
        window.use(verify(rewritten(seen)), now=NOW)

    monkeypatch.setattr(
        replay, "_digest", lambda token: hashlib.sha256(token.encode()).digest()
    )
    window = ReplayWindow(60, 10)
    window.use(verify(seen), now=NOW)
    assert window.use(verify(rewritten(seen)), now=NOW)


def test_a_respelt_signature_makes_no_new_token(monkeypatch):
    seen = issue().token
    respelt = seen[:-1] + chr(ord(seen[-1]) + 1)  # the last 4 bits stand for nothing
    assert_refused(respelt, "not base64url in its one canonical form")
    monkeypatch.setattr(
        jwt_svid, "base64url_decode", lambda text: base64.urlsafe_b64decode(text + "==")
    )
    assert verify(respelt).id == A_ID


class LeastRecent(ReplayWindow):
    """A window that makes room by forgetting the oldest token."""

    def __init__(self, _, capacity):
        self._seen, self._room = OrderedDict(), capacity

    def use(self, svid, *, now):
        if svid.token in self._seen:
            raise Unauthenticated("", "used before")
        self._seen[svid.token] = None
        if len(self._seen) > self._room:
            self._seen.popitem(last=False)
        return svid


def flood(window):
    seen = verify(issue().token)
    window.use(seen, now=NOW)
    for _ in range(20):
        try:
            window.use(verify(issue().token), now=NOW)
        except Overloaded:
            continue
    return window.use(seen, now=NOW)


def test_a_flood_of_tokens_does_not_wash_a_used_one_out():
    with pytest.raises(Unauthenticated, match="was used before"):
        flood(ReplayWindow(60, 10))
    assert flood(LeastRecent(60, 10))


def test_a_clock_set_back_revives_no_used_token():
    seen, window = verify(issue().token), ReplayWindow(60, 10)
    window.use(seen, now=NOW)
    window.use(verify(issue(now=NOW + 100).token, now=NOW + 100), now=NOW + 100)
    with pytest.raises(Unauthenticated, match="expires at"):
        window.use(seen, now=NOW + 1)
    window._latest = 0.0  # as if it believed the clock
    assert window.use(seen, now=NOW + 1)


# --- trust bundles --------------------------------------------------------------


def certificates(*ders):
    x5c = [[base64.b64encode(der).decode()] for der in ders]
    keys = [{"kty": "EC", "use": "x509-svid", "x5c": one} for one in x5c]
    return json.dumps({"keys": keys}).encode()


@pytest.mark.parametrize("flaws", [{}, {"ca": True, "key_usage": ["key_cert_sign"]}])
def test_x9_a_workload_does_not_become_an_authority_by_a_place_in_a_bundle(
    monkeypatch, flaws
):
    authority = ThrowAwayAuthority("a.example")
    leaf = authority.forge(A_ID, **flaws).chain_der[0]
    with pytest.raises(IdentityError, match=r"is not a CA|is a workload, not a trust"):
        TrustBundle.parse(certificates(*authority.bundle, leaf), "a.example")
    monkeypatch.setattr(
        bundle, "read_authority", lambda der, _: x509.load_der_x509_certificate(der)
    )
    read = TrustBundle.parse(certificates(*authority.bundle, leaf), "a.example")
    assert leaf in read.x509_authorities


def test_b6_a_withdrawn_key_does_not_come_back_with_an_old_bundle():
    stolen = {"a": A_KEY.public_key(), "stolen": MALLORY.public_key()}
    old = TrustBundle("a.example", (), stolen, 7)
    held = TrustBundle("a.example", (), BUNDLES["a.example"], 8)
    forged = issue(ADMIN, key=MALLORY, key_id="stolen").token
    for played_back in (old, TrustBundle("a.example", (), stolen, 8)):
        with pytest.raises(IdentityError, match=r"old bundle was played|other authori"):
            newer(held, played_back)
    assert_refused(forged, "no JWT auth", {"a.example": held.jwt_authorities})
    assert verify(forged, {"a.example": old.jwt_authorities}).id == ADMIN


def test_b9_a_second_bundle_under_one_name_does_not_replace_the_first(monkeypatch):
    true, false = (
        TrustBundle("a.example", (), {"a": key.public_key()}).jwks().decode()
        for key in (A_KEY, MALLORY)
    )
    data = f'{{"trust_domains":{{"a.example":{true},"a.example":{false}}}}}'.encode()
    with pytest.raises(IdentityError, match=r"a name occurs twice"):
        parse_bundle_map(data)
    monkeypatch.setattr(jwk, "_unique", dict)
    keys = parse_bundle_map(data)["a.example"].jwt_authorities
    assert verify(forge(), {"a.example": keys}).id == ADMIN


def test_a_key_that_is_slow_on_purpose_is_refused(monkeypatch):
    weak = rsa.RSAPublicNumbers(2**3000 + 1, 2**3071 + 1).public_key()
    entry = {"use": "jwt-svid", "kid": "a", **key_members(weak)}
    jwks = json.dumps({"keys": [entry]}).encode()
    with pytest.raises(IdentityError, match="key below the floor or too costly"):
        TrustBundle.parse(jwks, "a.example")
    monkeypatch.setattr(bundle, "check_key", lambda key, _: key)
    keys = TrustBundle.parse(jwks, "a.example").jwt_authorities
    signature = base64url_encode(b"\0" + b"\x55" * 383)
    token = f"{forge({'alg': 'RS256'}).rpartition('.')[0]}.{signature}"
    began = time.perf_counter()
    for _ in range(10):
        assert_refused(token, "signature is not", {"a.example": keys})
    assert time.perf_counter() - began > 10 * 1e-3  # a true one takes 0.1 ms
