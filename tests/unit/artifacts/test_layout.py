import json

import pytest

from ztserve.artifacts import Resolved, open_registry
from ztserve.artifacts.registry.layout import parse_index, parse_layers
from ztserve.errors import RegistryError, VerificationError
from ztserve.types import ModelRef

DIGEST = "sha256:" + "a" * 64


def node(name="digits", version="1", digest=DIGEST, **more):
    notes = {
        "dev.ztserve.model.name": name,
        "dev.ztserve.model.version": version,
        "dev.ztserve.model.digest": digest,
    }
    return {"digest": DIGEST, "size": 2, "annotations": notes, **more}


def index(*nodes):
    return json.dumps({"schemaVersion": 2, "manifests": nodes}).encode()


def test_references_resolve_by_version_alias_digest_and_to_the_newest(workshop):
    one = workshop.published("one", version="1")
    two = workshop.published("two", version="2", fill=2.0)
    registry = open_registry(workshop.registry)
    for ref, expected in {
        "digits:1": one,
        "digits:2": two,
        "digits": two,
        "digits@production": two,
        f"digits@{one.digest}": one,
        f"digits:1@{one.digest}": one,
    }.items():
        assert registry.resolve(ModelRef(ref)) == expected


@pytest.mark.parametrize(
    "ref", ["fraud", "digits:9", "digits@canary", "digits@sha256:" + "0" * 64]
)
def test_what_is_not_there_is_a_registry_error(workshop, ref):
    workshop.published()
    registry = open_registry(workshop.registry)
    with pytest.raises(RegistryError, match=f"has no (model '{ref}'|{ref})"):
        registry.resolve(ModelRef(ref))


def test_an_alias_of_two_versions_is_refused(workshop):
    workshop.published("one", version="1")
    workshop.published("two", version="2")
    path = workshop.registry / "index.json"
    path.write_text(path.read_text().replace('aliases": ""', 'aliases": "production"'))
    with pytest.raises(RegistryError, match="digits@production is ambiguous"):
        open_registry(workshop.registry).resolve(ModelRef("digits@production"))


def test_files_and_bundles_are_read_by_what_was_resolved(workshop):
    model = workshop.published()
    registry = open_registry(workshop.registry)  # resolves by itself
    assert set(registry.files(model)) == {"config.json", "model.safetensors"}
    assert b"dsseEnvelope" in registry.signature(model)
    assert b"dsseEnvelope" in registry.release(model)
    with registry.open(model, "config.json") as reader:
        assert reader.size == 2
    with pytest.raises(VerificationError, match="digits has no file 'x'"):
        registry.open(model, "x")


def test_a_registry_read_again_shows_what_was_published_since(workshop):
    workshop.published("one", version="1")
    registry = open_registry(workshop.registry)
    assert registry.resolve(ModelRef("digits")).version == "1"
    workshop.published("two", version="2")
    assert registry.resolve(ModelRef("digits")).version == "2"


def test_entries_of_other_kinds_are_left_alone():
    found = parse_index(index({"digest": DIGEST, "size": 2}), "here")
    assert (found.models, found.referrers) == ([], [])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{}", "'manifests' is missing"),
        (b'{"manifests": [], "manifests": []}', "duplicate JSON key"),
        (index(node(name="No Name")), "the registry answers nonsense"),
        (index(node(digest="sha256:1")), "the registry answers nonsense"),
        (index(node(version="1@a")), "the registry answers nonsense"),
        (index({**node(), "size": -1}), "is not usable: of -1 bytes"),
        (index({**node(), "digest": "sha256:../../x"}), "is not usable"),
        (index({**node(), "size": True}), "'size' is of kind bool"),
    ],
)
def test_an_index_that_is_nonsense_is_a_registry_error(raw, message):
    with pytest.raises(RegistryError, match=message):
        parse_index(raw, "index.json")


def test_a_file_listed_twice_is_a_registry_error():
    layer = {"digest": DIGEST, "size": 1}
    layer["annotations"] = {"org.opencontainers.image.title": "x"}
    with pytest.raises(RegistryError, match=r"manifest of digits:1: .*'x' is listed t"):
        parse_layers(json.dumps({"layers": [layer, layer]}).encode(), "digits:1")


def test_a_model_without_signature_or_release_is_refused(workshop, monkeypatch):
    model = workshop.published()
    registry = open_registry(workshop.registry)
    registry.resolve(model.ref)
    for name, message in (("model.sig", "signed"), ("release.sig", "released")):
        manifest, layers = registry._layers[model]
        left = {other: layers[other] for other in layers if other != name}
        monkeypatch.setitem(registry._layers, model, (manifest, left))
        with pytest.raises(VerificationError, match=f"is not {message}: it has no"):
            (registry.signature if name == "model.sig" else registry.release)(model)


def test_a_registry_without_its_index_is_a_registry_error(workshop):
    workshop.published()
    (workshop.registry / "index.json").unlink()
    with pytest.raises(RegistryError, match=r"has no index.json"):
        open_registry(workshop.registry).resolve(ModelRef("digits"))


def test_what_a_registry_answers_is_well_formed_or_refused():
    assert Resolved("digits", "", DIGEST).ref == ModelRef(f"digits@{DIGEST}")
    with pytest.raises(RegistryError, match="answers nonsense"):
        Resolved("digits:1", "", DIGEST)


def test_what_is_remembered_is_bounded(workshop, monkeypatch):
    monkeypatch.setattr("ztserve.artifacts.registry.layout.MAX_REMEMBERED", 1)
    one = workshop.published("one", version="1")
    two = workshop.published("two", version="2", fill=2.0)
    registry = open_registry(workshop.registry)
    for _ in range(2):
        assert registry.resolve(one.ref) == one
        assert registry.resolve(two.ref) == two
        assert registry.signature(one) != registry.signature(two)
    assert len(registry._layers) == 1
