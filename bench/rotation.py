"""Does anything fail while identities rotate? A soak, on real parts.

    python -m bench.rotation [--quick] [--seconds N] [--lifetime N] [--json FILE]

This process holds the authority and the embedded agent, which issues SVIDs of
`--lifetime` seconds and rolls the authority over: a root is published, signs, and the
one before it is withdrawn. Server and callers are a process each; both register on the
agent's admin socket and follow its Workload API. 32 callers ask at a fixed pace (half
of them threads of one `Client`, half tasks of one `AsyncClient`), 4 more hold streams
of 0.7 lifetimes each, which not every SVID has left. In the middle the server process
is ended with grace, and another one started on its port.

The restart window lasts from the order to end until a second after the new server's
first answer. Outside it no call may fail. Two kinds of end are by design and counted
apart: `expired`, a stream that outlived the SVID it began with, and `distrusted`, one
that the client broke off because a root was withdrawn.

The latencies' measure is the same with SVIDs that live for an hour, half of it before
and half after; or all of it at the same time (`--beside`), so that on a machine that
others use too, whatever they do hits both alike. `--quick` is 60 s, and 20 s of that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table

from bench import report, tally
from bench.tally import Call, Restart, Run, Seen
from bench.transport import CLIENT, DOMAIN, SERVER
from ztserve.identity import Agent, Authority, Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STEADY_LIFETIME_S = 3600.0
WARM_S = 2.0
"""Latencies count from so long after the callers began."""
END_S = 30.0
GOAL = 1.2
"""Times the p99 without rotation."""
PLACES = 50
"""Columns of the plot."""
COLOURS = {"answered": "green", "failed": "red", "restart": "yellow"}


class SoakError(Exception):
    """A process of the soak ended too soon, or not at all."""


@dataclass(frozen=True)
class Plan:
    """What is to happen in one run."""

    seconds: float
    lifetime_s: float
    rollovers: int = 0
    restart: bool = True
    callers: int = 32
    streams: int = 4
    pace_s: float = 0.05
    stream_s: float = 14.0
    agent_ends_s: float | None = None
    """When the agent goes away for good: a run that cannot go well."""


class End:
    """A process of `bench.ends`: it is ready once this is made."""

    def __init__(self, *arguments: str) -> None:
        self._name = arguments[0]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.ends", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for us alone; the end of their input tells them.
            process_group=0,
        )
        try:
            self.facts = self._read(self._process.stdout.readline())  # type: ignore[union-attr]
        except SoakError:
            self.abandon()
            raise

    def finish(self) -> dict[str, Any]:
        """End it and return its records."""
        try:
            return self._read(self._process.communicate(timeout=END_S)[0])
        except subprocess.TimeoutExpired:
            raise SoakError(f"{self._name} did not end within {END_S:g} s") from None

    def abandon(self) -> None:
        """End it, if it still runs, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def _read(self, line: bytes) -> dict[str, Any]:
        if not line:
            raise SoakError(f"{self._name} ended too soon")
        return cast("dict[str, Any]", json.loads(line))


def run(plan: Plan) -> Run:
    """Do what `plan` says and return all that was recorded."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ztserve-"))
        authority = stack.enter_context(
            Authority(DOMAIN, overlap_s=plan.lifetime_s / 2)
        )
        rules = Rules(trust_domain=DOMAIN, local_ids=(SERVER, CLIENT))
        agent = Agent(authority, Path(folder), rules, ttl_s=plan.lifetime_s)
        stack.enter_context(agent)
        servers = [_end(stack, "serve", folder)]
        port = str(servers[0].facts["port"])
        callers = _end(
            stack,
            *("call", folder, "--port", port),
            *("--callers", str(plan.callers), "--streams", str(plan.streams)),
            *("--pace", str(plan.pace_s), "--stream-seconds", str(plan.stream_s)),
        )
        time.sleep(WARM_S)
        began = time.monotonic()
        records: list[dict[str, Any]] = []
        restarts: list[Restart] = []

        def restart() -> None:
            ordered = time.monotonic()
            records.append(servers[0].finish())
            servers[0] = _end(stack, "serve", folder, "--port", port)
            gone = records[0]["gone"]
            restarts.append(Restart(ordered, gone, back=time.monotonic()))

        for at, step in _steps(plan, authority.roll, restart, agent.stop):
            time.sleep(max(0.0, began + at - time.monotonic()))
            step()
        time.sleep(max(0.0, began + plan.seconds - time.monotonic()))
        ended = time.monotonic()
        called = callers.finish()
        records.append(servers[0].finish())
    return Run(
        began,
        ended,
        [Call(*one) for one in called["calls"]],
        [Seen(*one) for one in called["seen"]],
        [[Seen(*one) for one in record["seen"]] for record in records],
        restarts[0] if restarts else None,
    )


def measure(plan: Plan, steady_s: float, beside: bool) -> tuple[Run, list[Run]]:
    """Return the run of `plan`, and those without rotation, if there are to be any."""
    steady = replace(plan, lifetime_s=STEADY_LIFETIME_S, rollovers=0, restart=False)
    if beside:
        with ThreadPoolExecutor() as both:
            rotating, other = both.map(run, (plan, steady))
        return rotating, [other]
    half = replace(steady, seconds=steady_s / 2)
    before = [run(half)] if half.seconds else []
    rotating = run(plan)
    return rotating, [*before, *([run(half)] if half.seconds else [])]


def _end(stack: contextlib.ExitStack, *arguments: str) -> End:
    end = End(*arguments)
    stack.callback(end.abandon)
    return end


def _steps(
    plan: Plan, roll: Callable[[], None], restart: Callable[[], None], leave: Any
) -> list[tuple[float, Callable[[], None]]]:
    """Return what is to be done when; rollovers fall between start, middle and end."""
    steps = [
        (plan.seconds * (number + 0.25) / plan.rollovers, roll)
        for number in range(plan.rollovers)
    ]
    if plan.restart:
        steps.append((plan.seconds / 2, restart))
    if plan.agent_ends_s is not None:
        steps.append((plan.agent_ends_s, leave))
    return sorted(steps, key=lambda step: step[0])


# --- what is told ---------------------------------------------------------------


def plot(run: Run, title: str) -> None:
    """Print calls, errors, rotations and what else happened, over time."""
    place_s = (run.ended - run.began) / PLACES
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("total", justify="right")
    table.add_column(f"over time, {place_s:.3g} s a column", no_wrap=True)
    for name, times in tally.happened(run).items():
        values = tally.placed(run, times, PLACES)
        line = _bars(values) if name == "answered" else _digits(values)
        colour = COLOURS.get(name, "default")
        table.add_row(name, str(len(times)), f"[{colour}]{line}[/]")
    begin, end = [(at - run.began) / place_s for at in run.window()]
    marks = ["·#"[begin - 1 < place < end] for place in range(PLACES)]
    seconds = f"{(end - begin) * place_s:.1f} s"
    table.add_row("restart window", seconds, f"[yellow]{''.join(marks)}[/]")
    console.print(table)


def _bars(values: Sequence[int]) -> str:
    most = max(values) or 1
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * value // most)] for value in values)


def _digits(values: Sequence[int]) -> str:
    return "".join("·123456789"[value] if value < 10 else "+" for value in values)


def tell_errors(run: Run) -> None:
    """Print one error of each sort that there was."""
    sorts: dict[tuple[str, str, str], list[str]] = {}
    for call, outcome in run.outcomes():
        if call.error:
            sort = outcome, call.kind, call.error.split(":")[0]
            sorts.setdefault(sort, []).append(
                f"{call.end - run.began:.1f} s {call.error}"
            )
    for (became, kind, _), errors in sorted(sorts.items()):
        print(f"{became}, {kind}, {len(errors)} times: {errors[0]:.200}")


def figures(arm: str, runs: Sequence[Run]) -> list[report.Row]:
    """Return what came of the runs of one arm, as rows of the JSON file."""
    latencies = sorted(ms for one in runs for ms in one.latencies_ms())
    found: Counter[str] = Counter()
    for one in runs:
        found.update({name: len(times) for name, times in tally.happened(one).items()})
    rows = [_row(arm, metric, value) for metric, value in found.items()]
    away_s = sum(end - begin for begin, end in (one.window() for one in runs))
    rows.append(_row(arm, "restart window", away_s, unit="s"))
    for metric, share in (("p50", 0.5), ("p99", 0.99)):
        value = tally.percentile(latencies, share)
        rows.append(_row(arm, metric, value, unit="ms"))
    return rows


def over_time(arm: str, run: Run) -> list[report.Row]:
    """Return what the plot shows, as rows whose case is the seconds since the start."""
    place_s = (run.ended - run.began) / PLACES
    return [
        _row(arm, name, value, case=f"{place * place_s:.1f}")
        for name, times in tally.happened(run).items()
        for place, value in enumerate(tally.placed(run, times, PLACES))
        if value
    ]


def _row(
    arm: str, metric: str, value: float, *, unit: str = "1", case: str = "soak"
) -> report.Row:
    return report.Row(arm=arm, case=case, metric=metric, value=value, unit=unit)


def tell_latencies(rows: Sequence[report.Row]) -> None:
    """Print the latencies of each arm beside one another."""
    found = {(row["arm"], row["metric"]): row["value"] for row in rows}
    arms = sorted({arm for arm, _ in found}, reverse=True)
    shown = [
        ("unary calls", arm, *(report.number(found[arm, p]) for p in ("p50", "p99")))
        for arm in arms
    ]
    report.show("latency, the restart left out", ("", "arm", "p50 ms", "p99 ms"), shown)
    if len(arms) > 1:
        ratio = found["rotating", "p99"] / found["steady", "p99"]
        print(f"p99 is {ratio:.2f}x that without rotation (the goal is {GOAL:g}x)")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.rotation")
    parser.add_argument("--quick", action="store_true", help="60 s, one rollover")
    parser.add_argument("--seconds", type=float, help="default: 600")
    parser.add_argument("--baseline-seconds", type=float, help="default: --seconds")
    parser.add_argument("--beside", action="store_true", help="both at the same time")
    parser.add_argument("--lifetime", type=float, help="of an SVID, s; default: 20")
    parser.add_argument("--rollovers", type=int, help="default: 2")
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--pace-ms", type=float, default=50, help="of each caller")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    found = parser.parse_args(given)
    for name, quick, full in (
        ("seconds", 60.0, 600.0),
        ("lifetime", 10.0, 20.0),
        ("rollovers", 1, 2),
    ):
        if getattr(found, name) is None:
            setattr(found, name, quick if found.quick else full)
    if found.baseline_seconds is None:
        found.baseline_seconds = 20.0 if found.quick else found.seconds
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Run the soak; return the exit code."""
    chosen = _arguments(given)
    plan = Plan(
        seconds=chosen.seconds,
        lifetime_s=chosen.lifetime,
        rollovers=chosen.rollovers,
        callers=chosen.callers,
        streams=chosen.streams,
        pace_s=chosen.pace_ms / 1e3,
        stream_s=0.7 * chosen.lifetime,
    )
    print("\n".join(report.machine()), flush=True)
    try:
        rotating, steady = measure(plan, chosen.baseline_seconds, chosen.beside)
    except SoakError as error:
        print(f"bench.rotation: {error}", file=sys.stderr)
        return 1
    plot(rotating, f"{plan.seconds:g} s, SVIDs of {plan.lifetime_s:g} s")
    tell_errors(rotating)
    rows = figures("rotating", [rotating])
    rows += figures("steady", steady) if steady else []
    tell_latencies(rows)
    if chosen.json:
        report.write(chosen.json, [*rows, *over_time("rotating", rotating)])
    missing = tally.shortcomings(
        rotating,
        rotations=int(plan.seconds / plan.lifetime_s),
        rollovers=plan.rollovers,
    )
    for one in steady:
        missing += [f"without rotation: {what}" for what in tally.failures(one)]
    print("\n".join(missing or ["every call outside the restart window was answered"]))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
