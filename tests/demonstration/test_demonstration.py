"""The main job as a person runs it, on a machine that has only loopback."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UP_S = 400
LINES = 17
"""Two answers and fifteen refusals."""

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def isolated() -> list[str]:
    """How to run a command where there is no network but loopback; [] if we may not."""
    unshare = shutil.which("unshare")
    if unshare is None or shutil.which("ip") is None:
        return []
    flags = ["-n"] if os.geteuid() == 0 else ["-r", "-n"]
    command = [unshare, *flags, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    works = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if works.returncode == 0 else []


def in_session(session: int) -> list[str]:
    """The processes of a session, by what they are."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((entry / "cmdline").read_text().replace("\0", " ")[:100])
        except (OSError, IndexError, ValueError):
            continue
    return found


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """The demonstration, up and waiting for Ctrl-C."""
    folder = tmp_path_factory.mktemp("demonstration")
    output = folder / "output"
    env = {
        **{
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ZTSERVE"))
        },
        "HOME": str(folder),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "examples.demonstration"]
    with output.open("w") as file:
        process = subprocess.Popen(
            [*isolated(), *command, "--project", str(folder / "project")],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
    until = time.monotonic() + UP_S
    while "stays up" not in output.read_text():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < until, output.read_text()
        time.sleep(0.5)
    yield process, output, folder / "project", env
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def test_every_line_holds_with_no_network_but_loopback(demonstration):
    _, output, _, _ = demonstration
    text = output.read_text()
    if not isolated():
        pytest.skip("this kernel lets us make no network namespace; it ran without")
    assert text.count("✓") == LINES, text
    assert "✗" not in text
    assert "accuracy 0.98" in text


def test_every_socket_is_accounted_for(demonstration):
    process, _, project, env = demonstration
    look = [sys.executable, "-m", "tests.demonstration.sockets", str(project)]
    enter = ["nsenter", "-t", str(process.pid), "-n"] if isolated() else []
    if enter and os.geteuid() != 0:
        pytest.skip("looking into the namespace takes root here")
    seen = subprocess.run(
        [*enter, *look],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**env, "ZTSERVE_CONFIG": str(project / "ztserve.toml")},
        check=False,
        timeout=120,
    )
    print(seen.stdout)
    assert seen.returncode == 0, seen.stdout + seen.stderr
    for kind in ("mTLS replica", "mTLS directory", "HTTPS gateway", "private unix"):
        assert kind in seen.stdout


def test_ctrl_c_ends_it_and_leaves_no_process(demonstration):
    process, output, _, _ = demonstration
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(90) == 0, output.read_text()[-2000:]
    until = time.monotonic() + 20
    while (left := in_session(process.pid)) and time.monotonic() < until:
        time.sleep(0.2)
    assert left == []
    assert re.search(r"Every line held", output.read_text())
