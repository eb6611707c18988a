"""What carrying a call costs: grpcio's server, our own, and nothing behind them.

    python -m bench.transport [--sizes N,N] [--rounds N] [--seconds N] [--json FILE]

All over mutual TLS. Ours echoes its input there and back, the peer judged, the message
decoded and encoded; no policy, no model, no filter, no audit. grpcio's server and nginx
have no code of ours and judge nobody but by the root: grpcio gives back the bytes that
came, and nginx, where it is installed, one canned answer to 256 bytes. 256 bytes are 64
numbers; larger bodies go over one connection and over four. Arms take turns within each
round; the loads are h2load's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench import nginx, report
from bench.generators import CASES, Arm, LoadError, build_shim, require_tools
from bench.request import UNITS, Samples, measure, summary
from ztserve.errors import ZTServeError
from ztserve.types import Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ztserve.identity import Svid
    from ztserve.testing import ThrowAwayAuthority
    from ztserve.types import Call, Description, Receive

ARMS = ("grpcio", "ztserve", "nginx")
SMALL = 256
SIZES = (SMALL, 16 << 10, 600_000, 1 << 20)
LARGE_CASES = ("1x1", "4x1")
METHOD = "/inference.GRPCInferenceService/ModelInfer"
DOMAIN = "bench.example"
SERVER = f"spiffe://{DOMAIN}/ns/bench/sa/echo"
CLIENT = f"spiffe://{DOMAIN}/ns/bench/sa/load"
THREADS = 2
"""Of grpcio's server: on two cores neither 1, 4, 16 nor grpc.aio did better overall."""


class Echo:
    """Answers with its inputs."""

    def infer(self, call: Call, receive: Receive) -> Reply:
        """Answer one request."""
        return Reply(receive().inputs)

    takes_several = True

    def infer_all(
        self, calls: Sequence[tuple[Call, Receive]]
    ) -> Iterator[tuple[int, Reply | Exception]]:
        """Answer several requests."""
        for at, (call, receive) in enumerate(calls):
            try:
                yield at, self.infer(call, receive)
            except ZTServeError as error:  # a load ends in the middle of calls
                yield at, error

    def stream(self, call: Call, receive: Receive) -> Iterator[Reply]:
        """Answer one request of a stream."""
        yield self.infer(call, receive)

    def describe(self, call: Call) -> Description:
        """Tell what is served."""
        from ztserve.types import Description, TensorSpec

        spec = (TensorSpec("x", "FP32", (-1, 64)),)
        return Description("echo", "1", "sha256:" + "0" * 64, spec, spec)


def grpcio(authority: ThrowAwayAuthority) -> tuple[int, Callable[[], object]]:
    """Start a plain server of grpcio's; return its port, and how to stop it."""
    import grpc

    from ztserve.identity.svid import pem

    echo = grpc.unary_unary_rpc_method_handler(lambda message, _context: message)
    service, _, name = METHOD.strip("/").rpartition("/")
    server = grpc.server(
        ThreadPoolExecutor(THREADS), options=[("grpc.so_reuseport", 0)]
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {name: echo}),)
    )
    svid = authority.issue(SERVER)
    credentials = grpc.ssl_server_credentials(
        [(svid.key_pem(), svid.chain_pem())],
        pem(authority.bundle),
        require_client_auth=True,
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return port, lambda: server.stop(1).wait()


def ztserve(authority: ThrowAwayAuthority) -> tuple[int, Callable[[], object]]:
    """Start our server; return its port, and how to stop it."""
    from ztserve import transport

    methods = transport.inference_methods(Echo(), "echo")
    server = transport.Server(methods, source=authority.source(SERVER))
    return server.start("127.0.0.1")[1], lambda: server.stop(1)


SERVERS = {"grpcio": grpcio, "ztserve": ztserve}
"""In Python, by the names of their arms."""


def body_of(size: int) -> str:
    """Return the request whose tensor has `size` bytes, in hexadecimal digits."""
    from ztserve.transport import values

    zeros = np.zeros((1, size // 4), np.float32)
    return values.message(values.request({"x": zeros}, model="echo")).hex()


def serve(name: str, folder: Path) -> None:
    """Serve as one arm until the standard input ends; print the arm."""
    from ztserve.testing import ThrowAwayAuthority

    authority = ThrowAwayAuthority(DOMAIN)
    port, stop = SERVERS[name](authority)
    cert, key = written(authority.issue(CLIENT), folder / name)
    pids, address = (os.getpid(),), f"127.0.0.1:{port}"
    arm = Arm(name, "grpc", address, METHOD, "", 0, pids, (), cert, key)
    print(json.dumps(asdict(arm)), flush=True)
    sys.stdin.read()
    stop()


def written(svid: Svid, stem: Path) -> tuple[str, str]:
    """Write an SVID as PEM files that only this user can read; return their paths."""
    cert, key = stem.with_suffix(".pem"), stem.with_suffix(".key")
    for path, text in ((cert, svid.chain_pem()), (key, svid.key_pem())):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(text)
    return str(cert), str(key)


@contextmanager
def python_arms(folder: Path) -> Iterator[list[Arm]]:
    """Start the servers in Python, each in a process of its own; yield their arms."""
    with ExitStack() as ending:
        arms = []
        for name in SERVERS:
            command = [sys.executable, "-m", "bench.transport", "--serve", name]
            server = subprocess.Popen(
                [*command, "--folder", folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            ending.callback(server.communicate, timeout=20)
            fields = json.loads(server.stdout.readline())  # type: ignore[union-attr]
            pids, headers = tuple(fields["pids"]), tuple(fields["headers"])
            arms.append(replace(Arm(**fields), pids=pids, headers=headers))
        yield arms


@contextmanager
def nginx_arms(folder: Path) -> Iterator[list[Arm]]:
    """Start nginx; yield its arm, or none where it is not installed."""
    from ztserve.testing import ThrowAwayAuthority

    if not nginx.is_installed():
        print(f"skipped: nginx is not installed. {nginx.INSTALL}")
        yield []
        return
    authority = ThrowAwayAuthority(DOMAIN)
    chain, server_key = written(authority.issue(SERVER), folder / "nginx-server")
    cert, key = written(authority.issue(CLIENT), folder / "nginx")
    answer = 5 + SMALL
    with nginx.serving(
        folder, chain=chain, key=server_key, roots=authority.bundle, answer=answer
    ) as (pid, address):
        yield [Arm("nginx", "grpc", address, METHOD, "", 0, (pid,), (), cert, key)]


def of_size(arms: Sequence[Arm], size: int) -> list[Arm]:
    """Return the `arms` that take bodies of `size`, to be loaded with them."""
    body = body_of(size)
    return [
        replace(arm, body=body, reply_bytes=size)
        for arm in arms
        if size == SMALL or arm.name != "nginx"
    ]


def tell(samples: Samples, path: str) -> None:
    """Print the table, and write it as JSON where `path` is given."""
    found = summary(samples)
    rows, shown = [], []
    for case in dict.fromkeys(case for _, case in found):
        for arm in ARMS:
            if (arm, case) not in found:
                continue
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
    columns = ("bytes, case", "arm", "requests/s", "p50 ms", "p99 ms", "CPU ms")
    report.show("carrying a call, medians", (*columns, f"x {ARMS[0]}"), shown)
    if path:
        report.write(path, rows)


def main() -> None:
    """Run the bench, or serve as one arm of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--json", default="")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve, chosen.folder)
        return
    try:
        require_tools()
        build_shim()
        print("\n".join(report.machine()))
        with tempfile.TemporaryDirectory(prefix="ztserve-bench-") as name:
            folder = Path(name)
            with python_arms(folder) as ours, nginx_arms(folder) as others:
                samples: Samples = {}
                for size in map(int, chosen.sizes.split(",")):
                    cases = CASES if size == SMALL else LARGE_CASES
                    arms = of_size([*ours, *others], size)
                    found = measure(arms, chosen.rounds, chosen.seconds, cases)
                    samples |= {
                        (arm, f"{size:,} {case}"): taken
                        for (arm, case), taken in found.items()
                    }
        tell(samples, chosen.json)
    except LoadError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
