"""Both ways with the model-signing package, for what the two have in common."""

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
from ztserve.artifacts.publish import release_model
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


@pytest.mark.parametrize("settings", ["shards", "blake3"])
def test_what_model_signing_can_and_we_cannot_is_refused_by_name(workshop, settings):
    root = workshop.model()
    private, _ = stock_key(workshop, workshop.keys["trainer"])
    hashing = model_signing.hashing.Config().set_ignored_paths(
        paths=[root / "model.sig"]
    )
    if settings == "shards":
        hashing.use_shard_serialization()
    else:
        hashing.use_file_serialization(hashing_algorithm="blake3")
    model_signing.signing.Config().use_elliptic_key_signer(
        private_key=private
    ).set_hashing_config(hashing).sign(root, root / "model.sig")
    with pytest.raises(VerificationError, match=f"'{settings}' is not supported"):
        verify_model(root, "digits", workshop.trust)
