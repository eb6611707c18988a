"""One copy of the weights a node: the first replica, the second, and their memory.

    python -m bench.share [--mib 1024] [--rounds 5] [--quick] [--json FILE]

The same signed model, in one file and in four, in the page cache. Each replica is a
fresh process that imports, then loads, then sums a byte of every page; the second one
loads while the first still holds the weights. Figures are medians, with the least and
the most. Memory is PSS (a page that n processes map counts 1/n in each; from
/proc/PID/smaps_rollup) that loading added to broker and replicas together, as a part of
the model: with one replica in the rows `own` and `first`, with both in `second`. CPU is
what the replica itself took, of user and system time: a busy machine adds to it least.

============  ====================================================================
own           `verify_model` into private memory, which nobody shares
first         the broker verifies, hashes and seals; the replica maps
second        the broker has the weights; the replica verifies all but the digests
============  ====================================================================

`broker` is what a first replica waits for besides: a process that starts, imports and
listens (as an actor of Ray it takes Ray's own time to start a worker instead).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any

from rich.progress import track

from bench import load, report
from ztserve import identity
from ztserve.identity.svid import pem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ztserve.artifacts import Memory
    from ztserve.types import ModelRef

ARMS = ("own", "first", "second")
DOMAIN = "dev.ztserve.internal"
BROKER = f"spiffe://{DOMAIN}/ns/ztserve/sa/weights"
REPLICA = f"spiffe://{DOMAIN}/ns/ml-inference/sa/inference-service"
GOAL_S = 0.1
START_S = 60.0


def identities(place: Path) -> None:
    """Write an SVID for the broker, and one for replicas, as files."""
    with identity.Authority(DOMAIN) as authority:
        for kind, spiffe_id in (("broker", BROKER), ("replica", REPLICA)):
            svid = authority.issue(spiffe_id)
            roots = pem(authority.bundles[DOMAIN])
            for name, text in zip(
                _paths(place, kind),
                (svid.chain_pem(), svid.key_pem(), roots),
                strict=True,
            ):
                name.touch(mode=0o600)
                name.write_bytes(text)


def _paths(place: Path, kind: str) -> list[Path]:
    return [place / f"{kind}.{part}.pem" for part in ("svid", "key", "bundle")]


def source(place: Path, kind: str) -> identity.FileSource:
    """Return the identity that `identities` wrote."""
    return identity.FileSource(
        *_paths(place, kind), trust_domain=DOMAIN, timeout_s=START_S
    )


# --- in processes of their own -------------------------------------------------


def pss_kib() -> int:
    """Return this process's proportional share of the memory that it maps."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(rollup.partition("\nPss:")[2].split()[0])


def say(**facts: float) -> None:
    """Tell the parent."""
    print(json.dumps(facts), flush=True)


def answer_until_told() -> None:
    """Tell the memory at each line of the parent's, until it closes."""
    for _ in sys.stdin:
        say(kib=pss_kib())


def broke(place: Path, folder: Path) -> None:
    """Be the broker of the model in `folder`."""
    from ztserve.artifacts import Broker, TrustPolicy, verify_model

    def verified(ref: ModelRef, memory: Memory) -> None:
        trust = TrustPolicy.load(folder / "trust.toml")
        verify_model(folder / "ztserve", ref, trust, memory=memory)

    broker = Broker(
        place / "weights.sock", source(place, "broker"), verified, max_bytes=1 << 40
    )
    broker.start()
    say(kib=pss_kib())
    answer_until_told()
    broker.stop()


def replicate(arm: str, place: Path, folder: Path) -> None:
    """Load as a replica does, touch every page, tell what it took; hold it."""
    import torch  # noqa: F401 - what a replica has imported by then

    from ztserve.artifacts import SharedMemory, TrustPolicy, verify_model

    memory = SharedMemory(
        place / "weights.sock", BROKER, source(place, "replica"), min_bytes=0
    )
    before = pss_kib()
    began, cpu = time.perf_counter(), time.process_time()
    trust = TrustPolicy.load(folder / "trust.toml")
    model = verify_model(
        folder / "ztserve", "m:1", trust, memory=None if arm == "own" else memory
    )
    loaded = time.perf_counter() - began
    tensors = [tensor for _, tensor in model.tensors()]
    touched = sum(int(one[:: load.PAGE].sum()) for one in tensors)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    say(
        s=seconds,
        cpu=cpu,
        loaded=loaded,
        before=before,
        kib=pss_kib(),
        touched=touched,
    )
    answer_until_told()


# --- the parent ------------------------------------------------------------------


class Child:
    """A process of this module, which tells facts and answers questions."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.share", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.told = self._read()

    def _read(self) -> dict[str, float]:
        line = _open(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"a child ended: {self._process.wait()}")
        told: dict[str, float] = json.loads(line)
        return told

    def kib(self) -> float:
        """Return its PSS now."""
        pipe = _open(self._process.stdin)
        pipe.write("\n")
        pipe.flush()
        return self._read()["kib"]

    def close(self) -> None:
        """Have it end, and wait for that."""
        _open(self._process.stdin).close()
        self._process.wait(START_S)
        _open(self._process.stdout).close()


def _open(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("a child without pipes")
    return pipe


def turn(place: Path, folder: Path, mib: int) -> dict[tuple[str, str], float]:
    """Run each arm once; return the figures by arm and metric."""
    for path in (folder / "ztserve").iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    found: dict[tuple[str, str], float] = {}
    common = ("--place", str(place), "--folder", str(folder))
    with ExitStack() as ending:

        def child(*arguments: str) -> Child:
            made = Child(*arguments, *common)
            ending.callback(made.close)
            return made

        own = Child("--replica", "own", *common)
        own.close()
        began = time.perf_counter()
        broker = child("--broker")
        found["broker", "start"] = time.perf_counter() - began
        first = child("--replica", "first")
        alone = _added(first.told, first.kib()) + broker.kib() - broker.told["kib"]
        second = child("--replica", "second")
        both = (
            _added(first.told, first.kib())
            + _added(second.told, second.kib())
            + broker.kib()
            - broker.told["kib"]
        )
        told = {"own": own.told, "first": first.told, "second": second.told}
    if len({one["touched"] for one in told.values()}) != 1:
        raise ValueError("the arms did not load the same bytes")
    memory = {"own": _added(own.told, own.told["kib"]), "first": alone, "second": both}
    for arm in ARMS:
        found[arm, "seconds"] = told[arm]["s"]
        found[arm, "without touching"] = told[arm]["loaded"]
        found[arm, "cpu"] = told[arm]["cpu"]
        found[arm, "memory"] = memory[arm] / (mib << 10)
    return found


def _added(told: dict[str, float], kib: float) -> float:
    return kib - told["before"]


def measure(mib: int, rounds: int) -> list[report.Row]:
    """Return all figures; ValueError where two arms loaded other bytes."""
    taken: dict[tuple[int, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="ztserve-bench-") as name:
        place = Path(name)
        identities(place)
        for files in (1, 4):
            load.make(place / str(files), mib, files)
        turns = [(number, files) for number in range(rounds) for files in (1, 4)]
        for _, files in track(turns, "sharing", transient=True):
            for (arm, metric), value in turn(place, place / str(files), mib).items():
                taken.setdefault((files, arm, metric), []).append(value)
    rows: list[report.Row] = []
    for (files, arm, metric), values in taken.items():
        unit = "of the model" if metric == "memory" else "s"
        case = f"{files} file{'s' * (files > 1)}"
        for title, value in (
            (metric, median(values)),
            (f"{metric}, least", min(values)),
            (f"{metric}, most", max(values)),
        ):
            rows.append(
                {
                    "arm": arm,
                    "case": case,
                    "metric": title,
                    "value": value,
                    "unit": unit,
                }
            )
    return rows


def show(rows: Sequence[report.Row], mib: int) -> None:
    """Print a table, and the goal beside what is to meet it."""
    found = {(row["case"], row["arm"], row["metric"]): row["value"] for row in rows}
    table = []
    for case in dict.fromkeys(row["case"] for row in rows):

        def figure(arm: str, metric: str, case: str = case) -> str:
            return report.number(found[case, arm, metric])

        for arm in ARMS:
            span = (figure(arm, f"seconds, {end}") for end in ("least", "most"))
            goal = f" (goal {GOAL_S})" if arm == "second" else ""
            table.append(
                (
                    case,
                    arm,
                    figure(arm, "seconds") + goal,
                    "..".join(span),
                    figure(arm, "without touching"),
                    figure(arm, "cpu"),
                    figure(arm, "memory"),
                )
            )
        table.append((case, "broker start", figure("broker", "start"), "", "", "", ""))
    columns = (
        "case",
        "arm",
        "s",
        "min..max",
        "without touching",
        "CPU s",
        "memory, all",
    )
    report.show(f"{mib} MiB of weights", columns, table)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=1024, help="of weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="64 MiB, one round")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS}
    parser.add_argument("--broker", action="store_true", **hidden)
    parser.add_argument("--replica", choices=ARMS, **hidden)
    parser.add_argument("--place", type=Path, **hidden)
    parser.add_argument("--folder", type=Path, **hidden)
    chosen = parser.parse_args()
    if chosen.broker:
        broke(chosen.place, chosen.folder)
        return
    if chosen.replica:
        replicate(chosen.replica, chosen.place, chosen.folder)
        return
    print("\n".join(report.machine()))
    mib, rounds = (64, 1) if chosen.quick else (chosen.mib, chosen.rounds)
    rows = measure(mib, rounds)
    show(rows, mib)
    if chosen.json:
        report.write(chosen.json, rows)


if __name__ == "__main__":
    main()
