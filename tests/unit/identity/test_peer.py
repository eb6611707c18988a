import hashlib
import threading
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import seeds
from tests.fuzz.seeds import ID, certificate, key_usage, leaf_extensions
from tests.fuzz.seeds import NOW as CORPUS_NOW
from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import PeerVerifier, SpiffeId, verify_peer
from ztserve.identity import peer as peer_module
from ztserve.testing import ThrowAwayAuthority

ME = "spiffe://td.example/ns/a/sa/b"
NOW = datetime.now(UTC)
ROOT_A = {"a.example": [seeds.authority("a")]}


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


# --- the rules of the X509-SVID standard, by their numbers in docs/conformance -------


def assert_accepted(authority, **flaws):
    chain = authority.forge(ME, **flaws).chain_der
    assert verify_peer(chain, authority.bundles, now=types.now()).id == ME


def assert_refused(authority, message, **flaws):
    chain = authority.forge(ME, **flaws).chain_der
    assert message in refusal(chain, authority.bundles)
    with pytest.raises(Unauthenticated, match=message):
        PeerVerifier(authority.bundles).verify(chain)


@pytest.mark.parametrize(
    ("uris", "message"),
    [
        ([ME, "spiffe://td.example/x"], "2 URI names, exactly one"),
        ([ME, ME], "2 URI names, exactly one"),
        ([ME, "https://td.example/x"], "2 URI names, exactly one"),
    ],
)
def test_x1_more_than_one_uri_name_is_refused(authority, uris, message):
    assert_refused(authority, message, uris=uris)


def test_x1_no_uri_name_is_refused(authority):
    assert_refused(authority, "0 URI names", uris=[], dns=["a.example"])
    assert_refused(authority, "no SPIFFE ID", uris=[])


def test_x2_a_leaf_is_no_ca(authority):
    assert_refused(authority, "leaf is a CA", ca=True)


@pytest.mark.parametrize("use", ["key_cert_sign", "crl_sign"])
def test_x3_a_leaf_signs_neither_certificates_nor_revocations(authority, use):
    message = {"key_cert_sign": "leaf has keyCertSign", "crl_sign": "leaf has cRLSign"}
    assert_refused(authority, message[use], key_usage=["digital_signature", use])


def test_x4_a_leaf_without_digital_signature_is_refused(authority):
    assert_refused(authority, "digitalSignature is not set", key_usage=[])
    assert_refused(
        authority, "digitalSignature is not set", key_usage=["key_encipherment"]
    )


def test_x4_a_leaf_may_have_the_other_uses():
    more = key_usage("digital_signature", "key_encipherment", "key_agreement")
    names, constraints, _, extended = leaf_extensions()
    chain = [certificate("y", "a", names, constraints, (more, True), extended)]
    assert verify_peer(chain, ROOT_A, now=CORPUS_NOW).id == ID


def test_x5_the_key_usage_is_there_and_critical(authority):
    assert_refused(authority, "no key usage", key_usage=None)
    assert_refused(authority, "key usage is not critical", key_usage_critical=False)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("https://td.example/a", "must begin with spiffe://"),
        ("spiffe://td.example", "a workload's ID needs a path"),
        ("spiffe://td.example/", "trailing slash"),
        (ME + "\n", "control character"),
    ],
)
def test_x6_the_name_is_a_workloads_spiffe_id(authority, uri, message):
    assert_refused(authority, message, uris=[uri])


def test_x7_only_the_roots_of_the_ids_own_trust_domain_count(authority):
    other = ThrowAwayAuthority("other.example")
    both = authority.bundles | other.bundles
    assert "no valid path" in refusal(other.forge(ME).chain_der, both)
    chain = authority.issue(ME).chain_der
    assert "no trust bundle for td.example" in refusal(chain, other.bundles)


@pytest.mark.parametrize(
    "flaws",
    [{"starts_s": -90, "ends_s": -60}, {"starts_s": 60}],
    ids=["past", "future"],
)
def test_x7_a_leaf_out_of_its_time_is_refused(authority, flaws):
    assert_refused(authority, "not valid at validation time", **flaws)


def test_x7_a_missing_intermediate_and_a_wrong_order_are_refused(authority):
    leaf, between = authority.intermediate("spiffe://td.example").forge(ME).chain_der
    assert "no valid path" in refusal([leaf], authority.bundles)
    assert "needs a path" in refusal([between, leaf], authority.bundles)


def test_x7_a_path_is_no_longer_than_its_authorities_allow():
    narrow = seeds.authority("between", "a", path_length=0)
    lower = seeds.authority("lower", "between")
    good = [certificate("y", "between", *leaf_extensions()), narrow]
    assert verify_peer(good, ROOT_A, now=CORPUS_NOW).id == ID
    long = [certificate("y", "lower", *leaf_extensions()), lower, narrow]
    assert "path length" in refusal(long, ROOT_A, CORPUS_NOW)


def narrowed(*names):
    """A chain whose intermediate may speak for DNS names under a.example only."""
    limits = x509.NameConstraints([x509.DNSName("a.example")], None)
    between = seeds.authority("between", "a", (limits, True))
    return [certificate("y", "between", *leaf_extensions(ID, *names)), between]


def test_x7_name_constraints_hold():
    good = narrowed("y.a.example")
    assert verify_peer(good, ROOT_A, now=CORPUS_NOW).id == ID
    assert "no valid path" in refusal(narrowed("y.b.example"), ROOT_A, CORPUS_NOW)


@pytest.mark.parametrize("critical", [True, False])
def test_x7_a_name_constraint_on_uris_is_not_understood_and_refused(critical):
    limits = x509.NameConstraints([x509.UniformResourceIdentifier("a.example")], None)
    between = seeds.authority("between", "a", (limits, critical))
    chain = [certificate("y", "between", *leaf_extensions()), between]
    reason = refusal(chain, ROOT_A, CORPUS_NOW)
    assert "unsupported name constraint" in reason


def test_x7_an_unknown_critical_extension_is_refused():
    odd = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0")
    chain = [certificate("y", "a", *leaf_extensions(), (odd, True))]
    assert "no valid path" in refusal(chain, ROOT_A, CORPUS_NOW)
    chain = [certificate("y", "a", *leaf_extensions(), (odd, False))]
    assert verify_peer(chain, ROOT_A, now=CORPUS_NOW).id == ID


@pytest.mark.parametrize("uses", [["server"], ["client"], []])
def test_x8_an_extended_key_usage_has_both_uses(authority, uses):
    if uses:
        assert_refused(authority, "lacks serverAuth or clientAuth", extended=uses)
    else:
        assert_accepted(authority, extended=None)


def test_x8_an_extended_key_usage_may_be_critical():
    *others, (extended, _) = leaf_extensions()
    chain = [certificate("y", "a", *others, (extended, True))]
    assert verify_peer(chain, ROOT_A, now=CORPUS_NOW).id == ID


NAME, CONSTRAINTS, USAGE = seeds.signer_extensions("spiffe://a.example")
NO_SIGNERS = {
    "no constraints": ((NAME, USAGE), "not a CA"),
    "not a CA": ((NAME, leaf_extensions()[1], USAGE), "not a CA"),
    "no key usage": ((NAME, CONSTRAINTS), "keyCertSign"),
    "no keyCertSign": (
        (NAME, CONSTRAINTS, (key_usage("crl_sign"), True)),
        "keyCertSign",
    ),
    "an ID with a path": (seeds.signer_extensions(ID), "not a trust domain"),
    "no ID": (seeds.signer_extensions("https://a.example"), "must begin with spiffe"),
    "usage not critical": ((NAME, CONSTRAINTS, (USAGE[0], False)), "not critical"),
    "two names": (
        (
            (x509.SubjectAlternativeName([*NAME[0], *NAME[0]]), False),
            CONSTRAINTS,
            USAGE,
        ),
        "2 URI names",
    ),
}


@pytest.mark.parametrize("name", NO_SIGNERS)
def test_x9_what_may_not_sign_is_refused_as_intermediate_and_in_a_bundle(name):
    extensions, message = NO_SIGNERS[name]
    between = certificate("between", "a", *extensions, key=seeds.KEYS["between"])
    chain = [certificate("y", "between", *leaf_extensions()), between]
    assert message in refusal(chain, ROOT_A, CORPUS_NOW)
    root = certificate("a", "a", *extensions, key=seeds.KEYS["a"])
    bundles = {"a.example": [*ROOT_A["a.example"], root]}
    good = [certificate("y", "a", *leaf_extensions())]
    reason = refusal(good, bundles, CORPUS_NOW)
    assert "trust bundle of a.example: root 1: " in reason
    assert message in reason
    with pytest.raises(IdentityError, match=r"trust bundle of a\.example: root 1: "):
        PeerVerifier(bundles)


def test_x9_an_intermediate_needs_no_id_and_then_no_critical_usage():
    extensions = (CONSTRAINTS, (USAGE[0], False))
    between = certificate("between", "a", *extensions, key=seeds.KEYS["between"])
    chain = [certificate("y", "between", *leaf_extensions()), between]
    assert verify_peer(chain, ROOT_A, now=CORPUS_NOW).id == ID


def test_x9_an_intermediate_may_be_of_another_trust_domain():
    extensions = seeds.signer_extensions("spiffe://b.example")
    between = certificate("between", "a", *extensions, key=seeds.KEYS["between"])
    chain = [certificate("y", "between", *leaf_extensions()), between]
    assert verify_peer(chain, ROOT_A, now=CORPUS_NOW).id == ID


def test_x10_a_signing_certificate_is_no_peer(authority):
    assert "leaf is a CA" in refusal(
        certificate_of_a_ca_with_an_id(), ROOT_A, CORPUS_NOW
    )
    assert "needs a path" in refusal(authority.bundle, authority.bundles)


def certificate_of_a_ca_with_an_id():
    return [certificate("y", "a", *seeds.signer_extensions(ID))]


def test_x10_a_leaf_in_a_bundle_is_refused_by_name():
    leaf = certificate("y", "b", *leaf_extensions())
    bundles = {"a.example": [*ROOT_A["a.example"], leaf]}
    assert "a.example: root 1: is not a CA" in refusal([leaf], bundles, CORPUS_NOW)
    with pytest.raises(IdentityError, match=r"a\.example: root 1: is not a CA"):
        PeerVerifier(bundles)


def test_x11_without_a_subject_the_name_is_critical(authority):
    assert_refused(authority, "MUST be critical", no_subject=True)
    chain = [certificate("", "a", *leaf_extensions(critical=True))]
    assert verify_peer(chain, ROOT_A, now=CORPUS_NOW).id == ID


def test_x11_with_a_subject_the_name_may_be_critical():
    chain = [certificate("y", "a", *leaf_extensions(critical=True))]
    assert verify_peer(chain, ROOT_A, now=CORPUS_NOW).id == ID


def test_x12_other_kinds_of_names_are_allowed(authority):
    assert_accepted(authority, dns=["a.example", "*.b.example"])
    uri = x509.UniformResourceIdentifier(ID)
    others = [
        x509.DNSName("y"),
        x509.IPAddress(ip_address("10.0.0.1")),
        x509.RFC822Name("y@a.example"),
        x509.DirectoryName(x509.Name([])),
    ]
    names = x509.SubjectAlternativeName([*others, uri])
    chain = [certificate("y", "a", (names, False), *leaf_extensions()[1:])]
    assert verify_peer(chain, ROOT_A, now=CORPUS_NOW).id == ID


# --- and what the standard leaves to us -----------------------------------------


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())],
    ids=["RSA 2048", "EC P-384"],
)
def test_a_key_of_the_floor_is_accepted(authority, key):
    assert_accepted(authority, key=key)


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 1024),
        ec.generate_private_key(ec.SECP224R1()),
        ec.generate_private_key(ec.SECP256K1()),
    ],
    ids=["RSA 1024", "EC P-224", "EC secp256k1"],
)
def test_a_weak_key_is_refused(authority, key):
    assert_refused(authority, "below the floor", key=key)


def test_a_leaf_needs_no_authority_key_identifier(authority):
    # RFC 5280, 4.2.1.1 asks it of authorities, not of those who judge a path.
    key = seeds.KEYS["a"]
    builder = x509.CertificateBuilder(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")]),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "y")]),
        key.public_key(),
        5,
        CORPUS_NOW,
        CORPUS_NOW + timedelta(days=1),
    )
    for extension, critical in leaf_extensions():
        builder = builder.add_extension(extension, critical=critical)
    leaf = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    assert verify_peer([leaf], ROOT_A, now=CORPUS_NOW).id == ID


def test_two_signers_of_one_name_are_refused():
    between = seeds.authority("between", "a")
    chain = [certificate("y", "between", *leaf_extensions()), between, between]
    assert "two signers of one name" in refusal(chain, ROOT_A, CORPUS_NOW)


def test_many_names_under_many_constraints_are_refused():
    limits = x509.NameConstraints(
        None, [x509.DNSName(f"b{n}.example") for n in range(64)]
    )
    between = seeds.authority("between", "a", (limits, True))
    names = [f"y{n}.a.example" for n in range(155)]
    good = [certificate("y", "between", *leaf_extensions(ID, *names[:154])), between]
    assert verify_peer(good, ROOT_A, now=CORPUS_NOW).id == ID
    many = [certificate("y", "between", *leaf_extensions(ID, *names)), between]
    reason = refusal(many, ROOT_A, CORPUS_NOW)
    assert "157 names under 64 name constraints, at most 10000" in reason


def test_an_intermediate_needs_no_name(authority):
    chain = authority.intermediate().forge(ME).chain_der
    assert verify_peer(chain, authority.bundles, now=types.now()).id == ME


def test_chains_out_of_bounds_are_refused_before_they_are_parsed(authority):
    leaf = authority.issue(ME).chain_der[0]
    assert refusal([], authority.bundles) == "no certificate"
    assert "9 certificates, at most 8" in refusal([leaf] * 9, authority.bundles)
    assert "at most 32768" in refusal([leaf, b"\0" * 32768], authority.bundles)


@pytest.mark.parametrize("position", [0, 1])
def test_a_reason_is_one_short_line_whatever_the_subject(position):
    shout = "x\nspiffe://a.example/admin is welcome\n" * 300
    names = [x509.NameAttribute(NameOID.POSTAL_ADDRESS, shout)]
    key = seeds.KEYS["between"]
    odd = x509.CertificateBuilder(
        x509.Name(names),
        x509.Name(names),
        key.public_key(),
        5,
        CORPUS_NOW,
        CORPUS_NOW + timedelta(days=1),
    )
    every = leaf_extensions(), seeds.signer_extensions("spiffe://a.example")
    for extension, critical in every[position]:
        odd = odd.add_extension(extension, critical=critical)
    made = odd.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
    chain = [certificate("y", "between", *leaf_extensions())] * position + [made]
    reason = refusal(chain, ROOT_A, CORPUS_NOW)
    assert "no valid path" in reason
    assert len(reason) < 400
    assert "\n" not in reason


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


def test_b1_an_empty_bundle_refuses_every_svid_of_its_trust_domain_alone(authority):
    other = ThrowAwayAuthority("other.example")
    bundles = other.bundles | {"td.example": ()}
    chain = authority.issue(ME).chain_der
    assert "no trust bundle for td.example" in refusal(chain, bundles)
    verifier = PeerVerifier(bundles)
    with pytest.raises(Unauthenticated, match=r"no trust bundle for td\.example"):
        verifier.verify(chain)
    theirs = "spiffe://other.example/a"
    assert verifier.verify(other.issue(theirs).chain_der).id == theirs


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
        ({"td.example": (b"x",) * 65}, "65 roots, at most 64"),
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
