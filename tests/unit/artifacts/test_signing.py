import base64
import json

import pytest

from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import (
    choose_serialization,
    release_model,
    sign_model,
)
from ztserve.artifacts.publish.signing import SHARD_BYTES, SHARDS_FROM_BYTES
from ztserve.artifacts.statements.serialization import HASH_TYPES, Serialization
from ztserve.errors import ConfigError, RegistryError, VerificationError

SMALL = Serialization("sha256", 8)


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


def serialization_of(root):
    bundle = json.loads((root / "model.sig").read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return statement["predicate"]["serialization"]


@pytest.mark.parametrize("hash_type", HASH_TYPES)
@pytest.mark.parametrize("shard_size", [None, 16, 1 << 20])
def test_each_serialization_is_signed_released_and_loaded(
    workshop, hash_type, shard_size
):
    root, how = workshop.model(), Serialization(hash_type, shard_size)
    sign_model(root, workshop.keys["trainer"], serialization=how)
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    assert verify_model(root, "digits", workshop.trust).read("config.json") == b"{}"
    said = serialization_of(root)
    assert said["method"] == ("files" if shard_size is None else "shards")
    assert (said["hash_type"], said.get("shard_size")) == (hash_type, shard_size)
    config = root / "config.json"
    config.write_text("[]")
    title = {"sha256": "SHA-256", "blake3": "BLAKE3"}[hash_type]
    what = "its {}" if shard_size is None else "the {} of its bytes 0 to 2"
    with pytest.raises(VerificationError, match=what.format(title) + " is .*, signed"):
        verify_model(root, "digits", workshop.trust)


def test_equal_files_in_another_serialization_are_another_model(workshop):
    root, digests = workshop.model(), set()
    for how in (Serialization(), Serialization("blake3"), Serialization("sha256", 8)):
        sign_model(root, workshop.keys["trainer"], serialization=how)
        release_model(root, workshop.keys["deployer"], name="digits", version="1")
        digests.add(verify_model(root, "digits", workshop.trust).digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("sizes", "shard_size"),
    [
        ([], None),
        ([1, SHARDS_FROM_BYTES], None),
        ([1, SHARDS_FROM_BYTES + 1], SHARD_BYTES),
        ([0, SHARDS_FROM_BYTES + 1], None),
    ],
)
def test_large_files_are_signed_in_shards(sizes, shard_size):
    files = {str(n): size for n, size in enumerate(sizes)}
    assert choose_serialization(files) == Serialization("sha256", shard_size)
    assert choose_serialization(files, "blake3").hash_type == "blake3"


def test_an_empty_file_is_not_signed_in_shards(workshop):
    root = workshop.model(files={"empty.txt": b""})
    with pytest.raises(VerificationError, match=r"'empty.txt' is empty, .*'files'"):
        sign_model(root, workshop.keys["trainer"], serialization=SMALL)
    assert not (root / "model.sig").exists()


def test_more_shards_than_can_be_read_again_are_not_signed(workshop):
    root = workshop.model(files={"big.txt": bytes(70_000)})
    with pytest.raises(VerificationError, match=r"\d+ shards of 1 bytes; the limit"):
        sign_model(
            root, workshop.keys["trainer"], serialization=Serialization("sha256", 1)
        )
    assert not (root / "model.sig").exists()
