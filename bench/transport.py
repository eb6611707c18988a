"""What carrying a call costs: gRPC's server, our own, and nothing behind them.

    python -m bench.transport [--rounds N] [--seconds N] [--json FILE]

The service echoes its input: 64 numbers there and back, mutual TLS, the peer judged,
the message decoded and encoded; no policy, no model, no filter, no audit. Arms take
turns within each round; the loads are h2load's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench import report
from bench.load import CASES, Arm, LoadError, build_shim, require_tools
from bench.request import UNITS, Samples, measure, summary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ztserve.types import Call, Description, Receive, Reply

ARMS = ("grpcio", "loop")
DOMAIN = "bench.example"
SERVER = f"spiffe://{DOMAIN}/ns/bench/sa/echo"
CLIENT = f"spiffe://{DOMAIN}/ns/bench/sa/load"


class Echo:
    """Answers with its inputs."""

    def infer(self, call: Call, receive: Receive) -> Reply:
        """Answer one request."""
        from ztserve.types import Reply

        return Reply(receive().inputs)

    takes_several = True

    def infer_all(
        self, calls: Sequence[tuple[Call, Receive]]
    ) -> Iterator[tuple[int, Reply]]:
        """Answer several requests."""
        for at, (call, receive) in enumerate(calls):
            yield at, self.infer(call, receive)

    def stream(self, call: Call, receive: Receive) -> Iterator[Reply]:
        """Answer one request of a stream."""
        yield self.infer(call, receive)

    def describe(self, call: Call) -> Description:
        """Tell what is served."""
        from ztserve.types import Description, TensorSpec

        spec = (TensorSpec("x", "FP32", (-1, 64)),)
        return Description("echo", "1", "sha256:" + "0" * 64, spec, spec)


def serve(name: str, folder: Path) -> None:
    """Serve as one arm until the standard input ends; print the arm."""
    from ztserve import transport
    from ztserve.testing import ThrowAwayAuthority
    from ztserve.transport import values
    from ztserve.transport.server import GrpcServer

    authority = ThrowAwayAuthority(DOMAIN)
    engine = {"grpcio": GrpcServer, "loop": transport.Server}[name]
    server = engine(
        transport.inference_methods(Echo(), "echo"), source=authority.source(SERVER)
    )
    host, port = server.start("127.0.0.1")
    svid = authority.issue(CLIENT)
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    for path, text in ((cert, svid.chain_pem()), (key, svid.key_pem())):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(text)
    body = values.message(
        values.request({"x": np.zeros((1, 64), np.float32)}, model="echo", id="")
    )
    arm = Arm(
        name,
        "grpc",
        f"{host}:{port}",
        "/inference.GRPCInferenceService/ModelInfer",
        body.hex(),
        256,
        (os.getpid(),),
        (),
        str(cert),
        str(key),
    )
    print(json.dumps(asdict(arm)), flush=True)
    sys.stdin.read()
    server.stop(1)


def tell(samples: Samples, path: str) -> None:
    """Print the table, and write it as JSON where `path` is given."""
    found = summary(samples)
    rows, shown = [], []
    for case in CASES:
        for arm in ARMS:
            values = found[arm, case]
            cells = [report.number(values[metric]) for metric in UNITS]
            ratio = values["rps"] / found[ARMS[0], case]["rps"]
            shown.append((case, arm, *cells, f"{report.number(ratio)}x"))
            rows += [
                report.Row(
                    arm=arm, case=case, metric=metric, value=values[metric], unit=unit
                )
                for metric, unit in UNITS.items()
            ]
    columns = ("case", "arm", "requests/s", "p50 ms", "p99 ms", "CPU ms")
    report.show("carrying a call, medians", (*columns, f"x {ARMS[0]}"), shown)
    if path:
        report.write(path, rows)


def main() -> None:
    """Run the bench, or serve as one arm of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--json", default="")
    parser.add_argument("--serve", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve, chosen.folder)
        return
    require_tools()
    build_shim()
    for line in report.machine():
        print(line)
    with tempfile.TemporaryDirectory(prefix="ztserve-bench-") as folder:
        servers, arms = [], []
        try:
            for name in ARMS:
                command = [sys.executable, "-m", "bench.transport", "--serve", name]
                server = subprocess.Popen(
                    [*command, "--folder", folder],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                servers.append(server)
                fields = json.loads(server.stdout.readline())  # type: ignore[union-attr]
                pids, headers = tuple(fields["pids"]), tuple(fields["headers"])
                arms.append(replace(Arm(**fields), pids=pids, headers=headers))
            time.sleep(0.5)
            tell(measure(arms, chosen.rounds, chosen.seconds), chosen.json)
        except LoadError as error:
            sys.exit(str(error))
        finally:
            for server in servers:
                server.communicate(timeout=20)


if __name__ == "__main__":
    main()
