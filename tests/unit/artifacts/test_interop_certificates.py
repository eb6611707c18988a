"""Both ways with the model-signing package's certificate method."""

import model_signing
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.artifacts.studio import PAST, TRAINER, Studio
from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import SvidKey, release_model, sign_model
from ztserve.errors import VerificationError
from ztserve.identity.svid import pem as certificates_pem
from ztserve.testing.authority import ThrowAwayAuthority

CURVES = [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1]


@pytest.fixture
def studio(tmp_path):
    return Studio(tmp_path)


def write(studio, name, content):
    path = studio.path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("intermediate", [False, True])
def test_model_signing_verifies_what_an_svid_signs(studio, curve, intermediate):
    above = studio.spire.intermediate() if intermediate else studio.spire
    svid = above.forge(TRAINER, key=ec.generate_private_key(curve()))
    root = studio.signed(svid=svid)
    assert verify_model(root, "digits", studio.trust)
    roots = write(studio, "roots.pem", certificates_pem(studio.spire.bundle))
    config = model_signing.verifying.Config()
    config.use_certificate_verifier(certificate_chain=[roots])
    config.verify(root, root / "model.sig")
    (root / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="Hash mismatch"):
        config.verify(root, root / "model.sig")


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("with_root", [False, True])
def test_we_verify_what_model_signing_signs_with_an_svid(studio, curve, with_root):
    spire = ThrowAwayAuthority("example.test")
    between = spire.intermediate()
    svid = between.forge(TRAINER, key=ec.generate_private_key(curve()))
    root = studio.model()
    above = svid.chain_der[1:] + (spire.bundle if with_root else ())
    hashing = model_signing.hashing.Config().set_ignored_paths(
        paths=[root / "model.sig"]
    )
    model_signing.signing.Config().use_certificate_signer(
        private_key=write(studio, "key.pem", svid.key_pem()),
        signing_certificate=write(
            studio, "leaf.pem", certificates_pem(svid.chain_der[:1])
        ),
        certificate_chain=[write(studio, "above.pem", certificates_pem(above))],
    ).set_hashing_config(hashing).sign(root, root / "model.sig")
    release_model(root, studio.keys["deployer"], name="digits", version="1")
    trust = studio.write_policy(roots=certificates_pem(spire.bundle).decode())
    trainer, _ = verify_model(root, "digits", trust).signers
    assert (trainer.spiffe, trainer.signed_at) == (TRAINER, None)
    with pytest.raises(VerificationError, match="the signer's certificate, judged at"):
        verify_model(root, "digits", studio.write_policy())  # other roots


def test_a_model_signed_a_year_ago_verifies_offline(studio, monkeypatch):
    """No socket is opened: all that is needed is in the bundle and the policy."""
    root = studio.model()
    sign_model(root, studio.signer(at=PAST))
    release_model(root, studio.keys["deployer"], name="digits", version="1")
    trust = studio.trust

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert verify_model(root, "digits", trust).signers[0].signed_at == PAST
    assert (
        SvidKey(studio.svid).id == verify_model(root, "digits", trust).signers[0].key_id
    )
