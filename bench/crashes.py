"""Calls under load while replicas are killed: what fails, and what the audit has.

    python -m bench.crashes [--seconds N] [--every N] [--json FILE]

The digits example on Ray with two replicas and every room on; 32 threads call it
through the directory without a pause, each request with an id of its own. Every so
often one replica is killed (SIGKILL), in turn. At the end each call that was answered
must be in the audit as released, by its id, and only calls that were under way on the
killed replica may have failed: as Interrupted, having begun before the client could
know. Exits with 1 where that does not hold.
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
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import report
from bench.session import environment, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ztserve.config import Settings
    from ztserve.transport import Client

THREADS = 32
NOTICE_S = 0.5
"""A call that begins so soon after a kill may still have met the dead replica."""
REPLACED_S = 60.0


class Failed(NamedTuple):
    """A call that was not answered."""

    begin: float
    end: float
    error: str


class Kill(NamedTuple):
    """A replica that was killed, and when another one was there in its place."""

    at: float
    replaced_s: float


class Load:
    """Calls without a pause, on many threads, until told to end."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._done = threading.Event()
        self.answered: list[list[str]] = [[] for _ in range(THREADS)]
        self.failed: list[Failed] = []
        self._threads = [
            threading.Thread(target=self._work, args=(n,)) for n in range(THREADS)
        ]

    def start(self) -> None:
        """Begin to call."""
        for one in self._threads:
            one.start()

    def stop(self) -> None:
        """End, each thread after its call."""
        self._done.set()
        for one in self._threads:
            one.join(60)

    def count(self) -> int:
        """Return how many calls were answered so far."""
        return sum(map(len, self.answered))

    def _work(self, number: int) -> None:
        from bench.plain_serve import ROW
        from ztserve.errors import ZTServeError
        from ztserve.transport import values

        answered = self.answered[number]
        made = 0
        while not self._done.is_set():
            made += 1
            name = f"{number}-{made}"
            request = values.request({"pixels": ROW}, model="digits", id=name)
            begin = time.monotonic()
            try:
                self._client.send(request, timeout_s=20)
            except ZTServeError as error:
                told = f"{type(error).__name__}: {error}"
                self.failed.append(Failed(begin, time.monotonic(), told))
            else:
                answered.append(name)


def kept(settings: Settings) -> set[str]:
    """Return the ids of the requests that the audit says were answered."""
    found = set()
    for path in settings.audit.directory.glob("inference-service-*.jsonl*"):
        with path.open() as lines:
            for line in lines:
                if not line.endswith("}\n"):
                    continue  # cut short by the kill: nobody was answered by it
                record = json.loads(line)
                if record.get("status") == "released":
                    found.add(record.get("unmapped", {}).get("request_id", ""))
    return found


def out_of_place(failed: list[Failed], kills: list[Kill]) -> Iterator[Failed]:
    """Yield the calls that no kill explains."""
    for call in failed:
        explained = call.error.startswith("Interrupted") and any(
            call.begin <= kill.at + NOTICE_S and call.end >= kill.at for kill in kills
        )
        if not explained:
            yield call


def inside(seconds: float, every: float, path: str) -> int:
    """Run it all in this process's Ray session; return the exit code."""
    import ray

    from bench import ztserve_arm
    from ztserve import config, transport

    home = Path(os.environ["HOME"])
    ports = {"directory": free_port(), "gateway": free_port()}
    ztserve_arm.prepare(home / "project", ports)
    with ExitStack() as ending:
        ending.callback(ray.shutdown)
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(home / "ray"),
        )
        _deploy()
        settings = config.load()
        source = ending.enter_context(closing(config.obtain_identity(settings)))
        client = ending.enter_context(
            transport.Client(
                "ml-inference/inference-service",
                source=source,
                directory=f"{settings.directory.host}:{settings.directory.port}",
                directory_id=settings.directory_id,
            )
        )
        load = Load(client)
        client.ready()
        load.start()
        began = time.monotonic()
        kills = list(_kills(client, began + seconds, every))
        load.stop()
        took = time.monotonic() - began
        return tell(load, kills, kept(settings), took, path)


def _deploy() -> None:
    from examples.digits import Digits
    from ztserve.serving import cluster

    options = Digits.options(num_replicas=2, ray_actor_options={"num_cpus": 0.1})
    cluster.deploy(options.bind(), "digits")


def _kills(client: Client, until: float, every: float) -> Iterator[Kill]:
    last = None
    while time.monotonic() + every < until:
        time.sleep(every)
        before = _known(client)
        pids = _replicas()
        victim = next((pid for pid in pids if pid != last), None)
        if victim is None or len(before) < 2:
            continue  # the one before has not been replaced yet
        at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        last = next((pid for pid in pids if pid != victim), None)
        while not _known(client) - before:
            if time.monotonic() - at > REPLACED_S:
                break
            time.sleep(0.05)
        kill = Kill(at, time.monotonic() - at)
        print(
            f"replica {victim} killed, another there after {kill.replaced_s:.1f} s",
            file=sys.stderr,
        )
        yield kill
    time.sleep(max(until - time.monotonic(), 0))


def _known(client: Client) -> set[str]:
    return set(client._route.addresses)  # noqa: SLF001 - what it was told to call


def _replicas() -> list[int]:
    import ray

    found = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith("SERVE_REPLICA::digits#"):
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            found.append(int(ray.get(handle.is_allocated.remote(), timeout=20)[0]))
    return found


def tell(
    load: Load, kills: list[Kill], audited: set[str], took: float, path: str
) -> int:
    """Print the figures; return 1 where something is wrong."""
    answered = {name for names in load.answered for name in names}
    missing = answered - audited
    strange = list(out_of_place(load.failed, kills))
    replaced = sorted(kill.replaced_s for kill in kills) or [0.0]
    figures = {
        "calls answered": float(len(answered)),
        "of them not in the audit": float(len(missing)),
        "in the audit, but not acknowledged": float(len(audited - answered)),
        "replicas killed": float(len(kills)),
        "slowest replacement, s": replaced[-1],
        "calls that failed": float(len(load.failed)),
        "most of one kill": float(_most(load.failed, kills)),
        "of them not explained by a kill": float(len(strange)),
        "answered a second": len(answered) / took,
    }
    rows = [("kill -9", name, report.number(value)) for name, value in figures.items()]
    title = f"{took:.0f} s, {THREADS} threads"
    report.show(title, ("", "what", "figure"), rows)
    for call in strange[:10]:
        print(f"not explained: {call.error[:200]}")
    if path:
        report.write(
            path,
            [
                report.Row(
                    arm="ztserve", case="kill -9", metric=name, value=value, unit=""
                )
                for name, value in figures.items()
            ],
        )
    return 1 if missing or strange or not answered or not kills else 0


def _most(failed: list[Failed], kills: list[Kill]) -> int:
    return max(
        (
            sum(1 for call in failed if call.begin <= kill.at <= call.end)
            for kill in kills
        ),
        default=0,
    )


def main() -> int:
    """Run the bench in a home and a Ray session of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--json", default="")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        return inside(chosen.seconds, chosen.every, chosen.json)
    for line in report.machine():
        print(line, flush=True)
    with tempfile.TemporaryDirectory(prefix="ztb-", dir="/tmp") as home:
        return subprocess.run(
            [
                *(sys.executable, "-m", "bench.crashes", "--inside"),
                *("--seconds", str(chosen.seconds), "--every", str(chosen.every)),
                *("--json", chosen.json and str(Path(chosen.json).resolve())),
            ],
            env=environment(home, haproxy=False),
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
