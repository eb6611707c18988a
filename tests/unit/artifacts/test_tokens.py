"""Keys in a token, against SoftHSM 2."""

import shutil
import sys

import model_signing
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.artifacts.softhsm import CURVES, PIN, nobody, soft_hsm
from tests.unit.artifacts.workshop import pem
from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import TokenKey, TokenUri
from ztserve.artifacts.publish.tokens import read_public_key
from ztserve.artifacts.statements import der
from ztserve.artifacts.statements.envelope import check_signature, parse_envelope
from ztserve.errors import ArtifactError, ConfigError

pytestmark = pytest.mark.slow
TEXT = "text/plain"


@pytest.fixture
def hsm():
    return soft_hsm()


@pytest.mark.parametrize("label", CURVES)
def test_a_tokens_key_signs_on_each_curve(hsm, label):
    key = hsm.key(label)
    assert key.public.curve.name == CURVES[label]
    assert repr(key) == f"TokenKey({key.id})"
    envelope = parse_envelope(
        key.envelope(b"told", payload_type=TEXT), what="it", payload_type=TEXT
    )
    assert (envelope.payload, envelope.key_id) == (b"told", key.id)
    check_signature(envelope, key.public)


@pytest.mark.parametrize("label", CURVES)
def test_a_model_signed_by_a_token_verifies_here_and_with_model_signing(
    hsm, workshop, label
):
    workshop.keys["trainer"] = hsm.key(label)
    trust = workshop.write_policy()
    root = workshop.signed()
    assert verify_model(root, "digits", trust).signers[0].name == "trainer"
    public = workshop.path / "token.pub"
    public.write_text(pem(workshop.keys["trainer"]))
    config = model_signing.verifying.Config()
    config.use_elliptic_key_verifier(public_key=public)
    config.verify(root, root / "model.sig")
    (root / "config.json").write_bytes(b"[]")
    with pytest.raises(ValueError, match=r"Hash mismatch for .{1,3}config\.json"):
        config.verify(root, root / "model.sig")


def test_a_key_is_found_by_its_id_and_its_token_by_its_serial(hsm):
    by_label = hsm.key("trainer")
    uri = hsm.uri(None, id="\x01", serial=by_label._token.serial.decode())
    assert TokenKey(TokenUri.parse(uri), nobody).id == by_label.id
    assert TokenUri.parse(uri).name == "01"


def test_a_key_that_asks_for_its_pin_each_time_gets_it(hsm):
    key = hsm.key("careful")
    key.envelope(b"one")
    key.envelope(b"two")
    with pytest.raises(ArtifactError, match="UserNotLoggedIn"), key._logged_in() as it:
        key._private(it).sign(bytes(32), mechanism=key._pkcs11.Mechanism.ECDSA)
    with key._logged_in() as session:
        key._pin = key._pkcs11.PROTECTED_AUTH
        with pytest.raises(ConfigError, match="anew for each signature, and not"):
            key._signed(key._private(session), bytes(32))


def test_a_pin_is_asked_for_once_and_kept_by_the_key(hsm):
    asked = []
    uri = hsm.uri("trainer").partition("&pin-source")[0]
    key = TokenKey(TokenUri.parse(uri), lambda what: asked.append(what) or PIN)
    key.envelope(b"one")
    key.envelope(b"two")
    assert asked == ["PIN of the token signing"]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("nothing", "0 private keys, expected one; `pkcs11-tool --login"),
        ("twin", "2 private keys, expected one"),
        ("lonely", "0 public keys with the private one's id, expected one"),
        ("rsa", "a key of kind RSA that signs; expected one on P-256"),
        ("silent", "a key of kind EC that does not sign; expected one on P-256"),
        ("koblitz", "is on no curve that signers may use; expected P-256"),
    ],
)
def test_a_key_that_cannot_be_a_signers_is_refused(hsm, label, message):
    with pytest.raises(ConfigError, match=message):
        hsm.key(label)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("nowhere", "0 such tokens behind .*, expected one; those there are '"),
        ("double", "2 such tokens behind .*: name it by token and serial"),
    ],
)
def test_it_must_be_one_token(hsm, token, message):
    with pytest.raises(ConfigError, match=message):
        hsm.key("trainer", token=token)


def test_a_wrong_pin_is_told_and_not_repeated(hsm, tmp_path):
    file = tmp_path / "pin"
    file.write_text("wrong-horse-7")
    file.chmod(0o600)
    with pytest.raises(ArtifactError, match="the PIN is wrong; after a few") as caught:
        hsm.key("trainer", pin=file)
    assert "wrong-horse" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("PinLocked", "who administers the token sets a new one"),
        ("PinExpired", "set a new one with the token's tool"),
        ("UserPinNotInitialized", "it has no PIN yet"),
        ("MechanismInvalid", "it does not sign with ECDSA"),
        ("DeviceRemoved", "put it back, and sign again"),
        ("DeviceError", "of the token token=signing: DeviceError"),
    ],
)
def test_what_a_module_says_becomes_a_sentence(hsm, kind, message):
    key = hsm.key("trainer")
    with pytest.raises(ArtifactError, match=message), key._logged_in():
        raise getattr(key._pkcs11, kind)


def test_a_fault_that_ends_the_session_too_is_told_first(hsm):
    key = hsm.key("trainer")

    def removed():
        with key._logged_in() as session:
            session.close()  # so that it cannot be closed again
            raise key._pkcs11.DeviceRemoved

    with pytest.raises(ArtifactError, match="put it back"):
        removed()


def test_a_pin_that_others_may_read_is_refused(hsm, tmp_path):
    file = tmp_path / "pin"
    file.write_text(PIN)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"is a PIN that others may use \(mode 640\)"):
        hsm.key("trainer", pin=file)


def test_a_module_that_is_none_is_refused(hsm, tmp_path):
    (tmp_path / "text.so").write_text("no library")
    shutil.copy("/lib/x86_64-linux-gnu/libm.so.6", tmp_path / "libm.so")
    for name, error, message in (
        ("nothing.so", ConfigError, "cannot be read: No such file .*libsofthsm2"),
        ("text.so", ArtifactError, "OS exception while loading"),
        ("libm.so", ArtifactError, "PKCS11Error"),
    ):
        uri = hsm.uri("trainer").replace(str(hsm.module), str(tmp_path / name))
        with pytest.raises(error, match=message):
            TokenKey(TokenUri.parse(uri), nobody)


def test_without_the_extra_a_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    uri = TokenUri.parse("pkcs11:token=a;object=b?module-path=/usr/lib/x.so")
    with pytest.raises(ConfigError, match=r"pip install 'ztserve\[pkcs11\]'"):
        TokenKey(uri, nobody)


P256 = der.oid("1.2.840.10045.3.1.7")


@pytest.mark.parametrize(
    ("params", "point", "message"),
    [
        (P256, b"", "0 DER elements, expected one"),
        (P256, b"\x04\x01\x00", "is no point"),
        (P256, der.element(der.OCTETS, b"\x04" + bytes(64)), "is no point"),
        (P256, der.element(der.SEQUENCE), "DER tag 0x30, expected 0x04"),
        (P256[:-1], b"", "is on no curve that signers may use"),
        (der.sequence(der.integer(1)), b"", "is on no curve that signers may use"),
        (b"", b"", "is on no curve that signers may use"),
    ],
)
def test_a_public_key_that_is_none_is_refused(params, point, message):
    with pytest.raises(ConfigError, match=message):
        read_public_key(params, point, "the key")


def test_a_public_key_is_read_from_its_point():
    key = ec.derive_private_key(1, ec.SECP256R1()).public_key()
    numbers = key.public_numbers()
    encoded = b"\x04" + numbers.x.to_bytes(32) + numbers.y.to_bytes(32)
    assert read_public_key(P256, der.element(der.OCTETS, encoded), "the key") == key
