"""One Ray session that holds the arms named on its command line.

``python -m bench.session one|stream ARM...`` prints a line of JSON, the arms as they
can be loaded, when all have answered rightly; it ends, and everything it started with
it, when its standard input does. `Session` starts it in a home, and with a Ray token,
of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from bench.generators import Arm, LoadError, patiently

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.question import Question

READY = "ARMS "
START_S = 180
SESSIONS = (
    ("serve-http", "serve-grpc", "grpc-bare-ray", "ztserve", "ztserve-https"),
    ("serve-haproxy", "serve-haproxy-sync"),
)
"""The arms by the Ray session that they live in; both sessions live at once."""


class Session:
    """A child process with a Ray session, as seen by the bench."""

    def __init__(self, names: Sequence[str], asked: str = "one") -> None:
        self._home = tempfile.TemporaryDirectory(prefix="ztb-", dir="/tmp")
        self._log = Path(self._home.name) / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.session", asked, *names],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(self._home.name, haproxy=names[0] in SESSIONS[1]),
                start_new_session=True,
                text=True,
            )

    def arms(self) -> list[Arm]:
        """Wait, bounded, until all arms answer; return them."""
        too_late = threading.Timer(START_S, self._process.kill)
        too_late.start()
        try:
            assert self._process.stdout
            for line in self._process.stdout:
                if line.startswith(READY):
                    return [_arm(fields) for fields in json.loads(line[len(READY) :])]
        finally:
            too_late.cancel()
        raise LoadError(
            f"a Ray session did not start:\n{self._log.read_text()[-3000:]}"
        )

    def stop(self) -> None:
        """End the session and every process in it."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # What outlives its session (it has the session's own home) must not disturb.
        for entry in Path("/proc").glob("[0-9]*"):
            if self._home.name in _environ(entry):
                with suppress(ProcessLookupError):
                    os.kill(int(entry.name), signal.SIGKILL)
        with suppress(OSError):
            self._home.cleanup()


def _arm(fields: dict[str, Any]) -> Arm:
    fields["pids"], fields["headers"] = tuple(fields["pids"]), tuple(fields["headers"])
    return Arm(**fields)


def _environ(process: Path) -> str:
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:
        return ""


def environment(home: str, *, haproxy: bool) -> dict[str, str]:
    """Return the environment of a session: its own home, token and HAProxy files."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SPIFFE_"))}
    env |= {
        "HOME": home,
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "ZTSERVE_CONFIG": f"{home}/project/ztserve.toml",
    }
    if haproxy:
        env |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{home}/haproxy/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{home}/haproxy/admin.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{home}/haproxy",
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{home}/haproxy/server-state",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        }
    return env


def free_port() -> int:
    """Return a port that nothing listens on now.

    From below the range that outgoing connections are given: one of those would take
    it before the server that it is meant for.
    """
    while True:
        port = random.randrange(21_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def listeners(port: int) -> tuple[int, ...]:
    """Return the processes that listen on TCP `port`.

    In HAProxy's place its manager, which starts a new HAProxy with every new address.
    """
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(entry.readlink()) in inodes:
                found.add(int(entry.parts[2]))
        except OSError:
            continue
    return tuple(sorted(_manager(pid) for pid in found))


def _manager(pid: int) -> int:
    name, rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)
    return int(rest.split()[1]) if name.endswith("(haproxy") else pid


# --- inside the child -------------------------------------------------------------


def _http_arm(
    name: str, port: int, replica: int, question: Question, path: str = "/"
) -> Arm:
    url = f"http://127.0.0.1:{port}{path}"
    body = question.body
    reply = patiently(lambda: urllib.request.urlopen(url, body, timeout=5).read())
    question.judge(name, reply)
    pids = (replica, *listeners(port))
    return Arm(name, "http", f"127.0.0.1:{port}", path, body.hex(), len(reply), pids)


def _grpc_arm(
    name: str, address: str, pids: tuple[int, ...], question: Question
) -> Arm:
    def ask() -> int:
        with grpc.insecure_channel(address) as channel:
            return question.put(name, channel)

    size, body = patiently(ask), question.message.hex()
    return Arm(name, "grpc", address, question.rpc, body, size, pids)


def _plain_arms(names: Sequence[str], question: Question, answering: type) -> list[Arm]:
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions
    from ray.serve.schema import LoggingConfig

    from bench.oip import SERVICERS
    from bench.pieces import SYNC_PATH
    from bench.plain_serve import Bare

    http, grpc_port = free_port(), free_port()
    quiet = LoggingConfig(enable_access_log=False)
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=http),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=[*SERVICERS]),
        logging_config=quiet,
    )
    options: dict[str, Any] = {
        "max_ongoing_requests": 128,
        "ray_actor_options": {"num_cpus": 0.1},
        "logging_config": quiet,
    }
    arms = []
    if {"serve-http", "serve-grpc", *SESSIONS[1]} & set(names):
        app = serve.deployment(**options)(answering).bind()
        handle = serve.run(app, name="plain", route_prefix="/")
        replica = handle.pid.remote().result()
        for name in names:
            if name in ("serve-http", "serve-haproxy"):
                arms.append(_http_arm(name, http, replica, question))
        if "serve-haproxy-sync" in names:
            there = "serve-haproxy-sync", http, replica, question
            arms.append(_http_arm(*there, path=SYNC_PATH))
        if "serve-grpc" in names:
            pids = (replica, *listeners(grpc_port))
            address = f"127.0.0.1:{grpc_port}"
            arms.append(_grpc_arm("serve-grpc", address, pids, question))
    if "grpc-bare-ray" in names:
        app = serve.deployment(**options)(Bare).bind()
        handle = serve.run(app, name="bare", route_prefix=None)
        pid, address = handle.place.remote().result()
        arms.append(_grpc_arm("grpc-bare-ray", address, (pid,), question))
    return arms


def main(asked: str, names: Sequence[str]) -> None:
    """Start the arms, say so on standard output, wait for the end of the input."""
    import ray

    from bench import pieces, plain_serve, ztserve_arm

    stream = asked == "stream"
    question = (pieces if stream else plain_serve).question()
    plain = pieces.PlainWords if stream else plain_serve.Plain
    home = Path(os.environ["HOME"])
    ours = {"ztserve", "ztserve-https"} & set(names)
    if ours:
        ports = {"directory": free_port(), "gateway": free_port()}
        ztserve_arm.prepare(home / "project", ports)
    with ExitStack() as ending:
        ending.callback(ray.shutdown)
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(home / "ray"),
        )
        arms = _plain_arms(names, question, plain)
        if ours:
            direct = ztserve_arm.deploy(home / "svid", question, stream=stream)
            arms += [direct] if "ztserve" in ours else []
            if "ztserve-https" in ours:
                arms.append(ending.enter_context(ztserve_arm.gateway(direct)))
        print(READY + json.dumps([asdict(arm) for arm in arms]), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
