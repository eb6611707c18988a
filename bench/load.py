"""Loading weights: verified, beside not verified, each in a process of its own.

    python -m bench.load [--mib 1024] [--rounds 5] [--quick] [--json FILE]

The same model, in one file and in four. Each run is a fresh process that imports, then
loads, then sums a byte of every page; the arms take turns. `cold` has the files out of
the page cache (posix_fadvise), `warm` has them in it. Figures are medians, with the
least and the most; peak memory is what the load added, as a part of the model. CPU
seconds are of all threads together: they hold on a machine that others use, too.

=============  ===================================================================
mapped         safetensors' `load_file`, which maps the file: what changes it
               changes the weights
read           `load_file(backend="pread")`: a copy of one's own, unverified
ztserve        `verify_model`: signatures, a closed world, the SHA-256 of every byte
               in the memory that becomes the tensors
ztserve blake3 the same, signed with BLAKE3
mapped rank    `safe_open(...).get_slice(...)`: the second quarter of each tensor
ztserve rank   `verify_model(lazy=True)` and `rows`: that quarter, signed in shards of
               4 MiB
=============  ===================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.progress import track

from bench import report
from ztserve.artifacts.statements.serialization import Serialization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from ztserve.artifacts.publish import SigningKey

SIGNED = {
    "ztserve": Serialization(),
    "ztserve blake3": Serialization("blake3"),
    "ztserve rank": Serialization("sha256", 4 << 20),
}
"""The arms that verify, and what their signature is over, if not what we choose."""
WHOLE = ("mapped", "read", "ztserve", "ztserve blake3")
RANK = ("mapped rank", "ztserve rank")
ARMS = WHOLE + RANK
RANKS = 4
ROLES = ("trainer", "deployer")
TENSOR_MIB = 16
PAGE = 4096
RUN_S = 300
GOALS = {"cold": ("mapped", 1.15), "warm": ("read", 1.0)}


def make(folder: Path, mib: int, files: int) -> None:
    """Write a model of `mib` MiB in so many files, signed for each arm."""
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric import ec
    from safetensors.numpy import save_file

    from ztserve.artifacts.publish import SigningKey
    from ztserve.artifacts.statements.keys import public_pem

    model, random = folder / "mapped", np.random.default_rng(files)
    model.mkdir(parents=True)
    names = [f"layer{n}" for n in range(mib // TENSOR_MIB)]
    for index in range(files):
        save_file(
            {
                name: random.integers(0, 255, TENSOR_MIB << 20, np.uint8)
                for name in names[index::files]
            },
            model / f"model-{index + 1:05}-of-{files:05}.safetensors",
        )
    keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in ROLES}
    for arm in SIGNED:
        _sign(arm, folder, *(SigningKey(keys[role]) for role in ROLES))
    policy = folder / "trust.toml"
    policy.write_text(
        "version = 1\n"
        + "".join(
            f'[[signers]]\nname = "{role}"\nroles = ["{role}"]\n'
            f'key = """{public_pem(key.public_key()).decode()}"""\n'
            for role, key in keys.items()
        )
    )
    policy.chmod(0o644)
    os.sync()


def _sign(arm: str, folder: Path, trainer: SigningKey, deployer: SigningKey) -> None:
    """Sign and release the same files once more, linked: on the disk they are one."""
    from ztserve.artifacts.publish import (
        choose_serialization,
        release_model,
        sign_model,
    )

    model, how, sizes = folder / arm, SIGNED[arm], {}
    model.mkdir()
    for file in (folder / "mapped").iterdir():
        (model / file.name).hardlink_to(file)
        sizes[file.name] = file.stat().st_size
    if how.shard_size is None:
        how = choose_serialization(sizes, how.hash_type)
    sign_model(model, trainer, name="m", serialization=how)
    release_model(model, deployer, name="m", version="1")


def loader(arm: str, folder: Path) -> Callable[[], Iterator[torch.Tensor]]:
    """Return what loads the model and gives its tensors; all is imported before."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from ztserve.artifacts import TrustPolicy, open_registry, verify_model

    if arm in SIGNED:  # what these import they import once, before the clock runs
        open_registry(folder / arm)
        SIGNED[arm].new_hash()
    files = sorted((folder / "mapped").glob("*.safetensors"))

    def verified() -> Iterator[torch.Tensor]:
        trust = TrustPolicy.load(folder / "trust.toml")
        for _, tensor in verify_model(folder / arm, "m:1", trust).tensors():
            yield tensor

    def verified_rank() -> Iterator[torch.Tensor]:
        trust = TrustPolicy.load(folder / "trust.toml")
        model = verify_model(folder / arm, "m:1", trust, lazy=True)
        for name, (count,) in model.shapes.items():
            yield model.rows(name, count // RANKS, 2 * count // RANKS)

    def unverified() -> Iterator[torch.Tensor]:
        backend = "mmap" if arm == "mapped" else "pread"
        for file in files:
            yield from load_file(file, backend=backend).values()

    def unverified_rank() -> Iterator[torch.Tensor]:
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = opened.get_slice(name)
                    (count,) = part.get_shape()
                    yield part[count // RANKS : 2 * count // RANKS]

    if arm in RANK:
        return verified_rank if arm in SIGNED else unverified_rank
    return verified if arm in SIGNED else unverified


def load_once(arm: str, folder: Path) -> None:
    """Load, touch every page, and print the seconds and the memory that it took."""
    load = loader(arm, folder)
    before = _peak_kib()
    began, cpu = time.perf_counter(), time.process_time()
    tensors = list(load())
    touched = sum(int(one[::PAGE].sum()) for one in tensors)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    grown = _peak_kib() - before
    told = {"s": seconds, "kib": grown, "touched": touched, "cpu": cpu}
    print(json.dumps(told))


def _peak_kib() -> int:
    """Return this process's own peak; getrusage's begins with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def run(arm: str, folder: Path, state: str) -> tuple[float, float, int, float]:
    """Run one load in a process of its own; return seconds, KiB, sum, CPU seconds."""
    for path in (folder / "mapped").iterdir():
        with path.open("rb") as file:
            if state == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass
    done = subprocess.run(
        [sys.executable, "-m", "bench.load", "--once", arm, "--folder", str(folder)],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=True,
    )
    told = json.loads(done.stdout)
    return told["s"], told["kib"], told["touched"], told["cpu"]


def measure(mib: int, rounds: int) -> list[report.Row]:
    """Return all figures; raises ValueError where two arms loaded other bytes."""
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory(prefix="ztserve-bench-") as place:
        for files in (1, 4):
            make(Path(place, str(files)), mib, files)
        cases = [(files, state) for files in (1, 4) for state in ("cold", "warm")]
        taken: dict[tuple[int, str, str], list[tuple[float, float, int, float]]] = {}
        turns = [(n, *case) for n in range(rounds) for case in cases]
        for turn, files, state in track(turns, "loading", transient=True):
            for arm in ARMS[:: 1 if turn % 2 else -1]:
                one = run(arm, Path(place, str(files)), state)
                taken.setdefault((files, state, arm), []).append(one)
        for files, state in cases:
            for arms in (WHOLE, RANK):
                sums = {one[2] for arm in arms for one in taken[files, state, arm]}
                if len(sums) != 1:
                    raise ValueError("the arms did not load the same bytes")
            for arm in ARMS:
                seconds = [one[0] for one in taken[files, state, arm]]
                peak = median(one[1] for one in taken[files, state, arm]) / (mib << 10)
                case = f"{files} file{'s' * (files > 1)}, {state}"
                for metric, value, unit in (
                    ("median", median(seconds), "s"),
                    ("least", min(seconds), "s"),
                    ("most", max(seconds), "s"),
                    ("peak", peak, "of the model"),
                    ("cpu", median(one[3] for one in taken[files, state, arm]), "s"),
                ):
                    rows.append(
                        {
                            "arm": arm,
                            "case": case,
                            "metric": metric,
                            "value": value,
                            "unit": unit,
                        }
                    )
    return rows


def show(rows: Sequence[report.Row], mib: int) -> None:
    """Print a table, each case beside the arm that it is to be held against."""
    found = {(row["case"], row["arm"], row["metric"]): row["value"] for row in rows}
    cases = list(dict.fromkeys(row["case"] for row in rows))
    table = []
    for case in cases:
        for arm in ARMS:
            base, goal = GOALS[case.rpartition(" ")[2]]
            base = "mapped rank" if arm in RANK else base
            metrics = ("median", "least", "most", "peak", "cpu")
            value = {metric: found[case, arm, metric] for metric in metrics}
            ratio = value["median"] / found[case, base, "median"]
            table.append(
                (
                    case,
                    arm,
                    report.number(value["median"]),
                    f"{report.number(value['least'])}..{report.number(value['most'])}",
                    f"{mib / 1024 / value['median']:.2f}",
                    f"{value['peak']:.2f}",
                    f"{value['cpu']:.2f}",
                    f"{ratio:.2f}x {base}"
                    + (f" (goal {goal})" if arm in SIGNED and arm in WHOLE else ""),
                )
            )
    columns = ("case", "arm", "s", "min..max", "GiB/s", "peak memory", "CPU s", "ratio")
    report.show(f"{mib} MiB of weights; a rank's: a {RANKS}th", columns, table)
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=1024, help="of weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="64 MiB, one round")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--once", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.once:
        load_once(chosen.once, chosen.folder)
        return
    print("\n".join(report.machine()))
    mib, rounds = (64, 1) if chosen.quick else (chosen.mib, chosen.rounds)
    rows = measure(mib, rounds)
    show(rows, mib)
    if chosen.json:
        report.write(chosen.json, rows)


if __name__ == "__main__":
    main()
