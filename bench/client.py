"""What a Python client gets from a Python server: ours, and grpc.aio at both ends.

    python -m bench.client [--rounds N] [--seconds N] [--json FILE]

Each call carries 64 numbers there and back, encoded and decoded at both ends, over
mutual TLS; the server judges its peer. Server and client are processes of their own,
and take turns within each round. CPU: of the client, for one call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import report
from bench.transport import CLIENT, DOMAIN, SERVER, Echo

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ztserve.types import Request

PATH = "/inference.GRPCInferenceService/ModelInfer"
ARMS = ("grpc.aio", "grpc.aio to ztserve", "AsyncClient", "Client")
CASES = (1, 32)
WARM_S = 0.5
UNITS = {"rps": "1/s", "p50": "ms", "p99": "ms", "cpu": "us"}


# --- servers ------------------------------------------------------------------------


def serve() -> None:
    """Serve on both; print addresses and what a client needs, until the input ends."""
    from ztserve import transport
    from ztserve.testing import ThrowAwayAuthority

    known = ThrowAwayAuthority(DOMAIN)
    server = transport.Server(
        transport.inference_methods(Echo(), "echo"), source=known.source(SERVER)
    )
    _, port = server.start("127.0.0.1")
    svid = known.issue(CLIENT)
    told = {
        "ours": f"127.0.0.1:{port}",
        "chain": b"".join(svid.chain_der).hex(),
        "key": svid.key_der().hex(),
        "roots": b"".join(known.bundle).hex(),
        "pem": [
            one.decode()
            for one in (_pem(known.bundle), svid.key_pem(), svid.chain_pem())
        ],
    }
    asyncio.run(_serve_aio(known, told))
    server.stop(1)


async def _serve_aio(known: Any, told: dict[str, Any]) -> None:
    import grpc
    import grpc.aio

    from ztserve.identity import PeerVerifier
    from ztserve.transport import codec
    from ztserve.transport.v1 import inference_pb2 as pb

    judge = PeerVerifier(known.bundles)

    async def answer(message: bytes, context: Any) -> bytes:
        chain = context.auth_context()["x509_pem_cert"]
        judge.verify([_der(one) for one in chain])
        request = codec.parse(pb.ModelInferRequest, message)
        reply = pb.ModelInferResponse(model_name="echo")
        one = reply.outputs.add()
        one.CopyFrom(_output(request.inputs[0], pb))
        reply.raw_output_contents.extend(request.raw_input_contents)
        return bytes(reply.SerializeToString())

    server = grpc.aio.server()
    service, _, name = PATH.strip("/").rpartition("/")
    handlers = {name: grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, handlers),)
    )
    svid = known.issue(SERVER)
    port = server.add_secure_port(
        "127.0.0.1:0",
        grpc.ssl_server_credentials(
            [(svid.key_pem(), svid.chain_pem())], _pem(known.bundle), True
        ),
    )
    await server.start()
    print(json.dumps(told | {"aio": f"127.0.0.1:{port}"}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1)


def _output(given: Any, pb: Any) -> Any:
    return pb.ModelInferResponse.InferOutputTensor(
        name=given.name, datatype=given.datatype, shape=given.shape
    )


def _der(pem: bytes) -> bytes:
    import ssl

    return ssl.PEM_cert_to_DER_cert(pem.decode())


def _pem(roots: Any) -> bytes:
    from ztserve.identity.svid import pem

    return pem(roots)


# --- clients ------------------------------------------------------------------------


class Tally:
    """Counts calls and their times, once warm."""

    def __init__(self, seconds: float) -> None:
        self.begins = time.perf_counter() + WARM_S
        self.ends = self.begins + seconds
        self.seconds = seconds
        self.times: list[float] = []
        self._cpu: float | None = None
        self._calls = 0

    def count(self, began: float) -> bool:
        """Count a call that began then; return whether there is time for more."""
        now = time.perf_counter()
        if began >= self.begins:
            if self._cpu is None:
                self._cpu = _cpu_s()
            self.times.append(now - began)
        return now < self.ends

    def told(self) -> dict[str, float]:
        """Return the figures."""
        cpu = _cpu_s() - (self._cpu or 0.0)
        ordered = sorted(self.times)
        return {
            "rps": len(ordered) / self.seconds,
            "p50": statistics.median(ordered) * 1e3,
            "p99": ordered[int(len(ordered) * 0.99)] * 1e3,
            "cpu": cpu / len(ordered) * 1e6,
        }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def call(name: str, count: int, seconds: float, told: dict[str, Any]) -> None:
    """Call as one arm, `count` calls at once; print the figures."""
    from ztserve.transport import values

    tally = Tally(seconds)
    request = values.request({"x": np.zeros((1, 64), np.float32)}, model="echo")
    if name == "Client":
        _threads(told, count, request, tally)
    elif name == "AsyncClient":
        asyncio.run(_tasks(_ours, told, count, request, tally))
    else:
        asyncio.run(_tasks(_aio(name), told, count, request, tally))
    print(json.dumps(tally.told()))


def _source(told: dict[str, Any]) -> Any:
    from ztserve import types
    from ztserve.identity import FixedSource
    from ztserve.identity.svid import Material, read_identity

    chain, key, roots = (bytes.fromhex(told[one]) for one in ("chain", "key", "roots"))
    material = Material(CLIENT, chain, key, roots)
    return FixedSource(read_identity(material, now=types.now()))


def _threads(told: dict[str, Any], count: int, request: Request, tally: Tally) -> None:
    from ztserve import transport

    def work() -> None:
        while True:
            began = time.perf_counter()
            client.send(request)
            if not tally.count(began):
                return

    source = _source(told)
    with transport.Client(told["ours"], source=source, server_id=SERVER) as client:
        threads = [threading.Thread(target=work) for _ in range(count)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()


async def _tasks(
    opened: Callable[[dict[str, Any]], Any],
    told: dict[str, Any],
    count: int,
    request: Request,
    tally: Tally,
) -> None:
    async def work(send: Callable[[Request], Coroutine[Any, Any, Any]]) -> None:
        while True:
            began = time.perf_counter()
            await send(request)
            if not tally.count(began):
                return

    client, send = opened(told)
    async with client:
        await asyncio.gather(*(work(send) for _ in range(count)))


def _ours(told: dict[str, Any]) -> tuple[Any, Any]:
    from ztserve import transport

    source = _source(told)
    client = transport.AsyncClient(told["ours"], source=source, server_id=SERVER)
    return client, client.send


def _aio(name: str) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    def opened(told: dict[str, Any]) -> tuple[Any, Any]:
        import grpc
        import grpc.aio

        from ztserve.identity import dns_name
        from ztserve.transport import protocol, values

        channel = grpc.aio.secure_channel(
            told["aio" if name == "grpc.aio" else "ours"],
            grpc.ssl_channel_credentials(*(one.encode() for one in told["pem"])),
            options=[("grpc.ssl_target_name_override", dns_name(SERVER))],
        )
        send = channel.unary_unary(
            PATH,
            request_serializer=values.message,
            response_deserializer=protocol.answer,
        )

        async def ask(request: Request) -> Any:
            return await send(request, timeout=30)

        return channel, ask

    return opened


# --- the run ------------------------------------------------------------------------


def main() -> None:
    """Run the bench, or serve or call as a part of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--json", default="")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--call", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve()
    elif chosen.call:
        call(chosen.call, chosen.count, chosen.seconds, json.loads(input()))
    else:
        for line in report.machine():
            print(line)
        tell(measure(chosen.rounds, chosen.seconds), chosen.json)


def measure(
    rounds: int, seconds: float
) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Return the figures of each arm and case, a value for each round."""
    command = [sys.executable, "-m", "bench.client"]
    samples: dict[tuple[str, int], dict[str, list[float]]] = {}
    with subprocess.Popen(
        [*command, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        told = server.stdout.readline()  # type: ignore[union-attr]
        for _ in range(rounds):
            for count in CASES:
                for arm in ARMS:
                    found = subprocess.run(
                        [
                            *(*command, "--call", arm, "--count", str(count)),
                            *("--seconds", str(seconds)),
                        ],
                        input=told,
                        stdout=subprocess.PIPE,
                        text=True,
                        timeout=60 + seconds,
                        check=True,
                    ).stdout
                    for metric, value in json.loads(found).items():
                        samples.setdefault((arm, count), defaultdict(list))[
                            metric
                        ].append(value)
        server.stdin.close()  # type: ignore[union-attr]
    return samples


def tell(samples: dict[tuple[str, int], dict[str, list[float]]], path: str) -> None:
    """Print the table, and write it as JSON where `path` is given."""
    rows, shown = [], []
    for count in CASES:
        base = statistics.median(samples[ARMS[0], count]["rps"])
        for arm in ARMS:
            found = {m: statistics.median(samples[arm, count][m]) for m in UNITS}
            cells = [report.number(found[metric]) for metric in UNITS]
            ratio = f"{report.number(found['rps'] / base)}x"
            shown.append((str(count), arm, *cells, ratio))
            rows += [
                report.Row(
                    arm=arm, case=str(count), metric=m, value=found[m], unit=unit
                )
                for m, unit in UNITS.items()
            ]
    columns = ("at once", "arm", "calls/s", "p50 ms", "p99 ms", "client CPU us")
    report.show("a Python client, medians", (*columns, f"x {ARMS[0]}"), shown)
    if path:
        report.write(path, rows)


if __name__ == "__main__":
    main()
