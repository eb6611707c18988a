"""Both ways with the model-signing package, for what the two have in common."""

import base64
import json

import model_signing
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from tests.unit.artifacts.workshop import pem, signing_key
from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import release_model, sign_model
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import VerificationError


def stock_key(workshop, key):
    private, public = workshop.path / "stock.pem", workshop.path / "stock.pub"
    private.write_bytes(
        key._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    public.write_text(pem(key))
    return private, public


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_model_signing_verifies_what_we_sign(workshop, curve):
    workshop.keys["trainer"] = signing_key(curve)
    root = workshop.signed(files={"a.b": b"1", "a/b.txt": b"2", "empty.txt": b""})
    _, public = stock_key(workshop, workshop.keys["trainer"])
    config = model_signing.verifying.Config()
    config.use_elliptic_key_verifier(public_key=public)
    config.verify(root, root / "model.sig")
    (root / "a.b").write_bytes(b"3")
    with pytest.raises(ValueError, match=r"Hash mismatch for .{1,3}a\.b"):
        config.verify(root, root / "model.sig")


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_we_verify_what_model_signing_signs(workshop, curve):
    workshop.keys["trainer"] = signing_key(curve)
    trust = workshop.write_policy()
    root = workshop.model(files={"a.b": b"1", "a/b.txt": b"2", "empty.txt": b""})
    private, _ = stock_key(workshop, workshop.keys["trainer"])
    hashing = model_signing.hashing.Config().set_ignored_paths(
        paths=[root / "model.sig"]
    )
    model_signing.signing.Config().use_elliptic_key_signer(
        private_key=private
    ).set_hashing_config(hashing).sign(root, root / "model.sig")
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    assert "a/b.txt" in verify_model(root, "digits", trust).names


def hashing_config(root, how):
    """How model-signing is told a serialization."""
    config = model_signing.hashing.Config().set_ignored_paths(
        paths=[root / "model.sig", root / "release.sig"]
    )
    if how.shard_size is None:
        return config.use_file_serialization(hashing_algorithm=how.hash_type)
    return config.use_shard_serialization(
        hashing_algorithm=how.hash_type, shard_size=how.shard_size
    )


BOTH_SUPPORT = [
    Serialization("sha256"),
    Serialization("blake3"),
    Serialization("sha256", 8),
    Serialization("sha256", 100),
    Serialization("sha256", 1_000_000_000),
]
"""model-signing signs files where it is asked for shards of blake3."""
FILES = {"a.b": b"1" * 16, "a/b.txt": b"2" * 1000, "a-b/c.txt": b"3"}


@pytest.mark.parametrize("told", [True, False], ids=["told", "guessed"])
@pytest.mark.parametrize("how", BOTH_SUPPORT, ids=str)
def test_model_signing_verifies_each_serialization_of_ours(workshop, how, told):
    root = workshop.model(files=FILES)
    sign_model(root, workshop.keys["trainer"], serialization=how)
    _, public = stock_key(workshop, workshop.keys["trainer"])
    config = model_signing.verifying.Config()
    config.use_elliptic_key_verifier(public_key=public)
    if told:
        config.set_hashing_config(hashing_config(root, how))
    config.verify(root, root / "model.sig")
    (root / "a.b").write_bytes(b"1" * 15 + b"0")
    with pytest.raises(ValueError, match=r"Hash mismatch for .{1,3}a\.b"):
        config.verify(root, root / "model.sig")


def stock_sign(workshop, root, config):
    private, _ = stock_key(workshop, workshop.keys["trainer"])
    model_signing.signing.Config().use_elliptic_key_signer(
        private_key=private
    ).set_hashing_config(config).sign(root, root / "model.sig")


@pytest.mark.parametrize("how", BOTH_SUPPORT, ids=str)
def test_we_verify_each_serialization_of_model_signing(workshop, how):
    root = workshop.model(files=FILES)
    stock_sign(workshop, root, hashing_config(root, how))
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    assert "a/b.txt" in verify_model(root, "digits", workshop.trust).names
    (root / "a.b").write_bytes(b"1" * 15 + b"0")
    with pytest.raises(VerificationError, match=r"'a.b' was changed after signing"):
        verify_model(root, "digits", workshop.trust)


def test_model_signing_verifies_a_directory_that_has_attestations(workshop):
    root = workshop.signed()
    workshop.evaluate(root)
    _, public = stock_key(workshop, workshop.keys["trainer"])
    config = model_signing.verifying.Config().use_elliptic_key_verifier(
        public_key=public
    )
    config.verify(root, root / "model.sig")
    (root / "attestations/evaluation.sig").rename(root / "evaluation.sig")
    with pytest.raises(ValueError, match=r"Extra files.*evaluation.sig"):
        config.verify(root, root / "model.sig")


@pytest.mark.parametrize("how", BOTH_SUPPORT, ids=str)
def test_both_put_the_same_resources_into_the_same_order(workshop, how):
    root = workshop.model(files=FILES)
    statements = []
    stock_sign(workshop, root, hashing_config(root, how))
    statements.append(payload(root))
    sign_model(root, workshop.keys["trainer"], serialization=how)
    statements.append(payload(root))
    theirs, ours = (statement["predicate"]["resources"] for statement in statements)
    assert theirs == ours


def payload(root):
    bundle = json.loads((root / "model.sig").read_bytes())
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


@pytest.mark.parametrize("sharded", [True, False])
def test_blake2b_which_model_signing_itself_cannot_guess_is_refused(workshop, sharded):
    root = workshop.model()
    config = model_signing.hashing.Config().set_ignored_paths(
        paths=[root / "model.sig"]
    )
    use = config.use_shard_serialization if sharded else config.use_file_serialization
    stock_sign(workshop, root, use(hashing_algorithm="blake2"))
    _, public = stock_key(workshop, workshop.keys["trainer"])
    theirs = model_signing.verifying.Config()
    theirs.use_elliptic_key_verifier(public_key=public)
    with pytest.raises((ValueError, TypeError)):
        theirs.verify(root, root / "model.sig")
    with pytest.raises(VerificationError, match="hash_type 'blake2b' is not supported"):
        verify_model(root, "digits", workshop.trust)


def test_shards_of_blake3_are_between_us_alone(workshop):
    root = workshop.model()
    how = Serialization("blake3", 100)
    sign_model(root, workshop.keys["trainer"], serialization=how)
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    assert verify_model(root, "digits", workshop.trust)
    _, public = stock_key(workshop, workshop.keys["trainer"])
    config = model_signing.verifying.Config()
    config.use_elliptic_key_verifier(public_key=public)
    with pytest.raises(ValueError, match="Signature mismatch"):
        config.verify(root, root / "model.sig")
