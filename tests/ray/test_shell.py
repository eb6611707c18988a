"""What a person types: Ray's own command line, and ours, from an empty home."""

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.ray import processes
from tests.ray.conftest import free_port
from tests.ray.shell import BIN, REPOSITORY, ZTSERVE, opened

SERVE, RAY = str(BIN / "serve"), str(BIN / "ray")
PROXY = ("127.0.0.1", 8000)
"""Where ``serve run`` puts its proxy: it has no option for it."""
CLI = "spiffe://dev.ztserve.internal/ns/dev/sa/cli"
SERVICE = "spiffe://dev.ztserve.internal/ns/ml-inference/sa/inference-service"


@pytest.fixture(scope="module")
def shell():
    with opened() as shell:
        yield shell


def predicted(shell):
    """One call as the newcomer makes it; returns all that was printed."""
    said = shell.run(*ZTSERVE, "predict", "inference-service", "--example")
    assert f"as {CLI}\n" in said
    (scores,) = json.loads(said[said.index("{") :])["probabilities"]
    assert sum(scores) == pytest.approx(1, abs=1e-4)
    return said


def is_free(address):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


# --- Ray's own command line -------------------------------------------------------


@pytest.fixture(scope="module")
def by_serve_run(shell):
    """Plain ``serve run``: no variable set, nothing else running."""
    if not is_free(PROXY):
        pytest.skip("port 8000 is taken, and `serve run` knows no other for its proxy")
    begun = shell.start(SERVE, "run", "examples.digits:app")
    begun.says("Application 'default' is ready")
    yield begun
    begun.kill()


def test_plain_serve_run_answers_a_verified_caller(shell, by_serve_run):
    predicted(shell)
    by_serve_run.says(
        r"ml-inference/inference-service answers verified callers over mTLS at "
        r"127\.0\.0\.1:\d+; Serve's own proxy reaches nothing of it"
    )


@pytest.mark.parametrize("path", ["/", "/predict", "/v2/models/digits/infer"])
@pytest.mark.parametrize("body", [None, b'{"pixels": [[0]]}'])
def test_serves_own_proxy_reaches_no_user_code(by_serve_run, path, body):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:8000{path}", body), timeout=30
        )
    assert refused.value.code == 500
    assert refused.value.read() == b"Internal Server Error"


def test_what_came_through_serves_proxy_is_audited_as_refused(shell, by_serve_run):
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen("http://127.0.0.1:8000/", timeout=30)
    said = shell.run(*ZTSERVE, "audit", "show")
    assert "Ray handle" in said
    assert "Denied" in said


def test_serve_status_works_from_a_second_shell(shell, by_serve_run):
    dashboard = by_serve_run.says(r"http://127\.0\.0\.1:\d+")[0]
    said = shell.run(SERVE, "status", "--address", dashboard, RAY_AUTH_MODE="token")
    assert "status: RUNNING" in said
    assert "RUNNING: 1" in said


def test_ctrl_c_ends_all_that_serve_run_started(by_serve_run):
    assert by_serve_run.end(signal.SIGINT, group=True) == 0
    assert is_free(PROXY)


# --- ztserve run ------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_ztserve_run(shell):
    begun = shell.start(*ZTSERVE, "run", "examples.digits:app")
    begun.says("^serving; Ctrl-C stops it")
    yield begun
    begun.kill()


def test_ztserve_run_says_where_what_who_and_how(shell, by_ztserve_run):
    at = by_ztserve_run.says(r"^ml-inference/inference-service at (127\.0\.0\.1:\d+)$")[
        1
    ]
    digest = by_ztserve_run.says(r"^  digest +(sha256:[0-9a-f]{64})$")[1]
    by_ztserve_run.says(rf"^  identity +{SERVICE}$")
    by_ztserve_run.says(r"^  model +digits:1$")
    by_ztserve_run.says(r"^  policy +\S+/seed\.yaml, \S+/developer\.yaml$")
    by_ztserve_run.says(r"^  call it +ztserve predict inference-service --example$")
    verified = shell.run(*ZTSERVE, "verify", "digits:1")
    assert digest in verified
    predicted(shell)
    assert at in processes.listening(by_ztserve_run.living())


def test_under_ztserve_run_no_proxy_of_serves_listens(by_ztserve_run):
    family = by_ztserve_run.living()
    assert not [p.command() for p in family if "Proxy" in p.command()[:80]]
    ports = {address.rpartition(":")[2] for address in processes.listening(family)}
    assert ports
    assert not ports & {"8000", "9000"}


def test_ztserve_status_shows_the_replica_and_its_digest(shell, by_ztserve_run):
    asked = (*ZTSERVE, "status")
    said = json.loads(shell.run(*asked, "--json"))
    (row,) = said["deployments"]
    assert (row["state"], row["why"]) == ("HEALTHY", "")
    (endpoint,) = said["replicas"]["ml-inference/inference-service"]
    assert endpoint["address"] in by_ztserve_run.said
    assert endpoint["digest"] in by_ztserve_run.said
    assert endpoint["address"] in shell.run(*asked)


def test_status_says_at_once_that_no_ray_is_there(shell):
    nowhere = f"127.0.0.1:{free_port()}"
    said = shell.run(*ZTSERVE, "status", "--address", nowhere, code=2)
    assert f"no Ray answers at {nowhere}" in said
    assert "`ztserve run`" in said
    assert "Traceback" not in said


def test_without_the_clusters_token_nobody_attaches(shell, by_ztserve_run):
    home = shell.folder / "other"
    home.mkdir()
    said = shell.run(*ZTSERVE, "status", code=2, HOME=str(home))
    assert "this Ray wants its token" in said
    assert "Traceback" not in said


def test_the_stock_client_gets_an_answer_with_the_files_and_nothing_without(
    shell, by_ztserve_run
):
    said = shell.run(*ZTSERVE, "svid", "write", "svid")
    target = said.split("ssl_target_name_override")[1].split()[0]
    files = shell.project / "svid"
    assert (files / "key.pem").stat().st_mode & 0o777 == 0o600
    address = by_ztserve_run.says(r"^ml-inference/inference-service at (\S+)$")[1]

    def ask(**files):
        client = triton.InferenceServerClient(
            address,
            ssl=True,
            root_certificates=str(shell.project / "svid/bundle.pem"),
            channel_args=[("grpc.ssl_target_name_override", target)],
            **files,
        )
        given = triton.InferInput("pixels", (1, 64), "FP32")
        given.set_data_from_numpy(np.zeros((1, 64), np.float32))
        try:
            answer = client.infer("digits", [given], client_timeout=20)
            return answer.as_numpy("probabilities")
        finally:
            client.close()

    scores = ask(
        private_key=str(files / "key.pem"), certificate_chain=str(files / "svid.pem")
    )
    assert scores.shape == (1, 10)
    with pytest.raises(triton.InferenceServerException) as refused:
        ask()
    assert refused.value.status() == "StatusCode.UNAVAILABLE"


def test_all_is_well_again_after_the_agent_was_killed(shell, by_ztserve_run):
    agent = json.loads(shell.run(*ZTSERVE, "agent", "status", "--json"))
    assert {entry["id"].rpartition("/")[2] for entry in agent["registrations"]} == {
        "inference-service",
        "directory",
    }
    assert agent["pid"] in {process.pid for process in by_ztserve_run.living()}
    os.kill(agent["pid"], signal.SIGKILL)
    until = time.monotonic() + 90
    while True:
        try:
            predicted(shell)
        except AssertionError:
            assert time.monotonic() < until
        else:
            break
    anew = json.loads(shell.run(*ZTSERVE, "agent", "status", "--json"))
    assert anew["pid"] != agent["pid"]
    known = {entry["pid"]: entry["id"] for entry in agent["registrations"]}
    assert (
        known.items()
        <= {entry["pid"]: entry["id"] for entry in anew["registrations"]}.items()
    ), "the same processes go on, and none had to be started anew"


def test_the_agent_stops_when_it_is_told_to(shell, by_ztserve_run):
    assert "the agent stops" in shell.run(*ZTSERVE, "agent", "stop")
    said = shell.run(*ZTSERVE, "agent", "status", code=2)
    assert "no identity agent at" in said
    assert "start the application" in said


def test_sigterm_ends_all_that_ztserve_run_started(shell, by_ztserve_run):
    assert by_ztserve_run.end(signal.SIGTERM) == 0


# --- a cluster that runs already --------------------------------------------------


@pytest.fixture(scope="module")
def head(shell):
    """A Ray that somebody started, and that knows nothing of our project."""
    port, dashboard = free_port(), free_port()
    if not (shell.folder / "home/.ray/auth_token").exists():
        shell.run(RAY, "get-auth-token", "--generate")
    begun = shell.start(
        *(RAY, "start", "--head", "--block", "--num-cpus=4"),
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={free_port()}",
        RAY_AUTH_MODE="token",
    )
    begun.says("Ray runtime started")
    begun.address = f"127.0.0.1:{port}"
    begun.dashboard = f"http://127.0.0.1:{dashboard}"
    yield begun
    begun.kill()


def test_a_config_file_is_deployed_shown_and_shut_down(shell, head):
    config = shell.project / "config.yaml"
    config.write_text(
        f"""
        proxy_location: Disabled
        applications:
          - name: digits
            route_prefix: null
            import_path: examples.digits:app
            runtime_env:
              env_vars:
                PYTHONPATH: {REPOSITORY}
                ZTSERVE_CONFIG: {shell.project / "ztserve.toml"}
            deployments:
              - name: Digits
                num_replicas: 2
                graceful_shutdown_timeout_s: 3
                graceful_shutdown_wait_loop_s: 0.1
                ray_actor_options: {{num_cpus: 0.1}}
        """
    )
    token = {"RAY_AUTH_MODE": "token"}
    there = ("--address", head.dashboard)
    shell.run(SERVE, "deploy", *there, str(config), **token)
    until = time.monotonic() + 90
    while "status: RUNNING" not in (
        said := shell.run(SERVE, "status", *there, **token)
    ):
        assert "FAILED" not in said, said
        assert time.monotonic() < until, said
    assert "RUNNING: 2" in said
    predicted(shell)
    said = json.loads(
        shell.run(*ZTSERVE, "status", "--address", head.address, "--json")
    )
    assert len(said["replicas"]["ml-inference/inference-service"]) == 2
    shell.run(SERVE, "shutdown", "-y", *there, **token)
    while "Digits" in shell.run(SERVE, "status", *there, **token):
        assert time.monotonic() < until
