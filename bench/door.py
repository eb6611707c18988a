"""Loading weights through a registry door, beside the same from the folder itself.

    python -m bench.door [--mib 1024] [--rounds 5] [--quick] [--json FILE]

The same signed model in one file and in four, its files in the page cache. Each run is
a fresh process that imports, then loads and verifies, then sums a byte of every page;
the arms take turns. The door is a process of its own on the same machine, so that both
ends of the wire (encrypting, decrypting) share its cores with the hashing: on a network
they would not. Figures are medians, with the least and the most; `CPU` is what replica
and door used together (the door's is counted in hundredths of a second), which tells
more than seconds do on a machine that has other work.

============  ====================================================================
folder        `verify_model` of the folder
door          `verify_model` through `ztserve.doors`, mutual TLS 1.3 over loopback,
              each read judged and recorded
============  ====================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from rich.progress import track

from bench import report
from bench.load import PAGE, RUN_S, make

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ztserve.identity import Source

ARMS = ("folder", "door")
DOMAIN = "dev.ztserve.internal"
DOOR = f"spiffe://{DOMAIN}/ns/ztserve/sa/registry"
REPLICA = f"spiffe://{DOMAIN}/ns/ml-inference/sa/m"
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bench, namespace: ztserve}
spec:
  selector: {matchLabels: {app: registry}}
  rules:
    - from: [{source: {principals: ["cluster.local/ns/ml-inference/sa/m"]}}]
      to: [{operation: {methods: ["GET"], paths: ["/v1/registry/m"]}}]
"""


def identities(folder: Path) -> None:
    """Write an SVID, key and trust bundle for each end into a folder of its name."""
    from ztserve.testing import ThrowAwayAuthority

    authority = ThrowAwayAuthority(DOMAIN)
    bundle = b"".join(
        x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
        for der in authority.bundle
    )
    for name, spiffe_id in (("server", DOOR), ("replica", REPLICA)):
        svid = authority.issue(spiffe_id)
        place = folder / name
        place.mkdir(mode=0o700)
        for file, content in (
            ("svid.pem", svid.chain_pem()),
            ("key.pem", svid.key_pem()),
            ("bundle.pem", bundle),
        ):
            (place / file).touch(0o600)
            (place / file).write_bytes(content)


def source(folder: Path) -> Source:
    """Return the identity that lies in a folder."""
    from ztserve.identity import FileSource

    return FileSource(
        folder / "svid.pem",
        folder / "key.pem",
        folder / "bundle.pem",
        trust_domain=DOMAIN,
        timeout_s=5.0,
    )


def serve(folder: Path, model: Path) -> None:
    """Open a door to one signed folder, print its port, and stay until told to stop."""
    from ztserve import audit
    from ztserve.artifacts import open_registry
    from ztserve.authorization import PolicySet
    from ztserve.doors import MAX_REQUEST_BYTES, RegistryDoor, registry_methods
    from ztserve.transport import Limits, Server

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    policies = PolicySet.parse(
        POLICY, trust_domain=DOMAIN, namespace="ztserve", labels={"app": "registry"}
    )
    place = folder / f"door-{time.time_ns()}.jsonl"
    with audit.Log(place, origin={"service": "registry"}) as log:
        server = Server(
            registry_methods(RegistryDoor(open_registry(model), policies, log)),
            source=source(folder / "server"),
            limits=Limits(max_message_bytes=MAX_REQUEST_BYTES),
        )
        print(server.start("127.0.0.1")[1], flush=True)
        stop.wait()
        server.stop(0)


class Taken(NamedTuple):
    """What one load took, and the sum of what it touched."""

    s: float
    cpu_s: float
    """Of replica and door."""
    touched: int


class Door(NamedTuple):
    """A door that runs; port 0: none."""

    port: int
    pid: int

    def cpu_s(self) -> float:
        """Return the CPU time that it has used (proc(5))."""
        if not self.port:
            return 0.0
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(folder: Path, model: Path) -> Iterator[Door]:
    """Run `serve` in a process of its own."""
    command = [sys.executable, "-m", "bench.door", "--serve", str(model)]
    running = subprocess.Popen(
        [*command, "--folder", str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        if running.stdout is None:
            raise ValueError("the door has no output")
        yield Door(int(running.stdout.readline()), running.pid)
    finally:
        running.terminate()
        running.wait(RUN_S)


def load_once(folder: Path, model: Path, port: int) -> None:
    """Load, touch every page, and print the seconds that it took; port 0: no door."""
    import torch  # noqa: F401 - what is measured is not its import

    from ztserve.artifacts import TrustPolicy, open_registry, verify_model
    from ztserve.doors import DoorAddress, DoorRegistry
    from ztserve.identity import SpiffeId

    trust = TrustPolicy.load(model.parent / "trust.toml")
    me = source(folder / "replica") if port else None
    began, used = time.perf_counter(), time.process_time()
    if me is None:
        loaded = verify_model(open_registry(model), "m:1", trust)
    else:
        with DoorRegistry(
            DoorAddress(f"127.0.0.1:{port}"), source=me, door_id=SpiffeId.parse(DOOR)
        ) as registry:
            loaded = verify_model(registry, "m:1", trust)
    touched = sum(int(tensor[::PAGE].sum()) for _, tensor in loaded.tensors())
    print(
        json.dumps(
            {
                "s": time.perf_counter() - began,
                "cpu_s": time.process_time() - used,
                "touched": touched,
            }
        )
    )


def run(folder: Path, model: Path, door: Door) -> Taken:
    """Run one load in a process of its own."""
    for path in model.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    command = [sys.executable, "-m", "bench.door", "--once", str(model)]
    before = door.cpu_s()
    done = subprocess.run(
        [*command, "--folder", str(folder), "--port", str(door.port)],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=True,
    )
    told = json.loads(done.stdout)
    cpu_s = told["cpu_s"] + door.cpu_s() - before
    return Taken(told["s"], cpu_s, told["touched"])


def measure(mib: int, rounds: int) -> list[report.Row]:
    """Return all figures; raises ValueError where two arms loaded other bytes."""
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory(prefix="ztserve-bench-") as place:
        folder = Path(place)
        identities(folder)
        for files in (1, 4):
            make(folder / str(files), mib, files)
            model = folder / str(files) / "ztserve"
            case = f"{files} file{'s' * (files > 1)}"
            taken: dict[str, list[Taken]] = {arm: [] for arm in ARMS}
            with served(folder, model) as door:
                for turn in track(range(rounds), case, transient=True):
                    for arm in ARMS[:: 1 if turn % 2 else -1]:
                        at = door if arm == "door" else Door(0, 0)
                        taken[arm].append(run(folder, model, at))
            if len({one.touched for arm in ARMS for one in taken[arm]}) != 1:
                raise ValueError("the arms did not load the same bytes")
            for arm in ARMS:
                seconds = [one.s for one in taken[arm]]
                for metric, value in (
                    ("median", median(seconds)),
                    ("least", min(seconds)),
                    ("most", max(seconds)),
                    ("CPU", median(one.cpu_s for one in taken[arm])),
                ):
                    rows.append(
                        {
                            "arm": arm,
                            "case": case,
                            "metric": metric,
                            "value": value,
                            "unit": "s",
                        }
                    )
    return rows


def show(rows: Sequence[report.Row], mib: int) -> None:
    """Print a table, the door beside the folder."""
    found = {(row["case"], row["arm"], row["metric"]): row["value"] for row in rows}
    table = []
    for case in dict.fromkeys(row["case"] for row in rows):
        for arm in ARMS:
            value = {m: found[case, arm, m] for m in ("median", "least", "most", "CPU")}
            ratio = value["median"] / found[case, "folder", "median"]
            table.append(
                (
                    case,
                    arm,
                    report.number(value["median"]),
                    f"{report.number(value['least'])}..{report.number(value['most'])}",
                    report.number(mib * 1.048576 / value["median"]),
                    report.number(value["CPU"]),
                    f"{ratio:.2f}x folder",
                )
            )
    columns = ("case", "arm", "s", "min..max", "MB/s", "CPU s", "ratio")
    report.show(f"{mib} MiB of weights", columns, table)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=1024, help="of weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="64 MiB, one round")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.folder, chosen.serve)
        return
    if chosen.once:
        load_once(chosen.folder, chosen.once, chosen.port)
        return
    print("\n".join(report.machine()))
    mib, rounds = (64, 1) if chosen.quick else (chosen.mib, chosen.rounds)
    rows = measure(mib, rounds)
    show(rows, mib)
    if chosen.json:
        report.write(chosen.json, rows)


if __name__ == "__main__":
    main()
