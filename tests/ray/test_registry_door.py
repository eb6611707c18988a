"""A project whose replicas read their models through a registry door alone."""

import shutil
import signal

import pytest

from tests.ray.conftest import free_port
from tests.ray.shell import PATIENCE_S, ZTSERVE, opened
from ztserve import audit

SERVICE = "spiffe://dev.ztserve.internal/ns/ml-inference/sa/inference-service"


@pytest.fixture
def shell():
    with opened() as made:
        yield made


def test_replicas_load_through_the_door_from_where_they_know_no_path_to(
    shell, tmp_path
):
    toml = shell.project / "ztserve.toml"
    address = f"ztserve://127.0.0.1:{free_port()}"
    patient = f"wait_s = {PATIENCE_S}\n"  # Ray takes a minute on a busy machine
    toml.write_text(
        toml.read_text()
        .replace(".ztserve/registry", address)
        .replace("\ntrust_policy", f"\n{patient}trust_policy")
        .replace("\ntrust_domain", f"\n{patient}trust_domain")
    )
    vault = tmp_path / "vault"
    shutil.move(shell.project / ".ztserve/registry", vault)
    # Before there is an agent, for whom it waits.
    door = shell.start(*ZTSERVE, "registry", "serve", "--from", str(vault))
    door.says("^waiting for an agent to make us .*: `ztserve run`")
    begun = shell.start(*ZTSERVE, "run", "examples.digits:app")
    begun.says("^not checked before Ray starts: whether digits@production can be had")
    begun.says("^serving; Ctrl-C stops it", 2 * PATIENCE_S)
    assert door.says(r"^ztserve://\S+ as (\S+)")[1].endswith("/ns/ztserve/sa/registry")
    shell.run(*ZTSERVE, "predict", "inference-service", "--example")
    (log,) = (shell.project / ".ztserve/audit").glob("registry-*.jsonl")
    calls = [r for r in audit.read(log) if r.get("class_uid") == 6003]
    assert {r["actor"]["user"]["uid"] for r in calls} == {SERVICE}
    assert {r["status"] for r in calls} == {"released"}
    assert {r["api"]["operation"] for r in calls} >= {
        "/v1/registry/digits/resolve",
        "/v1/registry/digits/read",
    }
    # What has loaded needs no door; what runs here may look at it as the developer.
    shell.run(*ZTSERVE, "verify", "digits@production")
    assert door.end(signal.SIGINT) == 0
    shell.run(*ZTSERVE, "predict", "inference-service", "--example")
    shell.run(*ZTSERVE, "verify", "digits@production", code=2)
    assert begun.end(signal.SIGINT) == 0
