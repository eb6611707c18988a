"""A replica whose trust policy turns against its model ends, soon and aloud."""

import threading
import time
from datetime import timedelta

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.artifacts.workshop import Workshop
from ztserve import ModelRef, TensorSpec, ZTDeployment, types
from ztserve.artifacts.statements.attestation import TEST_RESULT
from ztserve.errors import CallError, ConfigError, VerificationError
from ztserve.serving import withdrawal
from ztserve.testing import serve

pytestmark = pytest.mark.slow


class Same(ZTDeployment):
    model = ModelRef("same:1")
    inputs = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)

    def predict(self, x):
        time.sleep(float(x.max()))
        return x


@pytest.fixture
def served(tmp_path):
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    with serve(Same, model=tmp_path) as running:
        yield running


def policy(served):
    return served.replica.plan.settings.artifacts.trust_policy


def digest(served):
    return served.replica.description.digest


def key_id(served, role):
    (event,) = events(served, "model-verified")
    signers = dict(text.rsplit(" (", 1) for text in event["signers"].split(", "))
    return signers[f"testing {role} as {role}"].rstrip(")")


def edit(served, tail, version=2):
    text = policy(served).read_text()
    text = text.replace("version = 1", f"version = {version}")
    policy(served).write_text(text + tail)


def events(served, kind):
    return [r["unmapped"] for r in served.records() if r.get("activity_name") == kind]


def ask(served, seconds=0.0):
    return served.client.infer({"x": np.full((1, 2), seconds, np.float32)})


def ask_until(served, until):
    while time.monotonic() < until:
        ask(served)


def withdrawn(served, message):
    """Wait until the replica says so itself; return the seconds that it took."""
    began = time.monotonic()
    while time.monotonic() - began < 5:
        if events(served, "model-withdrawn"):
            break
        time.sleep(0.02)
    with pytest.raises(VerificationError, match=message):
        served.replica.check_health()
    (event,) = events(served, "model-withdrawn")
    assert event["digest"] == digest(served)
    return time.monotonic() - began


def test_a_revoked_models_replica_stops_within_five_seconds(served):
    assert ask(served)["y"].shape == (1, 2)
    served.replica.check_health()
    entry = f'{{ digest = "{digest(served)}", reason = "poisoned data" }}'
    began = time.monotonic()
    edit(served, f"[revoked]\nmanifests = [{entry}]\n")
    withdrawn(
        served,
        r"same is withdrawn from this replica: stage load \(trust policy 2, "
        r"\[revoked\]\): the trust policy .* revokes the model sha256:\w+: poisoned",
    )
    with pytest.raises(CallError):
        ask_until(served, began + 5)
    assert time.monotonic() - began < 5


def test_the_second_between_two_looks_and_the_grace_are_less_than_five():
    assert withdrawal.LOOK_S + withdrawal.GRACE_S < 5


@pytest.mark.parametrize("role", ["trainer", "deployer"])
def test_a_revoked_keys_models_are_withdrawn(served, role):
    edit(served, f'[revoked]\nkeys = ["{key_id(served, role)}"]\n')
    withdrawn(served, "the signing key sha256:.* is revoked")


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ('[min_versions]\nsame = "2"\n', "same:1 is older than the trust policy's"),
        (
            f'[[require]]\npredicate = "{TEST_RESULT}"\nroles = ["trainer"]\n',
            "is not met: none by any trainer",
        ),
    ],
)
def test_whatever_would_not_load_now_is_withdrawn(served, tail, message):
    edit(served, tail)
    withdrawn(served, message)


def test_a_running_call_ends_before_the_door_closes(served):
    ask(served)
    answers = []
    caller = threading.Thread(target=lambda: answers.append(ask(served, 1.0)))
    caller.start()
    time.sleep(0.3)
    edit(served, f'[revoked]\nmanifests = ["{digest(served)}"]\n')
    withdrawn(served, "revokes the model")
    caller.join()
    assert answers[0]["y"].max() == 1.0


def test_a_policy_that_cannot_be_taken_is_told_and_changes_nothing(served):
    good = policy(served).read_text()
    edit(served, "")
    wait_for(served, "trust-policy-taken", 1)
    policy(served).write_text(good)  # version 1 again: a rollback
    wait_for(served, "trust-policy-refused", 1)
    policy(served).write_text("nonsense")
    wait_for(served, "trust-policy-refused", 2)
    rollback, nonsense = events(served, "trust-policy-refused")
    assert "this node has seen version 2" in rollback["reason"]
    assert "not TOML" in nonsense["reason"]
    served.replica.check_health()
    assert ask(served)["y"].shape == (1, 2)


def wait_for(served, kind, count):
    until = time.monotonic() + 5
    while len(events(served, kind)) < count:
        assert time.monotonic() < until, served.records()[-3:]
        time.sleep(0.02)


def test_an_expired_policy_serves_no_longer(served):
    soon = types.now() + timedelta(seconds=1.5)
    text = policy(served).read_text()
    expires = f"version = 2\nexpires = {soon:%Y-%m-%dT%H:%M:%S.%fZ}"
    policy(served).write_text(text.replace("version = 1", expires))
    wait_for(served, "trust-policy-taken", 1)
    served.replica.check_health()
    withdrawn(served, r"the trust policy \(version 2\) expired at")


def test_a_replica_that_looks_no_more_is_not_healthy(served):
    served.replica._withdrawal.close()
    with pytest.raises(VerificationError, match="nothing follows the trust policy"):
        served.replica.check_health()


def test_a_fresh_replica_refuses_an_older_policy(tmp_path):
    workshop = Workshop(tmp_path)
    root = workshop.signed()
    tables = {"artifacts": {"min_policy_version": 2}}
    for file in ("model.sig", "release.sig"):
        (root / file).unlink()

    class Digits(Same):
        model = ModelRef("digits:1")

    with (
        pytest.raises(ConfigError, match=r"version 1, and .*min_policy_version is 2"),
        serve(Digits, model=root, tables=tables),
    ):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fails", [False, True], ids=["told", "cannot be told"])
def test_the_directory_is_told_before_the_door_closes(served, fails):
    open_then = []

    def told():
        open_then.append(served.replica._server is not None)
        if fails:
            raise ConnectionError("nobody listens")

    served.replica._on_withdrawn = told
    edit(served, f'[revoked]\nmanifests = ["{digest(served)}"]\n')
    withdrawn(served, "revokes the model")
    until = time.monotonic() + withdrawal.GRACE_S + 1
    while served.replica._server is not None:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert open_then == [True]
