import pickle
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import Identity
from ztserve.identity.svid import Material, read_identity, verified_svid
from ztserve.testing import ThrowAwayAuthority

ME = "spiffe://td.example/ns/a/sa/b"


def pkcs8(key):
    return key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.fixture
def svid(authority):
    return authority.issue(ME)


@pytest.fixture
def material(authority, svid):
    return Material(
        spiffe_id=ME,
        chain=b"".join(svid.chain_der),
        key=svid.key_der(),
        bundle=b"".join(authority.bundle),
    )


def test_an_identity_is_read_whole(authority, svid, material):
    identity = read_identity(material, now=types.now())
    assert identity.svid.id == ME
    assert identity.svid.serial == svid.serial
    assert identity.svid.chain_der == svid.chain_der
    assert identity.svid.key_der() == svid.key_der()
    assert identity.bundles == authority.bundles


def test_intermediates_and_several_roots_and_federated_bundles_are_read(authority):
    between = authority.intermediate("spiffe://td.example").forge(ME)
    other, foreign = ThrowAwayAuthority("td.example"), ThrowAwayAuthority("b.example")
    material = Material(
        spiffe_id=ME,
        chain=b"".join(between.chain_der),
        key=between.key_der(),
        bundle=b"".join(other.bundle + authority.bundle),
        federated={"spiffe://b.example": foreign.bundle[0]},
    )
    identity = read_identity(material, now=types.now())
    assert identity.svid.chain_der == between.chain_der
    assert identity.bundles == {
        "td.example": other.bundle + authority.bundle,
        "b.example": foreign.bundle,
    }


def change(material, **parts):
    return replace(material, **parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"spiffe_id": "spiffe://td.example/ns/a/sa/c"},
            "announced for .*sa/c is that",
        ),
        ({"spiffe_id": "spiffe://td.example"}, "needs a path"),
        ({"spiffe_id": "nonsense"}, "must begin with spiffe://"),
        ({"chain": b""}, "SVID: 0 bytes"),
        ({"chain": b"\0" * 70_000}, "SVID: 70000 bytes"),
        ({"chain": b"\0\0"}, "not a sequence of DER certificates"),
        ({"chain": b"\x30"}, "not a sequence of DER certificates"),
        ({"chain": b"\x30\x89" + b"\1" * 9}, "not a sequence of DER certificates"),
        ({"chain": b"\x30\x05\0"}, "cut short"),
        ({"chain": b"\x30\0" * 9}, "9 certificates, at most 8"),
        ({"chain": b"\x30\0"}, "would be refused: malformed certificate"),
        ({"key": b""}, "not unencrypted PKCS#8"),
        ({"key": b"\0" * 20_000}, "at most 16 KiB"),
        ({"key": pkcs8(ed25519.Ed25519PrivateKey.generate())}, "no EC or RSA key"),
        (
            {"key": pkcs8(ec.generate_private_key(ec.SECP256R1()))},
            "not the certificate",
        ),
        ({"bundle": b""}, "trust bundle of td.example: 0 bytes"),
        ({"bundle": b"\x30\0"}, "trust bundle of td.example"),
        ({"federated": {"spiffe://td.example": b"\x30\0"}}, "not another domain's"),
        ({"federated": {"spiffe://b.example/x": b"\x30\0"}}, "not another domain's"),
        ({"federated": {"b.example": b"\x30\0"}}, "must begin with spiffe://"),
        (
            {"federated": {f"spiffe://b{n}": b"" for n in range(64)}},
            "64 federated bundles, at most 63",
        ),
    ],
)
def test_material_that_does_not_hold_is_refused_with_the_reason(
    material, parts, message
):
    with pytest.raises(IdentityError, match=message):
        read_identity(change(material, **parts), now=types.now())


@pytest.mark.parametrize("careless", [b"", b"\x30\0", b"\0"])
def test_a_partners_careless_bundle_takes_its_own_trust_domain_away_alone(
    material, careless, caplog
):
    good = ThrowAwayAuthority("c.example").bundle
    federated = {
        "spiffe://b.example": careless,
        "spiffe://c.example": good[0],
    }
    identity = read_identity(change(material, federated=federated), now=types.now())
    assert identity.bundles.keys() == {"td.example", "c.example"}
    assert "no SVID of b.example is believed" in caplog.text


def test_an_encrypted_key_is_refused_without_a_word_about_it(svid, material):
    key = svid.key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"x"),
    )
    with pytest.raises(IdentityError, match="not unencrypted PKCS#8"):
        read_identity(change(material, key=key), now=types.now())


def test_material_of_a_foreign_authority_is_refused(material):
    stranger = ThrowAwayAuthority("td.example")
    with pytest.raises(IdentityError, match="would be refused: no valid path"):
        read_identity(change(material, bundle=stranger.bundle[0]), now=types.now())


def test_material_that_peers_would_refuse_is_refused_by_ourselves(authority, material):
    expired = authority.forge(ME, starts_s=-90, ends_s=-60)
    with pytest.raises(IdentityError, match="would be refused"):
        read_identity(
            change(material, chain=expired.chain_der[0], key=expired.key_der()),
            now=types.now(),
        )
    with pytest.raises(IdentityError, match="leaf is a CA"):
        read_identity(
            change(material, chain=authority.forge(ME, ca=True).chain_der[0]),
            now=types.now(),
        )


def test_an_svid_gives_pem_that_others_read(authority, svid):
    (leaf,) = x509.load_pem_x509_certificates(svid.chain_pem())
    assert leaf.serial_number == svid.serial
    key = serialization.load_pem_private_key(svid.key_pem(), password=None)
    assert key.public_key() == leaf.public_key()
    again = verified_svid(svid.chain_der, key, authority.bundles, now=types.now())
    assert again.id == svid.id


def test_a_key_is_neither_shown_nor_pickled(svid, authority):
    assert "PrivateKey" not in repr(svid)
    assert "chain" not in repr(Identity(svid, authority.bundles))
    for thing in (svid, Identity(svid, authority.bundles)):
        with pytest.raises((IdentityError, TypeError)):
            pickle.dumps(thing)
    with pytest.raises(IdentityError, match="a key never leaves its process"):
        pickle.dumps(svid)


def test_an_identitys_bundles_cannot_be_changed(svid, authority):
    bundles = dict(authority.bundles)
    identity = Identity(svid, bundles)
    bundles["b.example"] = ()
    assert "b.example" not in identity.bundles
    with pytest.raises(TypeError):
        identity.bundles["b.example"] = ()


def test_a_partner_with_many_roots_of_one_subject_loses_its_own_domain(material):
    root = ThrowAwayAuthority("b.example").bundle[0]
    for count, names in ((8, {"td.example", "b.example"}), (9, {"td.example"})):
        federated = {"spiffe://b.example": root * count}
        sent = replace(material, federated=federated)
        assert set(read_identity(sent, now=types.now()).bundles) == names
    with pytest.raises(IdentityError, match="over 8 authorities of one subject"):
        read_identity(replace(material, bundle=material.bundle * 9), now=types.now())
