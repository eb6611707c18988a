"""Attacks with certificates: each is refused, and lets somebody in without its control.

The controls are taken out one by one with `monkeypatch`; where `cryptography` holds the
same rule as we do, both are.
"""

import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
)

from tests.fuzz import seeds
from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import (
    PeerVerifier,
    SpiffeId,
    TrustBundle,
    authorities,
    peer,
    spiffe_id,
    svid,
    verify_peer,
)
from ztserve.testing import ThrowAwayAuthority

A = ThrowAwayAuthority("a.example")
B = ThrowAwayAuthority("b.example")
BOTH = A.bundles | B.bundles
A_ID, B_ID = "spiffe://a.example/ns/x/sa/y", "spiffe://b.example/ns/x/sa/y"
ADMIN = "spiffe://a.example/ns/x/sa/admin"
ANY_CA = ExtensionPolicy.permit_all().require_present(
    x509.BasicConstraints, Criticality.AGNOSTIC, None
)


def plain_verify(chain, bundles):
    """What a TLS stack does: any root of the pool, no rule of SPIFFE's."""
    roots = [x509.load_der_x509_certificate(r) for rs in bundles.values() for r in rs]
    leaf, *others = (x509.load_der_x509_certificate(der) for der in chain)
    policy = PolicyBuilder().store(Store(roots)).time(datetime.now(UTC))
    return policy.build_client_verifier().verify(leaf, others)


def assert_refused(chain, bundles=BOTH, now=None, match=""):
    moment = now or types.now()
    with pytest.raises(Unauthenticated, match=match) as caught:
        verify_peer(chain, bundles, now=moment)
    with pytest.raises((Unauthenticated, IdentityError), match=match):
        PeerVerifier(bundles).verify(chain, now=moment)
    assert caught.value.public == "the peer's identity could not be verified"


def admitted(chain, bundles=BOTH, now=None):
    """Return whom both verifiers take this chain for."""
    moment = now or types.now()
    judged = verify_peer(chain, bundles, now=moment)
    assert PeerVerifier(bundles).verify(chain, now=moment) == judged
    return judged.id


# --- authorities of another trust domain ----------------------------------------


@pytest.mark.parametrize(
    ("authority", "forged_id"), [(A, B_ID), (B, A_ID)], ids=["A as B", "B as A"]
)
def test_x7_a_federated_authority_cannot_mint_ids_of_another_domain(
    authority, forged_id, monkeypatch
):
    own, other = authority.trust_domain, SpiffeId(forged_id).trust_domain
    forgeries = [
        authority.forge(forged_id),
        authority.intermediate(f"spiffe://{own}").forge(forged_id),
        authority.intermediate(f"spiffe://{other}").forge(forged_id),
    ]
    for forged in forgeries:
        assert_refused(forged.chain_der, match="no valid path to the trust domain's")
        assert plain_verify(forged.chain_der, BOTH)
    one_pool = [*A.bundle, *B.bundle]
    read = peer._policies
    monkeypatch.setattr(peer, "_policies", lambda name, roots: read(name, one_pool))
    for forged in forgeries:
        assert admitted(forged.chain_der) == forged_id


def test_both_domains_keep_their_own_ids_while_federated():
    for authority, own_id in ((A, A_ID), (B, B_ID)):
        assert admitted(authority.issue(own_id).chain_der) == own_id


def test_adding_the_true_root_to_the_chain_helps_no_forger():
    assert_refused((*B.forge(A_ID).chain_der, *A.bundle), match="no valid path")


def test_a_true_certificate_behind_a_forged_one_helps_no_forger():
    chain = (*B.forge(A_ID).chain_der, *A.issue(A_ID).chain_der)
    assert_refused(chain, match="certificate 1: is not a CA")


# --- leaves that are no SVIDs ---------------------------------------------------

LEAVES = {
    "x1 two URI names": ({"uris": [A_ID, ADMIN]}, "2 URI names"),
    "x2 a CA": ({"ca": True}, "leaf is a CA"),
    "x3 keyCertSign": (
        {"key_usage": ["digital_signature", "key_cert_sign"]},
        "leaf has keyCertSign",
    ),
    "x3 cRLSign": ({"key_usage": ["digital_signature", "crl_sign"]}, "cRLSign"),
    "x4 no digitalSignature": ({"key_usage": []}, "digitalSignature is not set"),
    "x5 no key usage": ({"key_usage": None}, "no key usage"),
    "x5 not critical": ({"key_usage_critical": False}, "key usage is not critical"),
    "x8 only clientAuth": ({"extended": ["client"]}, "lacks serverAuth or clientAuth"),
    "x8 only serverAuth": ({"extended": ["server"]}, "lacks serverAuth or clientAuth"),
    "a weak key": ({"key": rsa.generate_private_key(65537, 1024)}, "below the floor"),
}


def first_name(extensions):
    names = extensions[x509.SubjectAlternativeName].value
    return SpiffeId(names.get_values_for_type(x509.UniformResourceIdentifier)[0])


@pytest.mark.parametrize("attack", LEAVES)
def test_a_leaf_that_is_no_svid_is_refused(attack, monkeypatch):
    flaws, reason = LEAVES[attack]
    chain = A.forge(A_ID, **flaws).chain_der
    assert_refused(chain, match=reason)
    monkeypatch.setattr(peer, "_leaf_id", first_name)
    monkeypatch.setattr(peer, "_check_leaf_usage", lambda who, extensions: None)
    monkeypatch.setattr(peer, "_LEAF_POLICY", ExtensionPolicy.permit_all())
    monkeypatch.setattr(peer, "check_key", lambda key, what: key)
    assert admitted(chain) == A_ID


def test_i12_a_newline_makes_no_other_id(monkeypatch):
    chain = A.forge(A_ID, uris=[ADMIN + "\n"]).chain_der
    assert_refused(chain, match="control character")

    def careless(text):  # as a library does that writes `match` and `$`
        if not re.match(r"spiffe://[a-z0-9._-]+(/[a-zA-Z0-9._-]+)*$", text):
            raise IdentityError("no SPIFFE ID")

    monkeypatch.setattr(spiffe_id, "_check", careless)
    assert admitted(chain) == ADMIN + "\n"


# --- certificates that should not sign ------------------------------------------


def believe_any_signer(monkeypatch):
    def load(der, what):
        return x509.load_der_x509_certificate(der)

    monkeypatch.setattr(peer, "read_authority", load)
    monkeypatch.setattr(peer, "_CA_POLICY", ANY_CA)


def test_x9_a_workload_cannot_sign_another_workloads_certificate():
    thief = seeds.certificate("leaf", "a", *seeds.leaf_extensions())
    stolen = seeds.certificate("y", "leaf", *seeds.leaf_extensions(ADMIN))
    root = seeds.authority("a")
    chain, bundles = [stolen, thief], {"a.example": [root]}
    assert_refused(chain, bundles, seeds.NOW, match="certificate 1: is not a CA")
    # To one who looks at signatures alone, each vouches for the next:
    path = [x509.load_der_x509_certificate(der) for der in (*chain, root)]
    for child, parent in pairwise(path):
        child.verify_directly_issued_by(parent)


def test_x9_an_intermediate_that_is_a_workload_vouches_for_nobody(monkeypatch):
    chain = A.intermediate("spiffe://a.example/ns/x/sa/signer").forge(A_ID).chain_der
    assert_refused(chain, match="not a trust domain")
    monkeypatch.setattr(authorities, "_check_authority_svid", lambda *_, **__: None)
    assert admitted(chain) == A_ID


def test_x10_a_leaf_in_a_bundle_vouches_for_nobody(monkeypatch):
    # Whoever may add to a bundle what is no authority would be anyone, unsigned.
    forged = B.forge(ADMIN).chain_der
    poisoned = {"a.example": (*A.bundle, *forged)}
    assert_refused(forged, poisoned, match="a.example: root 1: is not a CA")
    believe_any_signer(monkeypatch)
    assert admitted(forged, poisoned) == ADMIN


# --- out of their time ----------------------------------------------------------


@pytest.mark.parametrize("late_s", [90, -150], ids=["expired", "not yet valid"])
def test_an_svid_out_of_its_time_is_refused_even_from_memory(late_s, monkeypatch):
    own = A.issue(A_ID, ttl_s=60)
    moment = types.now() + timedelta(seconds=late_s)
    verifier = PeerVerifier(A.bundles)
    assert verifier.verify(own.chain_der).id == A_ID
    assert_refused(own.chain_der, now=moment, match="not valid at validation time")
    with pytest.raises(Unauthenticated, match=r"expired at|not valid until"):
        verifier.verify(own.chain_der, now=moment)
    monkeypatch.setattr(peer, "_in_time", lambda known, _: known)
    assert verifier.verify(own.chain_der, now=moment).id == A_ID
    monkeypatch.setattr(peer, "as_datetime", lambda _: own.not_after)
    assert admitted(own.chain_der, now=moment) == A_ID


# --- a key that is another's ----------------------------------------------------


def test_a_certificate_with_another_key_is_no_identity(monkeypatch):
    victim, thief = A.issue(ADMIN), A.issue(A_ID)
    own = x509.load_der_x509_certificate(thief.chain_der[0])
    with pytest.raises(IdentityError, match="the private key is not the certificate's"):
        svid.verified_svid(victim.chain_der, thief.key, A.bundles, now=types.now())
    careless = SimpleNamespace(load_der_x509_certificate=lambda _: own)
    monkeypatch.setattr(svid, "x509", careless)
    taken = svid.verified_svid(victim.chain_der, thief.key, A.bundles, now=types.now())
    assert (taken.id, taken.key) == (ADMIN, thief.key)


# --- chains that cost much ------------------------------------------------------


def unbounded(chain, monkeypatch):
    """Return why the chain is refused when the search for a path is not bounded."""
    with monkeypatch.context() as without:
        without.setattr(peer, "_check_search", lambda *_: None)
        with pytest.raises(Unauthenticated) as caught:
            verify_peer(chain, BOTH, now=seeds.NOW)
    return caught.value.reason


def test_signers_of_one_name_cannot_make_the_search_long(monkeypatch):
    loop = seeds.certificate(
        "lower", "lower", *seeds.signer_extensions(), key=seeds.KEYS["lower"]
    )
    chain = [seeds.certificate("y", "lower", *seeds.leaf_extensions()), loop, loop]
    assert_refused(chain, match="two signers of one name", now=seeds.NOW)
    assert "Exceeded maximum signature check limit" in unbounded(chain, monkeypatch)


@pytest.mark.slow
def test_name_constraints_cannot_make_the_search_long(monkeypatch):
    others = [x509.DNSName(f"b{number}") for number in range(1500)]
    limits = (x509.NameConstraints(None, others), True)
    between = seeds.certificate(
        "between",
        "lower",
        *seeds.signer_extensions(),
        limits,
        key=seeds.KEYS["between"],
    )
    names = seeds.leaf_extensions(A_ID, *(["a"] * 1000))
    chain = [seeds.certificate("y", "between", *names), between]
    assert_refused(chain, match="over 64 name constraints", now=seeds.NOW)
    monkeypatch.setattr(authorities, "MAX_NAME_CONSTRAINTS", 1500)
    assert_refused(chain, match="at most 10000 comparisons", now=seeds.NOW)
    reason = unbounded(chain, monkeypatch)
    assert "Exceeded maximum name constraint check limit" in reason


def limited_root(count):
    limits = x509.NameConstraints(
        None, [x509.DNSName(f"x{number}.y") for number in range(count)]
    )
    return seeds.authority("a", "a", (limits, True))


def test_a_partners_root_cannot_make_each_of_its_names_be_compared_at_length():
    for build in (
        lambda root: TrustBundle("a.example", (root,), {}),
        lambda root: PeerVerifier({"a.example": [root]}),
    ):
        build(limited_root(64))
        with pytest.raises(IdentityError, match="over 64 name constraints"):
            build(limited_root(65))


def test_roots_of_one_subject_cannot_make_the_search_long():
    roots = [limited_root(count) for count in range(1, 10)]
    for build in (
        lambda some: TrustBundle("a.example", some, {}),
        lambda some: PeerVerifier({"a.example": some}),
    ):
        build(tuple(roots[:8]))
        with pytest.raises(IdentityError, match="over 8 authorities of one subject"):
            build(tuple(roots))
    assert_refused(
        A.issue(A_ID).chain_der,
        {"a.example": [*A.bundle, *roots]},
        match="over 8 authorities of one subject",
    )
