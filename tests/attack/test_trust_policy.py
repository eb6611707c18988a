"""Attacks on the stages and on the trust policy.

Each is refused, and works where its control is taken out.
"""

import json
import shutil
import time
from datetime import UTC, datetime

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.artifacts.workshop import Workshop, pem, signing_key
from ztserve import ModelRef, TensorSpec, ZTDeployment
from ztserve.artifacts import Floor, FollowedPolicy, TrustPolicy, verify_model
from ztserve.artifacts.loading import judging
from ztserve.artifacts.publish import publish, set_alias, sign_policy
from ztserve.artifacts.statements.attestation import TEST_RESULT
from ztserve.artifacts.trust.requirements import Requirement
from ztserve.errors import CallError, ConfigError, VerificationError
from ztserve.serving.withdrawal import LOOK_S, Withdrawal
from ztserve.testing import serve

NEEDS = f'[[require]]\npredicate = "{TEST_RESULT}"\nroles = ["evaluator"]\n'
CONTROL = pytest.mark.parametrize("control", ["on", "off"])


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


def held(control, attack, message, loads):
    """Refused with its control on; with the control off, the attack works."""
    if control == "on":
        with pytest.raises(VerificationError, match=message):
            loads()
    else:
        attack()
        assert loads()


@CONTROL
def test_an_attestation_of_another_model_does_not_count(workshop, monkeypatch, control):
    good, bad = workshop.signed("good"), workshop.signed("bad", fill=9.0)
    path = workshop.evaluate(good)
    (bad / "attestations").mkdir()
    shutil.copy(path, bad / "attestations")
    trust = workshop.write_policy(tail=NEEDS)
    assert verify_model(good, "digits", trust)
    held(
        control,
        lambda: monkeypatch.setattr(judging, "check_subject", lambda *_: None),
        r"evaluation.sig attests sha256:\w+, not this model",
        lambda: verify_model(bad, "digits", trust),
    )


@CONTROL
def test_a_failed_evaluation_does_not_count(workshop, monkeypatch, control):
    root = workshop.signed()
    workshop.evaluate(root, result="FAILED")
    trust = workshop.write_policy(tail=NEEDS)
    held(
        control,
        lambda: monkeypatch.setattr(Requirement, "check_result", lambda *_: None),
        "its result is FAILED, not PASSED",
        lambda: verify_model(root, "digits", trust),
    )


@CONTROL
def test_a_metric_below_the_policys_minimum_does_not_count(workshop, control):
    root = workshop.signed()
    workshop.evaluate(root, accuracy=0.5)  # PASSED, says its evaluator
    trust = workshop.write_policy(tail=NEEDS + "minimum = { accuracy = 0.9 }\n")
    lenient = []
    held(
        control,
        lambda: lenient.append(workshop.write_policy(tail=NEEDS)),
        r"accuracy is 0.5, below the minimum 0.9",
        lambda: verify_model(root, "digits", lenient[0] if lenient else trust),
    )


@CONTROL
def test_two_trainers_are_no_trainer_and_evaluator(workshop, monkeypatch, control):
    """A threshold alone, as TUF's, is met by any two keys."""
    root = workshop.signed()
    roles = {role: [role] for role in ("trainer", "evaluator", "deployer")}
    roles["stranger"] = ["trainer"]
    both = NEEDS.replace('["evaluator"]', '["trainer", "evaluator"]')
    trust = workshop.write_policy(roles, tail=both + "signers = 2\n")
    for name, key in (("one", workshop.keys["trainer"]), ("two", workshop.stranger)):
        workshop.evaluate(root, key=key, name=name)

    def any_two(requirement, found, refused):
        assert len({signer.name for signer in found}) >= requirement.signers
        return tuple(found)

    held(
        control,
        lambda: monkeypatch.setattr(Requirement, "check_filled", any_two),
        "is not met: none by any evaluator",
        lambda: verify_model(root, "digits", trust),
    )


@CONTROL
@pytest.mark.parametrize("twice", ["trainer", "deployer"])
def test_one_identity_does_not_evaluate_its_own_model(
    workshop, monkeypatch, control, twice
):
    root = workshop.signed()
    roles = {role: [role] for role in ("trainer", "deployer")}
    roles[twice].append("evaluator")
    trust = workshop.write_policy(roles, tail=NEEDS)
    workshop.evaluate(root, key=workshop.keys[twice])
    held(
        control,
        lambda: monkeypatch.setattr(judging, "check_separate", lambda *_: None),
        f"signs as evaluator, and acted as {twice} for this model already",
        lambda: verify_model(root, "digits", trust),
    )


@pytest.mark.slow
@CONTROL
def test_an_alias_cannot_point_at_a_release_too_old(workshop, monkeypatch, control):
    for version in ("1", "2"):
        root = workshop.signed(f"v{version}", version=version, fill=float(version))
        publish(root, workshop.registry, name="digits", version=version)
    trust = workshop.write_policy(tail='[min_versions]\ndigits = "2"\n')
    assert verify_model(workshop.registry, "digits@production", trust).version == "2"
    set_alias(workshop.registry, name="digits", alias="production", version="1")
    held(
        control,
        lambda: monkeypatch.setattr(TrustPolicy, "check_version", lambda *_: None),
        "digits:1 is older than the trust policy's min_versions",
        lambda: verify_model(workshop.registry, "digits@production", trust),
    )


@CONTROL
def test_a_registry_cannot_rename_an_old_release(workshop, monkeypatch, control):
    """The minimum is held against the signed version, not the registry's word."""
    workshop.published(version="1")
    index = workshop.registry / "index.json"
    index.write_text(index.read_text().replace('version": "1"', 'version": "2"'))
    trust = workshop.write_policy(tail='[min_versions]\ndigits = "2"\n')
    held(
        control,
        lambda: monkeypatch.setattr(TrustPolicy, "check_version", lambda *_: None),
        "digits:1 is older than the trust policy's min_versions",
        lambda: verify_model(workshop.registry, "digits", trust),
    )


@CONTROL
def test_a_frozen_policy_ends(workshop, control):
    """Who keeps newer policies away keeps revocations away, until it expires."""
    root = workshop.signed()
    trust = workshop.write_policy(head="version = 1\nexpires = 2999-01-01T00:00:00Z")
    endless = workshop.write_policy()
    later = datetime(3000, 1, 1, tzinfo=UTC)
    chosen = [trust]
    held(
        control,
        lambda: chosen.insert(0, endless),
        "expired at 2999-01-01 .*fetch or write a newer one",
        lambda: verify_model(root, "digits", chosen[0], now=later),
    )


def test_attestations_hidden_by_the_registry_are_missed(workshop):
    root = workshop.signed()
    workshop.evaluate(root)
    publish(root, workshop.registry, name="digits", version="1")
    trust = workshop.write_policy(tail=NEEDS)
    assert verify_model(workshop.registry, "digits", trust)
    index = workshop.registry / "index.json"
    node = json.loads(index.read_bytes())
    node["manifests"].pop()
    index.write_text(json.dumps(node))
    with pytest.raises(VerificationError, match="none by any evaluator; there is no"):
        verify_model(workshop.registry, "digits", trust)
    assert verify_model(workshop.registry, "digits", workshop.write_policy())


# --- the policy itself ----------------------------------------------------------


@CONTROL
def test_an_older_policy_is_not_taken_back(workshop, monkeypatch, control):
    """Validly signed, it knows nothing of the revocation: a fresh replica refuses."""
    root, root_key = workshop.signed(), signing_key()
    public = workshop.path / "root.pub"
    public.write_text(pem(root_key))
    digest = verify_model(root, "digits", workshop.trust).digest
    old = sign_policy(workshop.policy_path, root_key)
    kept = [path.read_bytes() for path in (workshop.policy_path, old)]

    def fresh():
        floor = Floor(workshop.path / "state")
        followed = FollowedPolicy(workshop.policy_path, floor, root=public)
        return verify_model(root, "digits", followed.policy)

    assert fresh()
    workshop.write_policy(
        head="version = 2", tail=f'[revoked]\nmanifests = ["{digest}"]\n'
    )
    sign_policy(workshop.policy_path, root_key)
    with pytest.raises(VerificationError, match="revokes the model"):
        fresh()
    for path, content in zip((workshop.policy_path, old), kept, strict=True):
        path.write_bytes(content)
    if control == "on":
        with pytest.raises(ConfigError, match="this node has seen version 2"):
            fresh()
    else:
        monkeypatch.setattr(Floor, "check", lambda *_: None)
        assert fresh()


@CONTROL
def test_an_older_model_cannot_come_with_an_older_policy(workshop, control):
    """A new node has seen nothing: what the deployment pins holds there."""
    root = workshop.signed(version="1")
    newer = "version = 2\nexpires = 2999-01-01T00:00:00Z"
    trust = workshop.write_policy(head=newer, tail='[min_versions]\ndigits = "2"\n')
    with pytest.raises(VerificationError, match="digits:1 is older"):
        verify_model(root, "digits", trust)
    workshop.write_policy(head="version = 1")
    floor = Floor(workshop.path / "new-node", least=2 if control == "on" else 1)
    if control == "on":
        with pytest.raises(ConfigError, match=r"is version 1, and .*is 2: fetch"):
            FollowedPolicy(workshop.policy_path, floor)
    else:
        policy = FollowedPolicy(workshop.policy_path, floor).policy
        assert verify_model(root, "digits", policy)


@CONTROL
def test_two_policies_of_one_version_are_not_both_taken(workshop, monkeypatch, control):
    root_key = signing_key()
    floor = Floor(workshop.path / "state")

    def signed(tail=""):
        workshop.write_policy(tail=tail)
        sign_policy(workshop.policy_path, root_key)
        return TrustPolicy.load(workshop.policy_path, root=pem(root_key))

    floor.keep(signed())
    other = signed('[min_versions]\ndigits = "0"\n')
    if control == "on":
        with pytest.raises(ConfigError, match="two trust policies are signed as"):
            floor.keep(other)
    else:
        monkeypatch.setattr(Floor, "check", lambda *_: None)
        floor.keep(other)
        assert floor.seen().digest == other.digest


class Same(ZTDeployment):
    model = ModelRef("same:1")
    inputs = outputs = (TensorSpec("x", "FP32", (-1, 2)),)

    def predict(self, x):
        return x


@pytest.mark.slow
@CONTROL
def test_a_running_replica_does_not_outlive_a_revocation(
    tmp_path, monkeypatch, control
):
    if control == "off":
        monkeypatch.setattr(Withdrawal, "look", lambda _self: None)
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    one = {"x": np.zeros((1, 2), np.float32)}
    with serve(Same, model=tmp_path) as served:
        digest = served.replica.description.digest
        path = served.replica.plan.settings.artifacts.trust_policy
        text = path.read_text().replace("version = 1", "version = 2")
        path.write_text(f'{text}[revoked]\nmanifests = ["{digest}"]\n')
        time.sleep(LOOK_S + 1)
        if control == "on":
            with pytest.raises(CallError):
                served.client.infer(one)
            with pytest.raises(VerificationError, match="revokes the model"):
                served.replica.check_health()
        else:
            assert served.client.infer(one)["x"].shape == (1, 2)
            served.replica.check_health()


def test_breaking_the_policy_does_not_undo_a_revocation(workshop):
    root = workshop.signed()
    digest = verify_model(root, "digits", workshop.trust).digest
    workshop.write_policy(tail=f'[revoked]\nmanifests = ["{digest}"]\n')
    followed = FollowedPolicy(workshop.policy_path, Floor(workshop.path / "state"))
    workshop.policy_path.write_text("")
    with pytest.raises(ConfigError, match="version must be a number"):
        followed.look()
    with pytest.raises(VerificationError, match="revokes the model"):
        verify_model(root, "digits", followed.policy)


@CONTROL
def test_the_policy_of_another_trust_domain_is_not_taken(
    workshop, monkeypatch, control
):
    # One root signs staging's policy and production's; staging's is newer and laxer.
    root, floor = signing_key(), Floor(workshop.path / "state")
    ours = workshop.policy_path
    workshop.write_policy(head='version = 3\ntrust_domain = "prod.example"', tail=NEEDS)
    sign_policy(ours, root)
    (workshop.path / "root.pub").write_text(pem(root))
    followed = FollowedPolicy(
        ours, floor, root=workshop.path / "root.pub", trust_domain="prod.example"
    )
    for line, said in (
        ('trust_domain = "staging.example"', "is the trust policy of staging.example"),
        ("", "is the trust policy of no trust domain, and this is prod.example"),
    ):
        workshop.write_policy(head=f"version = 9\n{line}")
        sign_policy(ours, root)
        if control == "on":
            with pytest.raises(ConfigError, match=said):
                followed.look()
            assert followed.policy.version == 3
    if control == "off":
        monkeypatch.setattr(TrustPolicy, "check_trust_domain", lambda *_: None)
        assert followed.look().version == 9
        assert not followed.policy.requirements
