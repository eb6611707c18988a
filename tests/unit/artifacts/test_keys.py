import base64
import os

import pytest
from cryptography.hazmat.primitives.asymmetric import (
    ec,
    ed448,
    ed25519,
    rsa,
    x25519,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tests.unit.artifacts.workshop import signing_key
from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import load_signer, new_key, read_passphrase
from ztserve.artifacts.publish.keys import MIN_PASSPHRASE
from ztserve.artifacts.statements.keys import load_public_key
from ztserve.errors import ConfigError

EXPLICIT = b"""-----BEGIN PUBLIC KEY-----
MIIBSzCCAQMGByqGSM49AgEwgfcCAQEwLAYHKoZIzj0BAQIhAP////8AAAABAAAA
AAAAAAAAAAAA////////////////MFsEIP////8AAAABAAAAAAAAAAAAAAAA////
///////////8BCBaxjXYqjqT57PrvVV2mIa8ZR0GsMxTsPY7zjw+J9JgSwMVAMSd
NgiG5wSTamZ44ROdJreBn36QBEEEaxfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5
RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9QIhAP////8AAAAA
//////////+85vqtpxeehPO5ysL8YyVRAgEBA0IABPI9ZP25HESNHmun4fD5ZA9Z
MEZ5XKM7Mux6amWTixKLfDO7sA1sxj6EE/FwGkkPRpWIyJ1cDwqycdsEzTHxBag=
-----END PUBLIC KEY-----
"""
"""On P-256, spelled out: made with openssl ecparam -param_enc explicit."""
P256_GENERATOR = bytes.fromhex(
    "046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
)


def test_a_new_key_is_private_and_its_entry_makes_a_trust_policy(workshop):
    made = new_key(workshop.path / "ci.pem", name="ci", roles=["trainer", "deployer"])
    assert made.private.stat().st_mode & 0o777 == 0o600
    assert made.public.stat().st_mode & 0o777 == 0o644
    signer = load_signer(made.private)
    assert signer.id == made.id
    assert "PRIVATE" not in repr(signer)
    workshop.keys["trainer"] = signer
    workshop.write_policy({"deployer": ["deployer"]}, tail=made.entry)
    assert verify_model(workshop.signed(), "digits", workshop.trust)


SECRET = "correct horse battery"


def test_a_passphrase_seals_the_key(tmp_path):
    new_key(tmp_path / "a.pem", name="a", roles=["trainer"], passphrase=SECRET)
    assert b"ENCRYPTED" in (tmp_path / "a.pem").read_bytes()
    assert load_signer(tmp_path / "a.pem", SECRET)
    with pytest.raises(ConfigError, match="needs its passphrase"):
        load_signer(tmp_path / "a.pem")
    with pytest.raises(ConfigError, match="the passphrase is wrong"):
        load_signer(tmp_path / "a.pem", "guess")
    new_key(tmp_path / "b.pem", name="b", roles=["trainer"])
    with pytest.raises(ConfigError, match="needs no passphrase"):
        load_signer(tmp_path / "b.pem", SECRET)


def test_a_passphrase_is_asked_for_only_where_the_key_has_one(tmp_path):
    asked = []

    def ask():
        asked.append(1)
        return SECRET

    new_key(tmp_path / "a.pem", name="a", roles=["trainer"])
    new_key(tmp_path / "b.pem", name="b", roles=["trainer"], passphrase=SECRET)
    assert load_signer(tmp_path / "a.pem", ask)
    assert asked == []
    assert load_signer(tmp_path / "b.pem", ask)
    assert asked == [1]


@pytest.mark.parametrize("passphrase", ["", "short", "x" * (MIN_PASSPHRASE - 1)])
def test_a_passphrase_that_is_soon_guessed_is_refused(tmp_path, passphrase):
    """The empty one above all: it would leave the key open without a word."""
    with pytest.raises(ConfigError, match=r"characters is soon guessed .* at least 12"):
        new_key(tmp_path / "a.pem", name="a", roles=["trainer"], passphrase=passphrase)
    assert list(tmp_path.iterdir()) == []


def test_a_passphrase_that_no_key_can_have_is_refused(tmp_path):
    for passphrase in ("x" * 1024, "\u00e9" * 512):
        with pytest.raises(ConfigError, match=r"of 1024 bytes .* at most 1023"):
            new_key(tmp_path / "a", name="a", roles=["trainer"], passphrase=passphrase)
    assert list(tmp_path.iterdir()) == []
    private = tmp_path / "b.pem"
    new_key(private, name="b", roles=["trainer"], passphrase="x" * 1023)
    assert load_signer(private, "x" * 1023)


def private_file(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("content", "passphrase"),
    [
        (b"four words and more", "four words and more"),
        (b"four words and more\n", "four words and more"),
        (b"four words and more\r\n", "four words and more"),
        (b" spaces count ", " spaces count "),
        ("d\u00e9j\u00e0 vu encore\n".encode(), "d\u00e9j\u00e0 vu encore"),
    ],
)
def test_a_passphrase_file_is_one_line(tmp_path, content, passphrase):
    assert read_passphrase(private_file(tmp_path / "p", content)) == passphrase


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the passphrase as the one line"),
        (b"\n", "expected the passphrase as the one line"),
        (b"one\ntwo\n", "expected the passphrase as the one line"),
        (b"nul\0byte", "without control characters"),
        (b"\xff\xfe", "the passphrase is not UTF-8"),
        (b"x" * 1026, "is larger than 1025 bytes, too large for a passphrase"),
    ],
)
def test_a_passphrase_file_of_anything_else_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        read_passphrase(private_file(tmp_path / "p", content))


@pytest.mark.parametrize("read", [read_passphrase, load_signer])
def test_secrets_are_read_from_private_regular_files_only(tmp_path, read):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "p")
    private_file(tmp_path / "p", b"four words and more").chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 640\): run chmod 600"):
        read(tmp_path / "p")
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match="is no regular file"):
        read(tmp_path / "fifo")


@pytest.mark.parametrize(
    ("name", "curve"),
    [("P-256", ec.SECP256R1), ("P-384", ec.SECP384R1), ("P-521", ec.SECP521R1)],
)
def test_each_curve_signs_and_verifies(workshop, name, curve):
    path = workshop.path / "a.pem"
    made = new_key(path, name="a", roles=["trainer", "deployer"], curve=name)
    signer = load_signer(made.private)
    assert signer._key.curve.name == curve().name
    workshop.keys["trainer"] = signer
    workshop.write_policy({"deployer": ["deployer"]}, tail=made.entry)
    assert verify_model(workshop.signed(), "digits", workshop.trust)


WEAK_OR_STRANGE = {
    "RSA 2048": (lambda: rsa.generate_private_key(65537, 2048), "of kind RSA, which"),
    "Ed25519": (ed25519.Ed25519PrivateKey.generate, "of kind Ed25519, which"),
    "Ed448": (ed448.Ed448PrivateKey.generate, "of kind Ed448, which"),
    "X25519": (x25519.X25519PrivateKey.generate, "of kind X25519, which"),
    "P-192": (
        lambda: ec.generate_private_key(ec.SECP192R1()),
        "an elliptic-curve key on secp192r1",
    ),
    "P-224": (
        lambda: ec.generate_private_key(ec.SECP224R1()),
        "an elliptic-curve key on secp224r1",
    ),
    "secp256k1": (
        lambda: ec.generate_private_key(ec.SECP256K1()),
        "an elliptic-curve key on secp256k1",
    ),
    "brainpool": (
        lambda: ec.generate_private_key(ec.BrainpoolP256R1()),
        "an elliptic-curve key on brainpoolP256r1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WEAK_OR_STRANGE)
def test_a_key_below_the_floor_neither_signs_nor_counts(tmp_path, case):
    make, message = WEAK_OR_STRANGE[case]
    key = make()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    end = "signers need a key on P-256, P-384 or P-521: make one with `ztserve key new`"
    with pytest.raises(ConfigError, match=f"{message}.*{end}"):
        load_signer(private_file(tmp_path / "a.pem", pem))
    public = key.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    with pytest.raises(ConfigError, match=f"the key is .*{message}.*{end}"):
        load_public_key(public, "the key")


def test_a_curve_with_a_generator_of_ones_own_is_refused():
    """Else anyone could give a trusted public key a private one (CVE-2020-0601)."""
    named = load_public_key(EXPLICIT, "the key")
    assert named.curve.name == "secp256r1"
    der = base64.b64decode(b"".join(EXPLICIT.splitlines()[1:-1]))
    point = named.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    forged = der.replace(P256_GENERATOR, point)  # the private key is 1 then
    assert forged != der
    pem = b"-----BEGIN PUBLIC KEY-----\n%b-----END PUBLIC KEY-----\n"
    with pytest.raises(ConfigError, match="on a curve known by its name"):
        load_public_key(pem % base64.encodebytes(forged), "the key")


def test_a_private_key_in_a_trust_policy_is_refused_by_name(tmp_path):
    made = new_key(tmp_path / "a.pem", name="a", roles=["trainer"])
    with pytest.raises(ConfigError, match=r"is a private key: it belongs to its signe"):
        load_public_key(made.private.read_bytes(), "the key")


@pytest.mark.parametrize("there", ["a.pem", "a.pub"])
def test_a_key_is_never_overwritten(tmp_path, there):
    (tmp_path / there).write_text("precious")
    with pytest.raises(ConfigError, match="exists; a key is never overwritten"):
        new_key(tmp_path / "a.pem", name="a", roles=["trainer"])
    assert (tmp_path / there).read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_key_that_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"another suffix than .pub"):
        new_key(tmp_path / "a.pub", name="a", roles=["trainer"])
    with pytest.raises(ConfigError, match="expected some of trainer, evaluator"):
        new_key(tmp_path / "a.pem", name="a", roles=["boss"])
    with pytest.raises(ConfigError, match="expected one of P-256, P-384, P-521"):
        new_key(tmp_path / "a.pem", name="a", roles=["trainer"], curve="P-192")
    with pytest.raises(ConfigError, match="No such file"):
        new_key(tmp_path / "nowhere/a.pem", name="a", roles=["trainer"])


def test_a_private_key_that_others_may_read_is_refused(tmp_path):
    made = new_key(tmp_path / "a.pem", name="a", roles=["trainer"])
    made.private.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 640\): run chmod 600"):
        load_signer(made.private)


def test_a_file_that_is_no_private_key_is_refused(tmp_path):
    (tmp_path / "a.pem").write_text("x")
    (tmp_path / "a.pem").chmod(0o600)
    with pytest.raises(ConfigError, match="is no PEM private key"):
        load_signer(tmp_path / "a.pem")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_signer(tmp_path / "b.pem")
    with pytest.raises(ConfigError, match="on secp256k1; signers need a key on P-256"):
        signing_key(ec.SECP256K1)
