import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
import torch

from ztserve.artifacts import Resolved, open_registry, verify_model
from ztserve.artifacts.publish import sign_model
from ztserve.errors import ConfigError, RegistryError, VerificationError
from ztserve.types import ModelRef


def test_a_signed_directory_loads_with_its_weights_and_its_signers(workshop):
    root = workshop.signed(fill=3.0)
    model = verify_model(root, "digits", workshop.trust)
    assert (model.name, model.version) == ("digits", "1")
    assert model.names == ("config.json", "model.safetensors")
    weights = dict(model.tensors())
    assert torch.equal(weights["layer.weight"], torch.full((4, 4), 3.0))
    assert [(s.name, s.role) for s in model.signers] == [
        ("trainer", "trainer"),
        ("deployer", "deployer"),
    ]
    assert str(model.signers[0]).startswith("trainer as trainer (sha256:")
    assert model.release.digest == model.digest


@pytest.mark.parametrize(
    "ref", ["digits", "digits:1", "digits@production", "digits:1@{digest}"]
)
def test_every_form_of_reference_loads_from_a_registry(workshop, ref):
    digest = workshop.published().digest
    model = verify_model(workshop.registry, ref.format(digest=digest), workshop.trust)
    assert model.digest == digest


def test_a_reference_resolved_once_loads_the_very_same_model(workshop):
    workshop.published()
    registry = open_registry(workshop.registry)
    pinned = registry.resolve(ModelRef("digits@production")).ref
    assert verify_model(registry, pinned, workshop.trust).digest == pinned.digest


def test_one_key_is_never_trainer_and_deployer_of_one_model(workshop):
    workshop.keys["deployer"] = workshop.keys["trainer"]
    root = workshop.signed()
    trust = workshop.write_policy({"trainer": ["trainer"]})
    with pytest.raises(VerificationError, match="trusted as trainer, not as deployer"):
        verify_model(root, "digits", trust)
    trust = workshop.write_policy({"trainer": ["trainer", "deployer"]})
    with pytest.raises(VerificationError, match=r"one identity acts in one role"):
        verify_model(root, "digits", trust)


def test_an_unreleased_model_can_be_looked_at_for_deployment_but_not_loaded(workshop):
    root = workshop.model()
    sign_model(root, workshop.keys["trainer"])
    with pytest.raises(VerificationError, match=r"not released as 'digits'.*publish"):
        verify_model(root, "digits", workshop.trust)
    model = verify_model(root, "digits", workshop.trust, purpose="deploy")
    assert model.release is None
    assert model.version == ""


def test_an_unknown_purpose_is_a_mistake_of_the_program(workshop):
    with pytest.raises(ValueError, match="neither 'load' nor 'deploy'"):
        verify_model(workshop.signed(), "digits", workshop.trust, purpose="test")


def test_a_version_that_was_not_asked_for_is_refused(workshop):
    root = workshop.signed(version="2")
    with pytest.raises(VerificationError, match=r"asked for digits:1, .*version '2'"):
        verify_model(root, "digits:1", workshop.trust)


def test_another_digest_than_the_pinned_one_is_refused(workshop):
    root = workshop.signed()
    with pytest.raises(VerificationError, match="not to its pinned digest"):
        verify_model(root, "digits@sha256:" + "0" * 64, workshop.trust)


def test_a_missing_file_is_refused(workshop):
    root = workshop.signed()
    (root / "config.json").unlink()
    with pytest.raises(VerificationError, match=r"missing file 'config.json'"):
        verify_model(root, "digits", workshop.trust)


def test_a_registry_that_is_away_is_not_a_verification_error(workshop):
    for place in (workshop.path / "nowhere", workshop.path / "empty"):
        with pytest.raises(RegistryError, match=r"no registry or model|is empty: pub"):
            verify_model(place, "digits", workshop.trust)
        (workshop.path / "empty").mkdir(exist_ok=True)


def test_a_registry_that_is_just_being_made_is_waited_for(workshop):
    workshop.published()
    (workshop.registry / "index.json").unlink()
    with pytest.raises(RegistryError, match=r"has no index.json"):
        verify_model(workshop.registry, "digits", workshop.trust)


def test_a_model_that_needs_more_memory_than_allowed_is_refused_unread(workshop):
    with pytest.raises(RegistryError, match="more than the limit of 100"):
        verify_model(workshop.signed(), "digits", workshop.trust, max_bytes=100)


def test_a_policy_that_expired_since_it_was_loaded_is_refused(workshop):
    trust = workshop.write_policy(head="version = 1\nexpires = 2999-01-01T00:00:00Z")
    late = datetime(2999, 1, 1, tzinfo=UTC) + timedelta(seconds=1)
    root = workshop.signed()
    with pytest.raises(VerificationError, match="expired at 2999-01-01"):
        verify_model(root, "digits", trust, now=late)
    with pytest.raises(ConfigError, match="no time zone"):
        verify_model(root, "digits", trust, now=late.replace(tzinfo=None))


def test_a_registry_that_promises_another_digest_than_it_holds_is_refused(workshop):
    registry = open_registry(workshop.signed())
    lie = Resolved("digits", "1", "sha256:" + "1" * 64)
    registry.resolve = lambda ref: lie
    with pytest.raises(VerificationError, match=r"promised digits@sha256:1111"):
        verify_model(registry, "digits", workshop.trust)


@pytest.mark.slow
def test_serving_imports_neither_torch_nor_the_publishing_half():
    code = (
        "import sys, ztserve.artifacts; "
        "print([m for m in sys.modules if m in ('torch', 'ray', 'grpc') "
        "or m.startswith('ztserve.artifacts.publish')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
