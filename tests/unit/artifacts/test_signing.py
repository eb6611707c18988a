import json

import pytest

from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import release_model, sign_model
from ztserve.errors import ConfigError, RegistryError, VerificationError


def test_signing_writes_the_bundle_beside_the_files(workshop):
    root = workshop.model()
    path = sign_model(root, workshop.keys["trainer"])
    assert path == root / "model.sig"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in root.glob(".new-*")] == []


def test_signing_again_replaces_the_signature_and_drops_the_old_release(workshop):
    root = workshop.signed()
    (root / "config.json").write_text('{"a": 1}')
    sign_model(root, workshop.keys["trainer"])
    with pytest.raises(VerificationError, match="is not released as 'digits'"):
        verify_model(root, "digits", workshop.trust)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.pt", "is a pickle"),
        (".git/config", "cannot be signed: .* is not canonical"),
        ("run.sh", "is code"),
    ],
)
def test_what_could_not_be_served_is_not_signed(workshop, name, message):
    root = workshop.model(files={name: b"x"})
    with pytest.raises(VerificationError, match=message):
        sign_model(root, workshop.keys["trainer"])
    assert not (root / "model.sig").exists()


def test_an_empty_or_absent_directory_is_not_signed(workshop):
    (workshop.path / "empty").mkdir()
    with pytest.raises(VerificationError, match="no file is signed"):
        sign_model(workshop.path / "empty", workshop.stranger)
    with pytest.raises(RegistryError, match="vanished"):
        sign_model(workshop.path / "nowhere", workshop.stranger)


def test_a_directory_changed_since_signing_is_not_released(workshop):
    root = workshop.model()
    sign_model(root, workshop.keys["trainer"])
    (root / "config.json").write_text("[]")
    with pytest.raises(VerificationError, match=r"'config.json' was changed"):
        release_model(root, workshop.keys["deployer"], name="digits", version="1")
    with pytest.raises(ConfigError, match="is no model name and version"):
        release_model(root, workshop.keys["deployer"], name="Digits!", version="1")


def test_a_bundle_has_the_fields_of_the_specification_and_no_others(workshop):
    bundle = json.loads((workshop.signed() / "model.sig").read_bytes())
    assert list(bundle) == ["mediaType", "verificationMaterial", "dsseEnvelope"]
