import json
import os

import pytest

from tests.unit.artifacts.workshop import signing_key
from ztserve.artifacts import open_registry, verify_model
from ztserve.artifacts.publish import (
    attest_model,
    attestation_statement,
    publish,
    release_model,
    result_predicate,
    sign_model,
)
from ztserve.artifacts.registry.protocol import Resolved
from ztserve.artifacts.registry.referrers import parse_bundle_layer, parse_referrers
from ztserve.artifacts.statements import attestation
from ztserve.artifacts.statements.attestation import (
    METRICS,
    SUBJECT,
    TEST_RESULT,
    VERIFICATION_SUMMARY,
    Metric,
    file_of,
    is_attestation,
    parse_attestation,
)
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.manifest import check_names
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import ConfigError, RegistryError, VerificationError
from ztserve.types import ModelRef

DIGEST = "sha256:" + "a" * 64
KEY = signing_key()
NAME = "dev.ztserve.attestation.name"


def parsed(payload):
    return parse_attestation(parse_envelope(KEY.envelope(payload), what="x.sig"))


def told(predicate, kind=TEST_RESULT):
    return parsed(attestation_statement(DIGEST, kind, predicate))


def test_a_test_result_holds_metrics_with_their_thresholds():
    metrics = {"accuracy": Metric(0.97, minimum=0.9), "toxicity": Metric(0.2)}
    predicate = result_predicate(metrics)
    assert (predicate["result"], predicate["failedTests"]) == ("PASSED", [])
    found = told(predicate)
    assert (found.digest, found.result) == (DIGEST, "PASSED")
    assert dict(found.metrics) == metrics


def test_a_metric_beyond_its_threshold_fails_the_test():
    metrics = {"accuracy": Metric(0.8, minimum=0.9), "toxicity": Metric(1, maximum=0.1)}
    predicate = result_predicate(metrics)
    assert predicate["result"] == "FAILED"
    assert predicate["failedTests"] == ["accuracy", "toxicity"]
    assert told(predicate).result == "FAILED"
    with pytest.raises(VerificationError, match=r"PASSED, yet it says itself that"):
        told({**predicate, "result": "PASSED"})


def test_fields_that_in_toto_does_not_define_are_ignored():
    predicate = {"result": "PASSED", "configuration": [], "https://x/y": 1}
    assert told(predicate).result == "PASSED"


def test_another_predicate_is_carried_as_it_is():
    found = told({"anything": [1]}, kind="https://slsa.dev/provenance/v1")
    assert (found.predicate_type, found.result) == (
        "https://slsa.dev/provenance/v1",
        "",
    )


def with_metrics(node):
    return {
        "result": "PASSED",
        "configuration": [{"uri": "x:y", "annotations": {METRICS: node}}],
    }


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ({"configuration": []}, "'result' is missing"),
        ({"result": "PASSED"}, "'configuration' is missing"),
        ({"result": "passed", "configuration": []}, "result is 'passed', expected one"),
        (with_metrics([]), "is not an object"),
        (with_metrics({"a": 1}), "metric 'a' is not an object"),
        (with_metrics({"a": {}}), "'a' has no value"),
        (with_metrics({"a b": {"value": 1}}), "no name of a metric"),
        (with_metrics({"a": {"value": "1"}}), "the value of 'a' is not a number"),
        (with_metrics({"a": {"value": True}}), "the value of 'a' is not a number"),
        (with_metrics({"a": {"value": 10**400}}), "the value of 'a' is not finite"),
        (with_metrics({"a": {"value": 1, "minimum": None}}), "minimum of 'a' is not"),
        (with_metrics({f"m{n}": {"value": 1} for n in range(257)}), "more than 256"),
        (
            {
                "result": "PASSED",
                "configuration": with_metrics({"a": {"value": 1}})["configuration"] * 2,
            },
            "'a' is given twice",
        ),
        ({"result": "PASSED", "configuration": [{}] * 257}, "the limit is 256"),
    ],
)
def test_a_malformed_test_result_is_refused(predicate, message):
    with pytest.raises(VerificationError, match=rf"x.sig: .*{message}"):
        told(predicate)


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ({"resourceUri": "a:b"}, "'verificationResult' is missing"),
        ({"verificationResult": "WARNED", "resourceUri": "a:b"}, "is 'WARNED'"),
        ({"verificationResult": "PASSED"}, "'resourceUri' is missing"),
    ],
)
def test_a_malformed_verification_summary_is_refused(predicate, message):
    with pytest.raises(VerificationError, match=message):
        told(predicate, kind=VERIFICATION_SUMMARY)


@pytest.mark.parametrize("name", ["model.safetensors", None])
def test_an_attestation_of_a_file_is_not_one_of_a_manifest(name):
    node = json.loads(attestation_statement(DIGEST, TEST_RESULT, result_predicate({})))
    node["subject"][0]["name"] = name
    with pytest.raises(VerificationError, match=r"speaks of a manifest, not of a file"):
        parsed(json.dumps(node).encode())


def test_no_file_of_a_model_can_bear_the_subjects_name_or_lie_among_attestations():
    with pytest.raises(Malformed, match="not canonical"):
        check_names([SUBJECT])
    for name in ("attestations/a.sig", "attestations/config.json", "attestations"):
        with pytest.raises(Malformed, match="cannot be a file of the model"):
            check_names([name])


@pytest.mark.parametrize("name", ["", "A", "../x", ".x", "a/b", "a" * 65, "a\n"])
def test_a_name_that_leads_elsewhere_is_no_attestations(workshop, name):
    assert not is_attestation(f"attestations/{name}.sig")
    with pytest.raises(ConfigError, match="cannot be the name of an attestation"):
        workshop.evaluate(workshop.signed(), name=name)


def test_an_unsigned_model_cannot_be_attested(workshop):
    with pytest.raises(VerificationError, match=r"is not signed.*ztserve sign"):
        workshop.evaluate(workshop.model())


def test_an_attestation_too_large_is_not_written(workshop):
    root = workshop.signed()
    large = {"text": "x" * (1 << 20)}
    with pytest.raises(VerificationError, match="the limit is 1048576"):
        attest_model(
            root, KEY, name="large", predicate_type="https://x/y", predicate=large
        )
    assert not (root / "attestations").exists()


def test_signing_anew_removes_what_was_attested_before(workshop):
    root = workshop.signed()
    path = workshop.evaluate(root)
    sign_model(root, workshop.keys["trainer"])
    assert not path.exists()


# --- in the registries ----------------------------------------------------------


def resolved(registry):
    return registry.resolve(ModelRef("digits"))


def test_a_directory_and_a_layout_give_the_same_attestations(workshop):
    root = workshop.signed()
    path = workshop.evaluate(root, accuracy=0.9)
    workshop.evaluate(root, name="second", toxicity=0.1)
    publish(root, workshop.registry, name="digits", version="1")
    publish(root, workshop.registry, name="digits", version="1")  # replaces
    for source in (root, workshop.registry):
        registry = open_registry(source)
        model = resolved(registry)
        found = registry.attestations(model)
        assert sorted(found) == ["evaluation", "second"]
        assert found["evaluation"] == path.read_bytes()
        assert not any("attest" in name for name in registry.files(model))


def test_attestations_are_referrers_of_the_models_image_manifest(workshop):
    root = workshop.signed()
    workshop.evaluate(root)
    publish(root, workshop.registry, name="digits", version="1")
    image, referrer = json.loads((workshop.registry / "index.json").read_bytes())[
        "manifests"
    ]
    blob = workshop.registry / "blobs/sha256" / referrer["digest"].partition(":")[2]
    subject = json.loads(blob.read_bytes())["subject"]
    assert subject["digest"] == image["digest"]
    assert referrer["artifactType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"


def referring(registry):
    """Return (name, digest of the subject) of each referrer that the index lists."""
    nodes = json.loads((registry / "index.json").read_bytes())["manifests"]
    bare = [node for node in nodes if NAME not in node["annotations"]]
    images = [node["digest"] for node in bare]
    found = []
    for node in nodes:
        name = node["annotations"].get(NAME)
        if name is not None:
            blob = registry / "blobs/sha256" / node["digest"].partition(":")[2]
            subject = json.loads(blob.read_bytes())["subject"]["digest"]
            found.append((name, images.index(subject)))
    return sorted(found)


@pytest.mark.slow
def test_a_model_published_again_has_what_was_published_last(workshop):
    root = workshop.signed()
    for name in ("evaluation", "removed", "kept"):
        workshop.evaluate(root, name=name)
    publish(root, workshop.registry, name="digits", version="1")
    (root / "attestations/removed.sig").unlink()
    changed = workshop.evaluate(root, accuracy=0.5)
    # Released anew, it is another image, to which the old ones do not refer.
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    publish(root, workshop.registry, name="digits", version="1")
    registry = open_registry(workshop.registry)
    found = registry.attestations(resolved(registry))
    assert sorted(found) == ["evaluation", "kept"]
    assert found["evaluation"] == changed.read_bytes()
    assert referring(workshop.registry) == [("evaluation", 0), ("kept", 0)]


@pytest.mark.slow
def test_with_other_attestations_it_is_another_image(workshop):
    """A registry that lists itself what refers to an image forgets none of it."""
    root, images = workshop.signed(), []
    for change in ("none", "first", "second", "gone"):
        if change in {"first", "second"}:
            workshop.evaluate(root)
        elif change == "gone":
            (root / "attestations/evaluation.sig").unlink()
        publish(root, workshop.registry, name="digits", version="1")
        publish(root, workshop.registry, name="digits", version="1")  # the same again
        nodes = json.loads((workshop.registry / "index.json").read_bytes())["manifests"]
        images.append(nodes[0]["digest"])
    assert images[0] == images[3]
    assert len(set(images)) == 3


@pytest.mark.slow
def test_two_releases_of_one_model_have_each_their_own_attestations(workshop):
    root = workshop.signed()
    first = workshop.evaluate(root).read_bytes()
    publish(root, workshop.registry, name="digits", version="1")
    second = workshop.evaluate(root, accuracy=0.5).read_bytes()
    release_model(root, workshop.keys["deployer"], name="digits", version="2")
    publish(root, workshop.registry, name="digits", version="2")
    registry = open_registry(workshop.registry)
    for version, bundle in (("1", first), ("2", second)):
        model = registry.resolve(ModelRef(f"digits:{version}"))
        assert registry.attestations(model) == {"evaluation": bundle}
    assert referring(workshop.registry) == [("evaluation", 0), ("evaluation", 1)]


def test_an_attestation_for_no_one_release_is_for_each(workshop):
    """As in a layout that others wrote."""
    root = workshop.signed()
    bundle = workshop.evaluate(root).read_bytes()
    publish(root, workshop.registry, name="digits", version="1")
    index = workshop.registry / "index.json"
    node = json.loads(index.read_bytes())
    del node["manifests"][1]["annotations"]["dev.ztserve.attestation.for"]
    index.write_text(json.dumps(node))
    registry = open_registry(workshop.registry)
    assert registry.attestations(resolved(registry)) == {"evaluation": bundle}
    publish(root, workshop.registry, name="digits", version="1")
    assert referring(workshop.registry) == [("evaluation", 0)]


def test_an_attestation_of_another_model_is_not_published(workshop):
    first, second = workshop.signed("a"), workshop.signed("b", fill=2.0)
    path = workshop.evaluate(first)
    (second / "attestations").mkdir()
    (second / "attestations/evaluation.sig").write_bytes(path.read_bytes())
    with pytest.raises(VerificationError, match=r"attests sha256:.*but the manifest"):
        publish(second, workshop.registry, name="digits", version="1")


@pytest.mark.slow
def test_too_many_attestations_are_a_registry_error(workshop, monkeypatch):
    root = workshop.signed()
    for number in range(3):
        workshop.evaluate(root, name=f"n{number}")
    publish(root, workshop.registry, name="digits", version="1")
    registries = [open_registry(source) for source in (root, workshop.registry)]
    assert [len(r.attestations(resolved(r))) for r in registries] == [3, 3]
    for module in ("directory", "referrers"):
        monkeypatch.setattr(f"ztserve.artifacts.registry.{module}.MAX_ATTESTATIONS", 2)
    for registry in registries:
        with pytest.raises(RegistryError, match=r"3 attestations; the limit is 2"):
            registry.attestations(resolved(registry))


def test_a_giant_attestation_is_refused_before_it_is_read(workshop):
    root = workshop.signed()
    os.truncate(workshop.evaluate(root), 1 << 40)
    registry = open_registry(root)
    with pytest.raises(RegistryError, match=r"evaluation.sig has 1099511627776 bytes"):
        registry.attestations(resolved(registry))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda notes: notes.update({"dev.ztserve.attestation.name": "../x"}),
            "'../x'",
        ),
        (lambda notes: notes.pop("dev.ztserve.attestation.name"), "is missing"),
    ],
)
def test_a_layout_whose_index_lies_about_attestations_is_refused(
    workshop, change, message
):
    root = workshop.signed()
    workshop.evaluate(root)
    publish(root, workshop.registry, name="digits", version="1")
    index = workshop.registry / "index.json"
    node = json.loads(index.read_bytes())
    change(node["manifests"][1]["annotations"])
    index.write_text(json.dumps(node))
    registry = open_registry(workshop.registry)
    with pytest.raises(RegistryError, match=message):
        registry.attestations(resolved(registry))


def test_a_referrer_without_its_one_layer_is_refused():
    with pytest.raises(RegistryError, match="no layer, where one bundle"):
        parse_bundle_layer(b'{"layers": []}', "here")
    big = {"layers": [{"size": (1 << 20) + 1, "digest": DIGEST}]}
    with pytest.raises(RegistryError, match="a bundle above 1048576 bytes"):
        parse_bundle_layer(json.dumps(big).encode(), "here")
    entry = {
        "annotations": {
            "dev.ztserve.attestation.of": DIGEST,
            "dev.ztserve.attestation.name": "a",
        }
    }
    with pytest.raises(RegistryError, match="have the same name"):
        parse_referrers([entry, entry], Resolved("digits", "1", DIGEST), "here")


def test_a_file_beside_the_attestations_is_an_unsigned_file(workshop):
    root = workshop.signed()
    workshop.evaluate(root)
    (root / "attestations/note.txt").write_text("x")
    with pytest.raises(VerificationError, match=r"extra file 'attestations/note.txt'"):
        verify_model(root, "digits", workshop.trust)


def test_what_attestations_are_called():
    assert file_of("a.b-1_c") == "attestations/a.b-1_c.sig"
    assert attestation.within(1, 1, 1)
