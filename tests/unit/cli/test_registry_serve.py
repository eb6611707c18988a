import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.unit.artifacts.real import free_port
from ztserve import audit, config
from ztserve.doors import DoorAddress, DoorRegistry
from ztserve.identity import SpiffeId
from ztserve.identity.svid import pem
from ztserve.testing import ThrowAwayAuthority
from ztserve.types import ModelRef


def through(project, address):
    """Have the project read its models through a door."""
    path = project / config.FILE
    path.write_text(path.read_text().replace(".ztserve/registry", address))


@contextmanager
def serving(*words):
    """Run ``ztserve registry serve`` as a process; yields it, and its lines."""
    command = [sys.executable, "-m", "ztserve.cli", "registry", "serve"]
    running = subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(running.stdout.readline())
            assert lines[-1], running.stderr.read()
        yield running, lines
    finally:
        running.kill()
        running.communicate()


@pytest.fixture
def door(project, published, agent):
    address = f"ztserve://127.0.0.1:{free_port()}"
    through(project, address)
    with serving("--from", ".ztserve/registry") as (running, lines):
        yield running, address, lines


@pytest.mark.slow
def test_serve_says_where_and_lets_a_model_be_verified(ztserve, project, door):
    running, address, lines = door
    who = "spiffe://dev.ztserve.internal/ns/ztserve/sa/registry"
    assert lines[0] == f"{address} as {who}\n"
    assert "LayoutRegistry(" in lines[1]
    assert "developer.yaml" in lines[2]
    told = ztserve("verify", "double:1", "--json")
    assert json.loads(told.out)["version"] == "1"
    running.send_signal(signal.SIGINT)
    assert running.wait(10) == 0
    log = next((project / ".ztserve/audit").glob("registry-*.jsonl"))
    calls = [r for r in audit.read(log) if r.get("class_uid") == 6003]
    assert {r["actor"]["user"]["uid"].rpartition("/")[2] for r in calls} == {"cli"}
    assert sum(r["unmapped"]["bytes_out"] for r in calls) > 16384


@pytest.mark.slow
def test_serve_ends_by_sigterm(door):
    running, _, _ = door
    running.send_signal(signal.SIGTERM)
    assert running.wait(10) == 0


APP = """\
from ztserve import TensorSpec, ZTDeployment

class Twice(ZTDeployment):
    inputs = (TensorSpec("x", "FP32", (-1, 1)),)
    outputs = (TensorSpec("y", "FP32", (-1, 1)),)

    def predict(self, x):
        return x * 2

app = Twice.bind()
"""


@pytest.mark.slow
def test_in_production_a_door_has_its_svid_from_the_node(project, published):
    authority = ThrowAwayAuthority("td.example")
    path = project / config.FILE
    path.write_text(
        path.read_text()
        .replace('profile = "development"', 'profile = "production"')
        .replace("dev.ztserve.internal", "td.example")
        .replace("# trust_root", "trust_root")
        .replace("[identity]", '[identity]\nsvid_folder = "svid"\nwait_s = 5')
    )
    policy = project / ".ztserve/trust.toml"
    policy.write_text(policy.read_text().replace("dev.ztserve.internal", "td.example"))
    who = SpiffeId.parse("spiffe://td.example/ns/ztserve/sa/registry")
    svid = authority.issue(who)
    (project / "svid").mkdir(mode=0o700)
    for name, content in {
        "credential-bundle.private-key.pem": svid.key_pem() + svid.chain_pem(),
        "td.example.spiffe-trust-bundle.pem": pem(authority.bundle),
    }.items():
        (project / "svid" / name).touch(0o600)
        (project / "svid" / name).write_bytes(content)
    (project / "twice.py").write_text(APP)
    for words in (
        ("key", "new", "root.pem", "--name", "root"),
        ("sign", ".ztserve/trust.toml", "--key", "root.pem"),
        ("bundle", "sign", "twice:app"),  # in production doors serve nothing without
    ):
        subprocess.run([sys.executable, "-m", "ztserve.cli", *words], check=True)
    listen = f"127.0.0.1:{free_port()}"
    with serving("--listen", listen) as (_, lines):
        assert lines[0] == f"ztserve://{listen} as {who}\n"
        source = authority.source("spiffe://td.example/ns/ml-inference/sa/double")
        with DoorRegistry(DoorAddress(listen), source=source, door_id=who) as registry:
            assert registry.resolve(ModelRef("double")).version == "1"


@pytest.mark.slow
def test_a_port_that_is_taken_is_told(ztserve, project, published, agent):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = ztserve("registry", "serve", "--listen", where)
    assert done.code == 2
    assert f"{where} is taken, or not of this machine: choose another" in done.err


@pytest.mark.slow
def test_a_door_without_a_policy_does_not_open(ztserve, project, published, agent):
    path = project / "policies/developer.yaml"
    path.write_text(path.read_text().replace("app: registry", "app: other"))
    done = ztserve("registry", "serve", "--listen", f"127.0.0.1:{free_port()}")
    assert done.code == 2
    assert "no policy lets anybody read models" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--listen", "7444"), "expected ztserve://HOST:PORT"),
        (("--listen", "0.0.0.0:7444"), "not a loopback address"),
        (("--from", "nowhere"), "there is no registry or model directory"),
        (("--from", "ftp://a"), "expected oci+https://HOST/PATH"),
        (
            ("--from", "oci+https://a/b", "--credentials", "none"),
            "registry credentials none: ",
        ),
    ],
)
def test_wrong_use_of_serve_is_a_sentence(ztserve, project, published, words, message):
    done = ztserve("registry", "serve", *words)
    assert done.code == 2
    assert message in done.err


def test_a_door_to_itself_is_refused(ztserve, project, published):
    through(project, "ztserve://127.0.0.1:7444")
    done = ztserve("registry", "serve")
    assert done.code == 2
    assert "registry is the door itself (ztserve://127.0.0.1:7444)" in done.err
    done = ztserve("registry", "push", "double:1", "--to", "oci+http://127.0.0.1:1")
    assert "is no folder to push from" in done.err


def test_without_an_agent_a_door_is_not_asked(ztserve, project, published):
    through(project, "ztserve://127.0.0.1:7444")
    began = time.monotonic()
    done = ztserve("verify", "double:1")
    assert done.code == 2
    assert "there is no agent to give an identity" in done.err
    assert time.monotonic() - began < 5


def test_the_project_of_a_door_opens_it(project, agent, published):
    through(project, "ztserve://127.0.0.1:7444")
    with config.open_registry(config.load()) as registry:
        assert isinstance(registry, DoorRegistry)
