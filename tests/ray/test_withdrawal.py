"""A model that is revoked while Ray serves it."""

import json
import time

import pytest

from tests.ray.shell import ZTSERVE, opened

WITHIN_S = 5.0


@pytest.fixture
def shell():
    with opened() as made:
        yield made


def events(shell, kind):
    records = [
        json.loads(line)
        for path in (shell.project / ".ztserve/audit").glob("inference-service-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return [r["unmapped"] for r in records if r.get("activity_name") == kind]


def wait_for(shell, kind, seconds):
    until = time.monotonic() + seconds
    while not events(shell, kind):
        assert time.monotonic() < until, f"no event {kind}"
        time.sleep(0.05)
    return events(shell, kind)


def addresses(shell):
    """Return where the directory lists replicas, by ``ztserve status``."""
    said = shell.run(*ZTSERVE, "status", "--json")
    listed = json.loads(said[said.index("{") :])["replicas"]
    return [e["address"] for endpoints in listed.values() for e in endpoints]


def test_a_revoked_model_is_served_no_longer_and_not_again(shell):
    begun = shell.start(*ZTSERVE, "run", "examples.digits:app")
    begun.says("^serving; Ctrl-C stops it")
    shell.run(*ZTSERVE, "predict", "inference-service", "--example")
    assert len(addresses(shell)) == 1
    (verified,) = events(shell, "model-verified")
    policy = shell.project / ".ztserve/trust.toml"
    entry = f'{{ digest = "{verified["digest"]}", reason = "poisoned data" }}'
    text = policy.read_text().replace("version = 1", "version = 2")
    policy.write_text(text + f"\n[revoked]\nmanifests = [{entry}]\n")
    began = time.monotonic()
    (withdrawn,) = wait_for(shell, "model-withdrawn", WITHIN_S)
    assert "poisoned data" in withdrawn["reason"]
    # Serve has not seen it yet, the directory has.
    assert addresses(shell) == []
    assert not events(shell, "model-refused")
    shell.run(*ZTSERVE, "predict", "inference-service", "--example", code=2)
    assert begun.process.poll() is None
    # Serve replaces the replica, and the new one refuses to start.
    (refused, *_) = wait_for(shell, "model-refused", 120)
    assert "revokes the model" in refused["reason"]
    assert "poisoned data" in refused["reason"]
    assert time.monotonic() - began < 120
    begun.kill()
