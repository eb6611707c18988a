"""Loads one server with a C load generator, and reads what its processes cost.

h2load drives gRPC, wrk drives HTTP/1.1; neither shares an interpreter with what is
measured (a Python client costs more than the servers and hides their differences).
Neither can take a client certificate, so one is given to them by an LD_PRELOAD shim,
``tls_client_cert.c``. They do not verify the server: what is measured is the server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
BUILD = Path(__file__).parent / "build"
CASES = ("1x1", "32x1", "1x32")
"""Connections x calls in flight on each."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
INSTALL = (
    "On Debian or Ubuntu: apt-get install nghttp2-client wrk gcc libc6-dev libssl-dev"
)
EDGE_S = 0.2
"""CPU is read this long after the start and before the end of the measured time."""


class LoadError(Exception):
    """The load generator is missing or failed, or the server did not answer well."""


@dataclass(frozen=True)
class Arm:
    """One way to serve the model, as a load generator sees it."""

    name: str
    protocol: Literal["grpc", "http"]
    address: str
    path: str
    body: str
    """The message as hexadecimal digits (JSON has no bytes); unframed."""
    reply_bytes: int
    """Fewest bytes of a good answer's body: tells answers from refusals."""
    pids: tuple[int, ...]
    """Every server process on the way of a request; their children count too."""
    headers: tuple[str, ...] = ()
    cert: str = ""
    """PEM chain and key of the client; empty: plain text, no TLS."""
    key: str = ""

    @property
    def url(self) -> str:
        """Where the generators send their calls."""
        return f"{'https' if self.cert else 'http'}://{self.address}{self.path}"

    def takes(self, case: str) -> bool:
        """Return whether this arm can run `case`: HTTP/1.1 carries one call a time."""
        return self.protocol == "grpc" or case.endswith("x1")


@dataclass(frozen=True)
class Sample:
    """What one measured window showed."""

    rps: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """Server CPU time per request, user and system, over all its processes."""
    client_cpu_ms: float
    others: float
    """Cores kept busy by processes that are neither server nor load generator."""


def require_tools() -> None:
    """Raise LoadError if a program that the bench needs is not installed."""
    missing = [tool for tool in ("h2load", "wrk", "cc") if not shutil.which(tool)]
    if missing:
        raise LoadError(f"not installed: {', '.join(missing)}. {INSTALL}")


def build_shim() -> Path:
    """Compile the client-certificate shim, once per change of its source."""
    source = Path(__file__).parent / "tls_client_cert.c"
    shim = BUILD / "tls_client_cert.so"
    if not shim.exists() or shim.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(exist_ok=True)
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(shim), str(source)]
        done = subprocess.run([*command, "-ldl"], check=False)
        if done.returncode:
            raise LoadError(f"{source.name} did not compile. {INSTALL}")
    return shim


def grpc_frame(message: bytes) -> bytes:
    """Return `message` as gRPC puts it on the wire: flag, length, bytes."""
    return struct.pack(">BI", 0, len(message)) + message


def family(pids: Sequence[int]) -> set[int]:
    """Return `pids` and all their descendants that live now."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found


def cpu_s(pids: Sequence[int]) -> float:
    """Return the CPU seconds of `pids` and all their descendants, ended ones too.

    Raises LoadError if one of `pids` is gone: a server that died was not measured.
    """
    ticks = 0
    for pid in family(pids):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError as error:
            if pid in pids:
                raise LoadError(f"server process {pid} is gone") from error
            continue
        ticks += sum(int(field) for field in fields[11:15])
    return ticks * TICK_S


def busy_s() -> float:
    """Return the CPU seconds that the whole machine has spent working."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) * TICK_S


def patiently(ask: Callable[[], T]) -> T:
    """Ask until there is an answer: proxies learn of a deployment a little later."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return ask()
        except (OSError, HTTPException, grpc.RpcError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def run(arm: Arm, case: str, seconds: int) -> Sample:
    """Load `arm` for `seconds`; raise LoadError unless all calls went well."""
    connections, streams = map(int, case.split("x"))
    with tempfile.TemporaryDirectory(prefix="ztserve-bench-") as scratch:
        if arm.protocol == "grpc":
            return _h2load(arm, connections, streams, seconds, Path(scratch))
        return _wrk(arm, connections, seconds, Path(scratch))


def _h2load(
    arm: Arm, connections: int, streams: int, seconds: int, scratch: Path
) -> Sample:
    body, log = scratch / "body", scratch / "log"
    body.write_bytes(grpc_frame(bytes.fromhex(arm.body)))
    command = ["h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-D{seconds}"]
    command += [f"-d{body}", f"--log-file={log}"]
    for header in ("content-type: application/grpc", "te: trailers", *arm.headers):
        command += ["-H", header]
    watched = _watch(arm, [*command, arm.url], seconds)
    lost = _find(r"(\d+ failed, \d+ errored, \d+ timeout)", watched.output, arm)
    # Columns: start (us since the epoch), HTTP status, us until the end.
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    bad = sum(row[1] != "200" for row in rows)
    # A gRPC refusal is a 200 without a body, so count the bytes as well.
    sent = int(_find(r"\((\d+)\) data", watched.output, arm))
    short = sent < len(rows) * (5 + arm.reply_bytes)
    if bad or short or not rows or lost != "0 failed, 0 errored, 0 timeout":
        raise LoadError(
            f"{arm.name}: of {len(rows)} calls {bad} had no status 200 ({lost}), and "
            f"{sent} bytes came back where a good answer has {5 + arm.reply_bytes}"
        )
    times = sorted(int(row[2]) / 1e3 for row in rows)
    return watched.sample(
        len(rows) / seconds, times[len(times) // 2], times[len(times) * 99 // 100]
    )


_WRK_SCRIPT = """
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
{headers}
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {{"rps": %f, "p50": %f, "p99": %f, "bad": %d, "short": %s}}\\n',
    summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, e.connect + e.read + e.write + e.status + e.timeout,
    tostring(summary.bytes < summary.requests * {reply_bytes})))
end
"""


def _wrk(arm: Arm, connections: int, seconds: int, scratch: Path) -> Sample:
    body, script = scratch / "body", scratch / "post.lua"
    body.write_bytes(bytes.fromhex(arm.body))
    pairs = [header.split(": ", 1) for header in arm.headers]
    headers = "\n".join(f'wrk.headers["{name}"] = "{v}"' for name, v in pairs)
    parts = {"body": body, "headers": headers, "reply_bytes": arm.reply_bytes}
    script.write_text(_WRK_SCRIPT.format(**parts))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"-s{script}"]
    watched = _watch(arm, [*command, arm.url], seconds)
    result = json.loads(_find(r"RESULT (.*)", watched.output, arm))
    if result["bad"] or result["short"] or not result["rps"]:
        raise LoadError(
            f"{arm.name}: {result['bad']} calls failed"
            f"{', or were short' * result['short']}:\n{watched.output}"
        )
    return watched.sample(result["rps"], result["p50"], result["p99"])


@dataclass(frozen=True)
class _Watched:
    """What one run of a generator printed, and CPU seconds while it was loading."""

    output: str
    wall_s: float
    server_s: float
    client_s: float
    machine_s: float

    def sample(self, rps: float, p50_ms: float, p99_ms: float) -> Sample:
        requests = rps * self.wall_s
        others = self.machine_s - self.server_s - self.client_s
        return Sample(
            rps=rps,
            p50_ms=p50_ms,
            p99_ms=p99_ms,
            cpu_ms=self.server_s * 1e3 / requests,
            client_cpu_ms=self.client_s * 1e3 / requests,
            others=max(0.0, others / self.wall_s),
        )


def _watch(arm: Arm, command: list[str], seconds: int) -> _Watched:
    """Run `command` for `seconds`; read the CPU clocks shortly after and before."""
    env = {"PATH": os.environ["PATH"]}
    if arm.cert:
        env |= {"LD_PRELOAD": str(build_shim())}
        env |= {"CLIENT_CERT": arm.cert, "CLIENT_KEY": arm.key}
    readings = []
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT
        ) as process:
            for pause in (EDGE_S, seconds - 2 * EDGE_S):
                time.sleep(pause)
                client = [process.pid] if process.poll() is None else []
                clocks = (cpu_s(arm.pids), cpu_s(client), busy_s())
                readings.append((time.monotonic(), *clocks))
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise LoadError(f"{arm.name}: {' '.join(command)} failed:\n{text[-2000:]}")
    first, last = readings
    wall, server, client_s, machine = (b - a for a, b in zip(first, last, strict=True))
    return _Watched(text, wall, server, client_s, machine)


def _find(pattern: str, text: str, arm: Arm) -> str:
    match = re.search(pattern, text)
    if not match:
        raise LoadError(
            f"{arm.name}: no {pattern!r} in the generator's output:\n{text}"
        )
    return match[1]
