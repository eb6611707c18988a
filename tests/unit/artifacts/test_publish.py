import fcntl
import hashlib
import json
import os

import pytest

from tests.unit.artifacts.workshop import signing_key
from ztserve.artifacts import open_registry, verify_model
from ztserve.artifacts.publish import publish, release_model, set_alias, sign_model
from ztserve.artifacts.publish.atomic import prepared
from ztserve.errors import ConfigError, RegistryError, VerificationError
from ztserve.types import ModelRef


def aliases(workshop):
    raw = json.loads((workshop.registry / "index.json").read_bytes())
    return {
        node["annotations"]["dev.ztserve.model.version"]: node["annotations"][
            "dev.ztserve.model.aliases"
        ]
        for node in raw["manifests"]
    }


def test_a_published_registry_is_a_proper_image_layout(workshop):
    workshop.published()
    layout = json.loads((workshop.registry / "oci-layout").read_bytes())
    assert layout == {"imageLayoutVersion": "1.0.0"}
    for path in (workshop.registry / "blobs/sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert path.stat().st_mode & 0o777 == 0o444
    node = json.loads((workshop.registry / "index.json").read_bytes())["manifests"][0]
    assert node["annotations"]["org.opencontainers.image.ref.name"] == "digits:1"
    image = workshop.registry / "blobs/sha256" / node["digest"].split(":")[1]
    titles = [
        layer["annotations"]["org.opencontainers.image.title"]
        for layer in json.loads(image.read_bytes())["layers"]
    ]
    assert titles == ["config.json", "model.safetensors", "model.sig", "release.sig"]


def test_an_alias_moves_to_what_is_published_last_or_where_it_is_set(workshop):
    workshop.published("one", version="1")
    workshop.published("two", version="2", fill=2.0)
    assert aliases(workshop) == {"1": "", "2": "production"}
    set_alias(workshop.registry, name="digits", alias="production", version="1")
    set_alias(workshop.registry, name="digits", alias="canary", version="1")
    assert aliases(workshop) == {"1": "canary,production", "2": ""}


def test_publishing_the_same_again_changes_nothing_but_the_alias(workshop):
    workshop.published("one", version="1")
    workshop.published("two", version="2", fill=2.0)
    again = publish(
        workshop.path / "one", workshop.registry, name="digits", version="1"
    )
    assert aliases(workshop) == {"1": "production", "2": ""}
    registry = open_registry(workshop.registry)
    assert registry.resolve(ModelRef("digits@production")) == again
    assert registry.resolve(ModelRef("digits")).version == "2"


def test_a_new_signature_over_the_same_files_replaces_the_old_one(workshop):
    root = workshop.signed()
    publish(root, workshop.registry, name="digits", version="1", aliases=["canary"])
    workshop.keys["trainer"] = signing_key()
    sign_model(root, workshop.keys["trainer"])
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    publish(root, workshop.registry, name="digits", version="1")
    assert aliases(workshop) == {"1": "canary,production"}
    roles = {"trainer": ["trainer"], "deployer": ["deployer"]}
    assert verify_model(
        workshop.registry, "digits@canary", workshop.write_policy(roles)
    )


def test_a_broken_blob_is_written_anew(workshop):
    workshop.published()
    blob = workshop.registry / "blobs/sha256" / hashlib.sha256(b"{}").hexdigest()
    blob.chmod(0o644)
    blob.write_text("broken")
    publish(workshop.path / "digits", workshop.registry, name="digits", version="1")
    assert verify_model(workshop.registry, "digits", workshop.trust)


def test_other_images_in_the_layout_stay(workshop):
    workshop.published("one", version="1")
    path = workshop.registry / "index.json"
    index = json.loads(path.read_bytes())
    foreign = {"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": 1}
    path.write_text(json.dumps({**index, "manifests": [foreign, *index["manifests"]]}))
    workshop.published("two", version="2")
    assert json.loads(path.read_bytes())["manifests"][0] == foreign


def test_what_is_not_released_as_this_is_not_published(workshop):
    root = workshop.model()
    with pytest.raises(VerificationError, match="is not signed"):
        publish(root, workshop.registry, name="digits", version="1")
    sign_model(root, workshop.keys["trainer"])
    with pytest.raises(VerificationError, match="a deployer must release it first"):
        publish(root, workshop.registry, name="digits", version="1")
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    with pytest.raises(VerificationError, match="asked for digits:2"):
        publish(root, workshop.registry, name="digits", version="2")
    (root / "extra.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"extra file 'extra.json'"):
        publish(root, workshop.registry, name="digits", version="1")
    assert not workshop.registry.exists()


@pytest.mark.parametrize(("name", "alias"), [("digits", "a,b"), ("Digits", "a")])
def test_names_that_nobody_could_ask_for_are_refused(workshop, name, alias):
    root = workshop.signed()
    with pytest.raises(ConfigError):
        publish(root, workshop.registry, name=name, version="1", aliases=[alias])


def test_a_folder_that_is_something_else_is_not_made_a_registry(workshop):
    root = workshop.signed()
    with pytest.raises(RegistryError, match="is neither a registry nor empty"):
        publish(root, root, name="digits", version="1")


def test_a_registry_whose_making_was_cut_short_is_finished(workshop):
    workshop.registry.mkdir()
    (workshop.registry / "oci-layout").write_text("{}")
    workshop.published()
    assert verify_model(workshop.registry, "digits", workshop.trust)


def test_an_index_that_readers_would_refuse_is_not_written(workshop, monkeypatch):
    workshop.published("one", version="1")
    monkeypatch.setattr("ztserve.artifacts.registry.layout.MAX_MODELS", 1)
    with pytest.raises(RegistryError, match="2 entries, the limit is 1"):
        workshop.published("two", version="2")
    assert aliases(workshop) == {"1": "production"}


def test_an_alias_of_nothing_is_refused(workshop):
    with pytest.raises(RegistryError, match="is no registry"):
        set_alias(workshop.registry, name="digits", alias="a", version="1")
    workshop.published()
    with pytest.raises(RegistryError, match="has no digits:9"):
        set_alias(workshop.registry, name="digits", alias="a", version="9")


def test_two_publishers_do_not_mix(workshop):
    root = workshop.signed()
    workshop.registry.mkdir()
    descriptor = os.open(workshop.registry, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(RegistryError, match="somebody else publishes"):
            publish(root, workshop.registry, name="digits", version="1")
    finally:
        os.close(descriptor)
    assert publish(root, workshop.registry, name="digits", version="1")


def test_files_prepared_together_are_all_written_or_none(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    files = {tmp_path / "a": b"new", tmp_path / "b": b"new"}
    with pytest.raises(RegistryError), prepared(files):
        raise RegistryError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
    with prepared(files):
        pass
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a": b"new",
        "b": b"new",
    }
