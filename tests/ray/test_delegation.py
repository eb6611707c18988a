"""The digits example with SVIDs that a simulated SPIRE issues for what Ray knows."""

import json
import os
import time

import pytest

from tests.ray.shell import ZTSERVE, opened
from ztserve.testing import SimulatedSpire, ThrowAwayAuthority

DOMAIN = "ml.example"
REPLICA = f"spiffe://{DOMAIN}/ns/ml-inference/sa/inference-service"
AGENT = f"spiffe://{DOMAIN}/ns/ztserve/sa/agent"
DIRECTORY = f"spiffe://{DOMAIN}/ns/ztserve/sa/directory"
CLI = f"spiffe://{DOMAIN}/ns/dev/sa/cli"
UID = f"unix:uid:{os.geteuid()}"


@pytest.fixture
def shell():
    with opened() as made:
        toml = made.project / "ztserve.toml"
        made.produce(DOMAIN)
        toml.write_text(
            toml.read_text().replace(
                "[identity]", '[identity]\nspire_admin_socket = "admin.sock"', 1
            )
        )
        made.sign("examples.digits:app")
        yield made


@pytest.fixture
def upstream(shell):
    path = shell.project / "admin.sock"
    with SimulatedSpire(path, ThrowAwayAuthority(DOMAIN)) as running:
        for one in (CLI, AGENT, DIRECTORY):
            running.add(one, UID)
        running.replica = running.add(REPLICA, UID, "ray:deployment:Digits")
        yield running


def records(shell, kind):
    for path in (shell.project / ".ztserve" / "audit").glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if line.get("activity_name") == kind:
                yield line


def refused_handshake(shell):
    """The cause and the address of the first one at a replica; told once a second."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        for path in (shell.project / ".ztserve/audit").glob(
            "inference-service-*.jsonl"
        ):
            for line in map(json.loads, path.read_text().splitlines()):
                if line.get("status_code") == "handshake":
                    return line["status_detail"], line["src_endpoint"]["ip"]
        time.sleep(0.1)
    return None


def test_replicas_get_what_spire_grants_to_their_deployment(shell, upstream):
    begun = shell.start(*ZTSERVE, "run", "examples.digits:app")
    begun.says("^serving; Ctrl-C stops it")
    said = shell.run(*ZTSERVE, "predict", "inference-service", "--example")
    assert CLI in said
    issued = [line["unmapped"] for line in records(shell, "svid-issued")]
    serial = f"serial {upstream.replica.serial:x}"
    assert serial in [line["what"] for line in issued if line["id"] == REPLICA]
    assert any("ray:deployment:Digits" in asked for asked in upstream.asked)
    # A replica whose entry SPIRE no longer has takes no connections.
    upstream.remove(REPLICA)
    shell.run(*ZTSERVE, "predict", "inference-service", "--example", code=2)
    why = "this server has no valid identity now"
    assert refused_handshake(shell) == (why, "127.0.0.1")
    begun.kill()
