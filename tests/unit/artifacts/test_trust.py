from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.unit.artifacts.workshop import pem, signing_key
from ztserve.artifacts import TrustPolicy
from ztserve.artifacts.publish import sign_policy
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.errors import ConfigError, VerificationError

KEY = signing_key()
ONE = f'[[signers]]\nname = "a"\nkey = """{pem(KEY)}"""\nroles = ["trainer"]\n'


@pytest.fixture
def policy(tmp_path):
    def write(text):
        path = tmp_path / "trust.toml"
        path.write_text(text)
        path.chmod(0o644)
        return path

    return write


def test_a_policy_names_signers_by_key_text_or_by_a_file_beside_it(policy):
    path = policy(
        'version = 7\n[[signers]]\nname = "a"\nkey = "a.pub"\nroles = ["deployer"]\n'
    )
    (path.parent / "a.pub").write_text(pem(KEY))
    (path.parent / "a.pub").chmod(0o644)
    trust = TrustPolicy.load(path)
    assert trust.version == 7
    assert trust.signers[0].key_id == KEY.id
    assert trust.signers[0].roles == {"deployer"}
    assert trust.digest.startswith("sha256:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE, "version must be a number from 1 upwards"),
        ("version = 0\n" + ONE, "version must be a number from 1 upwards"),
        ("version = 1\n", r"no \[\[signers\]\]: such a policy would trust nobody"),
        ("version = 1\nverify = false\n" + ONE, "unknown key 'verify'; known: vers"),
        ("version = 1\n" + ONE + 'threshold = "x"\n', "unknown key 'threshold'"),
        ("version = 1\n" + ONE + "[revoked]\nall = []\n", "unknown key 'all'"),
        ("version = 1\n" + ONE + '[revoked]\nkeys = ["x"]\n', "keys holds 'x'; exp"),
        ("version = 1\n" + ONE + ONE, "have the same name"),
        ("version = 1\n" + ONE + ONE.replace('"a"', '"b"'), "have the same key_id"),
        ("version = 1\n" + ONE.replace('"trainer"', '"boss"'), "roles is .'boss'.;"),
        ("version = 1\n" + ONE.replace('"trainer"', ""), r"roles is \[\]"),
        ("version = 1\n" + ONE.replace('name = "a"', ""), "needs a name and a key"),
        ("version = 1\nsigners = [1]\n", "number 1 is not a table"),
        ("version = 1\nexpires = 2030-01-01T00:00:00\n" + ONE, "has no time zone"),
        ("version = 1\nexpires = 1\n" + ONE, "expires must be of kind datetime"),
        ("version = 1\nexpires = 2001-01-01T00:00:00Z\n" + ONE, "expired at 2001"),
        ("version = \n", "not TOML"),
        ("version = 1\nx = " + "[" * 3000, "not TOML: maximum recursion"),
        ("version = 0x" + "F" * 5000 + "\n" + ONE, "version must be a number"),
        (
            "version = 1\nexpires = 9999-12-31T23:59:59-23:59\n" + ONE,
            "expires is no time of the years 1 to 9999",
        ),
    ],
)
def test_a_policy_that_is_not_understood_is_refused(policy, text, message):
    with pytest.raises(ConfigError, match=message):
        TrustPolicy.load(policy(text))


def test_a_policy_is_never_empty_however_it_is_made():
    with pytest.raises(ConfigError, match="would trust nobody"):
        TrustPolicy(version=1, signers=(), digest="")


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_policy_that_others_may_write_is_refused(policy, mode):
    path = policy("version = 1\n" + ONE)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}.*run chmod go-w"):
        TrustPolicy.load(path)


def test_a_key_file_that_others_may_write_is_refused(policy):
    path = policy('version = 1\n[[signers]]\nname="a"\nkey="a.pub"\nroles=["trainer"]')
    (path.parent / "a.pub").write_text(pem(KEY))
    (path.parent / "a.pub").chmod(0o666)
    with pytest.raises(ConfigError, match=r"a.pub may be written by group or others"):
        TrustPolicy.load(path)


def test_a_policy_that_is_not_there_or_is_too_large_is_refused(policy, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read: No such"):
        TrustPolicy.load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="is larger than 1048576 bytes"):
        TrustPolicy.load(policy("#" * ((1 << 20) + 1)))


def public(key):
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (public(ec.generate_private_key(ec.SECP256K1())), "curve key on secp256k1"),
        (public(ec.generate_private_key(ec.SECP224R1())), "curve key on secp224r1"),
        (
            public(ed25519.Ed25519PrivateKey.generate()),
            "of kind Ed25519, which",
        ),
        (public(rsa.generate_private_key(65537, 2048)), "of kind RSA, which"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n", "is not a PEM public key"),
    ],
)
def test_a_key_below_the_floor_is_refused(policy, text, message):
    entry = f"version = 1\n{ONE.replace(pem(KEY), text.decode())}"
    with pytest.raises(ConfigError, match=message):
        TrustPolicy.load(policy(entry))


def test_a_key_counts_only_within_its_window(policy):
    window = (
        "not_before = 2030-01-01T00:00:00Z\nnot_after = 2031-01-01T01:00:00+01:00\n"
    )
    trust = TrustPolicy.load(policy("version = 1\n" + ONE + window))
    envelope = parse_envelope(KEY.envelope(b"{}"), what="model.sig")

    def at(*moment):
        return trust.verify(envelope, "trainer", now=datetime(*moment, tzinfo=UTC))

    assert at(2030, 6, 1).name == "a"
    with pytest.raises(VerificationError, match="trusted only from 2030-01-01"):
        at(2029, 12, 31)
    with pytest.raises(VerificationError, match="was trusted until 2031-01-01 00:00"):
        at(2031, 1, 1)


def test_the_root_signature_must_be_there_and_by_the_root(policy):
    path = policy("version = 1\n" + ONE)
    root = signing_key()
    with pytest.raises(ConfigError, match=r"trust.toml.sig: cannot be read"):
        TrustPolicy.load(path, root=pem(root))
    sign_policy(path, signing_key())
    with pytest.raises(ConfigError, match=r"not signed under the trust root"):
        TrustPolicy.load(path, root=pem(root))
    sign_policy(path, root)
    (path.parent / "root.pub").write_text(pem(root))
    assert TrustPolicy.load(path, root=path.parent / "root.pub").version == 1
