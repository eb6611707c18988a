"""A model that is revoked while Ray serves it."""

import json
import sys
import time

import pytest

from tests.ray.shell import ZTSERVE, opened

WITHIN_S = 5.0
SOON_S = 1.0
"""Serve alone took 2.9 s, as measured."""


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


WATCH = """
import time
from ztserve import config
from ztserve.serving.cluster import attached, replicas
from ztserve.serving.running import noted_address

settings = config.load()
with attached(noted_address(settings)):
    while True:
        count = sum(len(endpoints) for _, endpoints in replicas(settings))
        print(f"{time.time():.3f} lists {count}", flush=True)
        time.sleep(0.05)
"""
"""Asks the directory what it lists, again and again."""


def test_a_revoked_model_is_served_no_longer_and_not_again(shell):
    begun = shell.start(*ZTSERVE, "run", "examples.digits:app")
    begun.says("^serving; Ctrl-C stops it")
    shell.run(*ZTSERVE, "predict", "inference-service", "--example")
    (verified,) = events(shell, "model-verified")
    watching = shell.start(sys.executable, "-c", WATCH)
    watching.says("lists 1$")
    policy = shell.project / ".ztserve/trust.toml"
    entry = f'{{ digest = "{verified["digest"]}", reason = "poisoned data" }}'
    text = policy.read_text().replace("version = 1", "version = 2")
    policy.write_text(text + f"\n[revoked]\nmanifests = [{entry}]\n")
    began = time.monotonic()
    (withdrawn,) = wait_for(shell, "model-withdrawn", WITHIN_S)
    gone = time.time()
    assert "poisoned data" in withdrawn["reason"]
    # The directory hears it from the replica, seconds before Serve is sure of it.
    unlisted = float(watching.says(r"^(\S+) lists 0$")[1])
    watching.kill()
    print("GAP", unlisted - gone)
    assert unlisted - gone < SOON_S
    shell.run(*ZTSERVE, "predict", "inference-service", "--example", code=2)
    assert begun.process.poll() is None
    # Serve replaces the replica, and the new one refuses to start.
    (refused, *_) = wait_for(shell, "model-refused", 120)
    assert "revokes the model" in refused["reason"]
    assert "poisoned data" in refused["reason"]
    assert time.monotonic() - began < 120
    begun.kill()
