import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.artifacts.workshop import signing_key
from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import load_signer, new_key
from ztserve.errors import ConfigError


def test_a_new_key_is_private_and_its_entry_makes_a_trust_policy(workshop):
    made = new_key(workshop.path / "ci.pem", name="ci", roles=["trainer", "deployer"])
    assert made.private.stat().st_mode & 0o777 == 0o600
    assert made.public.stat().st_mode & 0o777 == 0o644
    signer = load_signer(made.private)
    assert signer.id == made.id
    assert "PRIVATE" not in repr(signer)
    workshop.keys["trainer"] = workshop.keys["deployer"] = signer
    workshop.policy_path.write_text("version = 1\n" + made.entry)
    assert verify_model(workshop.signed(), "digits", workshop.trust)


def test_a_passphrase_seals_the_key(tmp_path):
    new_key(tmp_path / "a.pem", name="a", roles=["trainer"], passphrase="secret")
    assert b"ENCRYPTED" in (tmp_path / "a.pem").read_bytes()
    assert load_signer(tmp_path / "a.pem", "secret")
    with pytest.raises(ConfigError, match="needs its passphrase"):
        load_signer(tmp_path / "a.pem")
    with pytest.raises(ConfigError, match="the passphrase is wrong"):
        load_signer(tmp_path / "a.pem", "guess")
    new_key(tmp_path / "b.pem", name="b", roles=["trainer"])
    with pytest.raises(ConfigError, match="needs no passphrase"):
        load_signer(tmp_path / "b.pem", "secret")


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
