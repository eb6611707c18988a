"""A writer in a process of its own races the loads of a model.

    python -m tests.attack.race [TURNS]

Every turn swaps, edits, cuts, lengthens, unlinks or links one of a model's files while
it is loaded over and over. What is loaded must be what was signed, or be refused.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.attack import race_writer
from tests.attack.race_writer import FILES
from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts import TrustPolicy, verify_model
from ztserve.artifacts.loading.shared.memory import SealedMemory
from ztserve.artifacts.publish import release_model, sign_model
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import ArtifactError

SHARD = 64 << 10


@dataclass
class Race:
    """What came of the loads during one race."""

    turns: int = 0
    """How often the writer has written."""
    accepted: int = 0
    wrong: int = 0
    """Accepted, but with other bytes than the signed ones."""
    refused: Counter[str] = field(default_factory=Counter)
    """Refusals by the beginning of their message."""


def prepare(workshop: Workshop, serialization: Serialization) -> Path:
    """Sign a model of 1 MiB of weights and a text of 256 KiB."""
    root = workshop.path / "digits"
    root.mkdir()
    save_file({"w": torch.ones(1 << 18)}, root / FILES[0])
    (root / FILES[1]).write_bytes(b"good" * (1 << 16))
    sign_model(root, workshop.keys["trainer"], serialization=serialization)
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    return root


def race(root: Path, trust: TrustPolicy, turns: int, *, sealed: bool = False) -> Race:
    """Load the model until the writer has had its turns, and once in peace.

    With `sealed`, into the memory that a broker shares.
    """
    result = Race(turns)
    good = (root / FILES[1]).read_bytes()
    with _writer(root, turns) as writer:
        while writer.poll() is None:
            memory = SealedMemory(lambda _: None) if sealed else None
            _load(root, trust, good, result, memory)
            if memory is not None:
                memory.close()
        if writer.returncode:
            raise RuntimeError(f"the writer ended with code {writer.returncode}")
    return result


def _load(
    root: Path,
    trust: TrustPolicy,
    good: bytes,
    result: Race,
    memory: SealedMemory | None,
) -> None:
    try:
        model = verify_model(root, "digits", trust, memory=memory)
    except ArtifactError as error:
        reason = re.sub(r"\d+", "N", str(error).replace(str(root), ""))
        result.refused[reason.strip(": ").split(":")[0]] += 1
        return
    result.accepted += 1
    weights = dict(model.tensors())["w"]
    if model.read(FILES[1]) != good or not torch.equal(weights, torch.ones(1 << 18)):
        result.wrong += 1


@contextmanager
def _writer(root: Path, turns: int) -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(
        [sys.executable, race_writer.__file__],
        stdin=subprocess.PIPE,
    )
    assert running.stdin is not None
    running.stdin.write(f"{root}\n{turns}\n".encode())
    running.stdin.close()
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def main() -> None:
    """Race in both methods; print what came of it."""
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    for how in (Serialization(), Serialization("sha256", SHARD)):
        with tempfile.TemporaryDirectory() as folder:
            workshop = Workshop(Path(folder))
            result = race(prepare(workshop, how), workshop.trust, turns)
        refused = sum(result.refused.values())
        print(
            f"{how.method}: {result.turns} turns of the writer; loads: "
            f"{result.accepted} accepted, {refused} refused, {result.wrong} wrong"
        )
        for reason, count in result.refused.most_common():
            print(f"  {count:6} {reason}")


if __name__ == "__main__":
    main()
