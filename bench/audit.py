"""What a record of every call costs: the same handler with and without an audit log.

    python -m bench.audit [--quick] [--json FILE]

The handler decodes 64 float32, runs the digits-sized network in numpy and encodes the
answer. `record` is the record alone, `audited` the handler inside it. Each thread
calls as fast as it can, so with eight of them on one interpreter lock the p99 is the
lock's switch interval, with or without a log. `cpu_us` is process CPU a call.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from bench import report
from ztserve.audit import Log, verify_log
from ztserve.types import Call, Caller, Peer, Reply, Request, Tensor, operations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GATEWAY = "spiffe://dev.ztserve.internal/ns/ml-api/sa/api-gateway"
UNITS = {"calls_per_s": "1/s", "p50_us": "us", "p99_us": "us", "cpu_us": "us"}
THREADS = (1, 8)


def handlers(log: Log) -> dict[str, Callable[[], object]]:
    """Return what is measured, by arm."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(64, 128)).astype("<f4")
    scores = random.normal(size=(128, 10)).astype("<f4")
    pixels = np.arange(64, dtype="<f4").tobytes()
    when = datetime(2030, 1, 1, tzinfo=UTC)
    peer = Peer(GATEWAY, 2**159 + 1, when, when, "ab" * 32)
    caller = Caller("dev.ztserve.internal", "alice", proof=f"asserted by {GATEWAY}")
    operation = operations("digits")["ModelInfer"]
    call = Call("0" * 32, peer, caller, operation, 1e9, source_ip="127.0.0.1")
    request = Request("digits", "", "1", (), size=300)
    reply = Reply((Tensor("probabilities", "FP32", (1, 10), b"\0" * 40),))

    def bare() -> bytes:
        rows = np.frombuffer(pixels, dtype="<f4").reshape(1, 64)
        exp = np.exp(np.maximum(rows @ hidden, 0) @ scores * 1e-3)
        return bytes((exp / exp.sum()).tobytes())

    def audited(inner: Callable[[], object]) -> None:
        with log.record(call) as record:
            record.model, record.version = "digits", "1"
            record.digest = "sha256:" + "ab" * 32
            record.rule = "ns[ml-inference]-policy[inference-service]-rule[0]"
            record.stage("authorization")
            record.received(request)
            record.stage("validation")
            inner()
            record.stage("inference")
            record.released(reply)

    return {
        "bare": bare,
        "audited": lambda: audited(bare),
        "record": lambda: audited(lambda: None),
    }


def measure(handler: Callable[[], object], threads: int, seconds: float) -> list[float]:
    """Call `handler` from `threads` threads; return the values of UNITS, in order."""
    taken: list[list[float]] = [[] for _ in range(threads)]
    end = time.perf_counter() + seconds

    def work(mine: list[float]) -> None:
        while (begun := time.perf_counter()) < end:
            handler()
            mine.append((time.perf_counter() - begun) * 1e6)

    running = [Thread(target=work, args=(mine,)) for mine in taken]
    cpu = time.process_time()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    cpu = time.process_time() - cpu
    calls = sorted(one for mine in taken for one in mine)
    count = len(calls)
    p50, p99 = calls[count // 2], calls[count * 99 // 100]
    return [count / seconds, p50, p99, cpu / count * 1e6]


def main(given: Sequence[str] | None = None) -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.audit")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 0.2 s, not 9")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(given)
    print("\n".join(report.machine()), flush=True)
    samples: dict[tuple[str, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit" / "calls.jsonl"
        with Log(path, origin={"service": "bench"}) as log:
            arms = handlers(log)
            for _ in range(3 if arguments.quick else 9):
                for threads in THREADS:
                    for arm, handler in arms.items():
                        taken = measure(handler, threads, 0.2)
                        samples.setdefault((arm, f"{threads}x"), []).append(taken)
        print(verify_log(path).message)
    figures = {
        key: [median(x) for x in zip(*v, strict=True)] for key, v in samples.items()
    }
    _print(figures)
    if arguments.json:
        rows = [
            report.Row(arm=arm, case=case, metric=metric, value=value, unit=unit)
            for (arm, case), values in figures.items()
            for (metric, unit), value in zip(UNITS.items(), values, strict=True)
        ]
        report.write(arguments.json, rows)
    return 0


def _print(figures: dict[tuple[str, str], list[float]]) -> None:
    rows = []
    for (arm, case), values in figures.items():
        bare = figures["bare", case]
        added = report.number(values[1] - bare[1]) if arm == "audited" else "-"
        ratio = f"{values[0] / bare[0]:.2f}x"
        rows.append([case, arm, *map(report.number, values), added, ratio])
    rows.sort(key=lambda row: row[0])
    columns = [
        "threads",
        "arm",
        "calls/s",
        "p50 us",
        "p99 us",
        "CPU us",
        "p50 added",
        "x bare",
    ]
    report.show("medians", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
