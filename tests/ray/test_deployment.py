"""Profile production on Ray: nothing serves but what the deployment bundle holds."""

import json
import os
import signal
import time

import pytest

from tests.ray.shell import BIN, ZTSERVE, opened
from ztserve.artifacts.deployment.judging import read_deployment
from ztserve.testing import SimulatedSpire, ThrowAwayAuthority

DOMAIN = "ml.example"
UID = f"unix:uid:{os.geteuid()}"
MODULE = """\
from ztserve import TensorSpec, ZTDeployment

class Twice(ZTDeployment):
    inputs = (TensorSpec("x", "FP32", (-1, 1), low=0, high=1),)
    outputs = (TensorSpec("y", "FP32", (-1, 1)),)

    def __init__(self, factor):
        self.factor = factor

    def predict(self, x):
        return x * self.factor

app = Twice.options(ray_actor_options={"num_cpus": 0.1}).bind(2)
"""


@pytest.fixture
def shell():
    with opened() as made:
        made.produce(DOMAIN)
        toml = made.project / "ztserve.toml"
        toml.write_text(
            toml.read_text().replace(
                "[identity]", '[identity]\nspire_admin_socket = "admin.sock"', 1
            )
        )
        (made.project / "twice.py").write_text(MODULE)
        policy = made.project / "policies/developer.yaml"
        policy.write_text(policy.read_text().replace("inference-service", "twice"))
        made.sign("twice:app")
        with SimulatedSpire(
            made.project / "admin.sock", ThrowAwayAuthority(DOMAIN)
        ) as spire:
            for place, name in (
                ("dev", "cli"),
                ("ztserve", "agent"),
                ("ztserve", "directory"),
                ("ml-inference", "twice"),
            ):
                spire.add(f"spiffe://{DOMAIN}/ns/{place}/sa/{name}", UID)
            yield made


def audited(shell, service):
    """All that processes of a service wrote, oldest first."""
    found = []
    for path in (shell.project / ".ztserve/audit").glob(f"{service}-*.jsonl"):
        found += map(json.loads, path.read_text().splitlines())
    return sorted(found, key=lambda line: line["time"])


def events(shell, service, kind):
    return [e for e in audited(shell, service) if e.get("activity_name") == kind]


def test_what_is_not_signed_does_not_serve(shell):
    begun = shell.start(*ZTSERVE, "run", "twice:app")
    begun.says("^serving; Ctrl-C stops it")
    raw = (shell.project / ".ztserve/deployment.sig").read_bytes()
    label = f"deployment:{read_deployment(raw, 'it').digest}"
    for service in ("agent", "directory", "twice"):
        (told,) = events(shell, service, "deployment-verified")
        assert told["metadata"]["labels"] == [label]
        others = audited(shell, service)[2:]
        assert {tuple(line["metadata"]["labels"]) for line in others} <= {(label,)}
    # The code changes on the node, and the replica has to start anew.
    pids = {
        e["unmapped"]["origin"]["pid"] for e in events(shell, "twice", "log-opened")
    }
    with (shell.project / "twice.py").open("a") as module:
        module.write("\n# and more\n")
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    until = time.monotonic() + 120
    while not (refused := events(shell, "twice", "deployment-refused")):
        assert time.monotonic() < until
        time.sleep(0.5)
    assert (
        "the code differs from what was signed: twice.py"
        in (refused[0]["unmapped"]["reason"])
    )
    begun.kill()


@pytest.mark.parametrize("place", ["application", "deployment"])
def test_an_environment_in_serves_configuration_does_not_serve(shell, place):
    """A variable there could name another agent, and so other roots of callers."""
    env = "runtime_env: {env_vars: {SPIFFE_ENDPOINT_SOCKET: 'unix:///evil.sock'}}"
    text = """\
proxy_location: Disabled
applications:
  - name: default
    import_path: twice:app
"""
    if place == "application":
        text += f"    {env}\n"
    else:
        text += f"    deployments: [{{name: Twice, ray_actor_options: {{{env}}}}}]\n"
    (shell.project / "serve.yaml").write_text(text)
    begun = shell.start(str(BIN / "serve"), "run", "serve.yaml")
    begun.says("has 'SPIFFE_ENDPOINT_SOCKET', which nobody signed: leave it out")
    begun.kill()
