"""What one request costs, room by room, in microseconds.

    python -m bench.stages [--quick] [--json FILE]

The rooms of one process, with the digits example's declarations and policies, each
called by itself again and again; the figure is the median. Caches are warmer here than
between the rooms of a live replica, so the whole costs more than its parts; `pipeline`
is the whole in one thread, `round trip` the same over mutual TLS, both ends in this
process. `connection` happens once a connection, all else once a call.
"""

from __future__ import annotations

import argparse
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from bench import report
from bench.plain_serve import Model, network, request_bytes
from examples.digits import Digits
from ztserve import testing
from ztserve.audit import Log
from ztserve.authorization import PolicySet
from ztserve.filtering import OutputFilter
from ztserve.identity import PeerVerifier, verify_peer
from ztserve.inference import Runner
from ztserve.pipeline import Pipeline
from ztserve.transport import codec
from ztserve.types import Call, Description, operations
from ztserve.validation import Validator

if TYPE_CHECKING:
    from ztserve.testing.serving import Served

POLICIES = Path(__file__).parents[1] / "examples/policies"
CLI = "spiffe://dev.ztserve.internal/ns/dev/sa/cli"

Stage = tuple[str, str, Callable[[], object]]
"""Once a connection or a call; its name; what to measure."""


@contextmanager
def stages() -> Iterator[list[Stage]]:
    """Build the rooms around the digits example and yield what to measure."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = folder / "model"
        model.mkdir()
        save_file(network().state_dict(), model / "model.safetensors")
        served = stack.enter_context(testing.serve(Digits, model=model))
        log = stack.enter_context(Log(folder / "audit/calls.jsonl", origin={}))
        yield [*_connection(served, folder), *_rooms(served, log), *_whole(served)]


def _connection(served: Served, folder: Path) -> list[Stage]:
    svid = served.authority.issue(CLI)
    pem = folder / "svid.pem"
    pem.touch(mode=0o600)
    pem.write_bytes(svid.key_pem() + svid.chain_pem())
    bundles = served.authority.bundles
    return [
        ("connection", "TLS handshake, both ends", _handshake(served.address, pem)),
        (
            "connection",
            "verification of the peer",
            lambda: verify_peer(svid.chain_der, bundles, now=time.time()),
        ),
    ]


def _handshake(address: str, pem: Path) -> Callable[[], object]:
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    # The server's certificate is not the measured thing here; clients check it.
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(pem)
    context.set_alpn_protocols(["h2"])

    def connect() -> None:
        plain = socket.create_connection((host, int(port)), timeout=5)
        with context.wrap_socket(plain) as secure:
            # TLS 1.3: the first bytes from the server say that it took our side.
            secure.recv(1)

    return connect


def _rooms(served: Served, log: Log) -> list[Stage]:
    peer_chain = served.authority.issue(CLI).chain_der
    verifier = PeerVerifier(served.authority.bundles)
    call = Call(
        id="bench",
        peer=verifier.verify(peer_chain),
        caller=None,
        operation=operations("digits")["ModelInfer"],
        deadline=time.monotonic() + 3600,
        source_ip="127.0.0.1",
    )
    message = request_bytes()
    policies = PolicySet.load(
        [POLICIES / "seed.yaml", POLICIES / "developer.yaml"],
        trust_domain="dev.ztserve.internal",
        namespace="ml-inference",
        labels={"app": Digits.service},
        operations=operations("digits").values(),
    )
    validator = Validator(
        Digits.inputs, model="digits", max_rows=1024, max_bytes=8 << 20
    )
    net = network()
    runner = Runner(
        lambda pixels: net(pixels).softmax(dim=1),
        inputs=Digits.inputs,
        outputs=Digits.outputs,
        batch=Digits.batch,
    )
    release = OutputFilter(Digits.outputs, text=None, max_bytes=16 << 20)
    request = codec.request(message)
    inputs = validator.check(request)

    def run() -> object:
        with runner.admit() as place:
            return place.run(call, inputs)

    with runner.admit() as place:
        outputs = place.run(call, inputs)
    reply = release.release(outputs)

    def record() -> None:
        with log.record(call) as entry:
            entry.rule = "bench"
            for stage in ("authorization", "receive", "validation", "inference"):
                entry.stage(stage)
            entry.released(reply)

    pipeline = Pipeline(
        Description("digits", "1", "sha256:0", Digits.inputs, Digits.outputs),
        policies=policies,
        validator=validator,
        runner=runner,
        outputs=release,
        log=log,
    )
    bare = Model()
    pixels = request.inputs[0].data
    assert isinstance(pixels, bytes)

    def encode() -> bytes:
        return codec.reply(reply, "digits", "1", "")

    def whole() -> bytes:
        answer = pipeline.infer(call, lambda: codec.request(message))
        return codec.reply(answer, "digits", "1", "")

    return [
        ("call", "peer, remembered", lambda: verifier.verify(peer_chain)),
        ("call", "authorization", lambda: policies.authorize(call)),
        ("call", "decode", lambda: codec.request(message)),
        ("call", "validation", lambda: validator.check(request)),
        ("call", "model", lambda: bare.answer(pixels)),
        ("call", "queue, batch and model", run),
        ("call", "filtering", lambda: release.release(outputs)),
        ("call", "audit", record),
        ("call", "encode", encode),
        ("call", "pipeline", whole),
    ]


def _whole(served: Served) -> list[Stage]:
    pixels = torch.zeros(1, 64).numpy()
    return [
        ("call", "round trip", lambda: served.client.infer({"pixels": pixels})),
    ]


def measure(stage: Callable[[], object], seconds: float) -> float:
    """Return the median microseconds of `stage`, over many short runs of it."""
    stage()
    start = time.perf_counter()
    stage()
    # As many calls a run as take about a millisecond: the clock then costs nothing.
    count = max(1, min(1000, int(1e-3 / (time.perf_counter() - start))))
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end or not taken:
        for _ in range(count):
            stage()
        taken.append((time.perf_counter() - begun) / count * 1e6)
    return median(taken)


def main(given: Sequence[str] | None = None) -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.stages")
    parser.add_argument("--quick", action="store_true", help="0.2 s a stage, not 2 s")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    print("\n".join(report.machine()), flush=True)
    rounds = 1 if arguments.quick else 5
    with stages() as found:
        figures = [
            [measure(stage, 0.2 if arguments.quick else 0.4) for *_, stage in found]
            for _ in range(rounds)
        ]
    medians = [median(several) for several in zip(*figures, strict=True)]
    rows = [
        [often, name, f"{value:,.1f}"]
        for (often, name, _), value in zip(found, medians, strict=True)
    ]
    report.show("one call, room by room", ["once a", "stage", "us"], rows)
    if arguments.json:
        report.write(
            arguments.json,
            [
                report.Row(
                    arm="ztserve", case=often, metric=name, value=value, unit="us"
                )
                for (often, name, _), value in zip(found, medians, strict=True)
            ],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
