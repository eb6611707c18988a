"""One request, every way: ztserve beside plain Ray Serve, in one run.

    python -m bench.request [--stream] [--quick] [--arms A,B]
                            [--rounds N] [--seconds S] [--json F]

The arms answer the same question (64 float32 in, 10 out, the same small network) on
this machine. They take turns, round after round, so that what else the machine does
hits all alike; each figure is the median over the rounds.

==============  ==================================================================
serve-http      Ray Serve's HTTP proxy: raw bytes in and out, access log off
serve-grpc      Ray Serve's gRPC proxy, access log off
serve-haproxy   Ray Serve's HAProxy ingress (RAY_SERVE_ENABLE_HA_PROXY=1), HTTP; it is
                a switch of a whole Ray session, so this arm has one of its own
grpc-bare-ray   a sync grpcio server in a Serve replica: no TLS, no check, no room
ztserve         every room on: mTLS 1.3, authorization, validation, filtering, audit
ztserve-https   the same through the gateway: HTTPS, client certificate, JSON
==============  ==================================================================

With --stream the answer is 100 pieces of text of 20 bytes, sent as they are made
(``bench/pieces.py``), and a request a stream: chunked over HTTP, messages over gRPC.
There are the first three arms, from an async generator; serve-haproxy-sync, from one
that is not, as ztserve's is; and ztserve. These calls are long: measure for longer.

A case is connections x calls in flight on each; HTTP/1.1 has no 1x32. `cpu_ms` is
the CPU time a request costs in all server processes on its way (replica, proxy,
HAProxy, gateway). wrk corrects its percentiles for coordinated omission and h2load
does not, so p99 compares within a protocol. Server and generator share the cores.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING

from bench import report
from bench.generators import (
    CASES,
    Arm,
    LoadError,
    Sample,
    build_shim,
    require_tools,
    run,
)
from bench.session import SESSIONS, Session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ARMS = (
    "serve-http",
    "serve-grpc",
    "serve-haproxy",
    "grpc-bare-ray",
    "ztserve",
    "ztserve-https",
)
STREAM_ARMS = (*ARMS[:3], "serve-haproxy-sync", "ztserve")
UNITS = {"rps": "1/s", "p50_ms": "ms", "p99_ms": "ms", "cpu_ms": "ms"}
WARM_S = 1
BASELINES = (*ARMS[:3], "serve-haproxy-sync")
QUIET_CORES = 0.4
"""What two idle Ray sessions and an idle machine keep busy at most."""

Samples = dict[tuple[str, str], list[Sample]]


def measure(
    arms: Sequence[Arm], rounds: int, seconds: int, cases: Sequence[str] = CASES
) -> Samples:
    """Load each arm in each of the `cases` that it takes, `rounds` times in turns."""
    samples: Samples = {}
    turns = [(arm, case) for case in cases for arm in arms if arm.takes(case)]
    for arm, case in turns:
        with suppress(LoadError):  # a slow arm may have ended no call by then
            run(arm, case, WARM_S)
    for number in range(rounds):
        # Who follows whom changes from round to round.
        for arm, case in turns if number % 2 == 0 else reversed(turns):
            sample = run(arm, case, seconds)
            samples.setdefault((arm.name, case), []).append(sample)
            note = f"round {number + 1} {arm.name} {case}: {sample.rps:.0f} requests/s"
            print(note, file=sys.stderr, flush=True)
    return samples


def summary(samples: Samples) -> dict[tuple[str, str], dict[str, float]]:
    """Return the median of each metric, by arm and case."""
    return {
        key: {metric: median(getattr(s, metric) for s in taken) for metric in UNITS}
        for key, taken in samples.items()
    }


def ratio(
    figures: Mapping[tuple[str, str], Mapping[str, float]],
    arm: str,
    case: str,
    base: str,
) -> str:
    """Return how many times the requests per second of `base` this `arm` does.

    What has no 1x32 is compared at 32x1, its way to have 32 calls in flight; marked *.
    """
    mark = ""
    if (base, case) not in figures and case == "1x32":
        case_of_base, mark = "32x1", "*"
    else:
        case_of_base = case
    if (base, case_of_base) not in figures:
        return "-"
    times = figures[arm, case]["rps"] / figures[base, case_of_base]["rps"]
    return f"{times:.3g}x{mark}"


def print_report(samples: Samples, rounds: int, seconds: int, what: str) -> None:
    """Print the table of `samples` and the machine that it holds for."""
    figures = summary(samples)
    bases = [base for base in BASELINES if any(arm == base for arm, _ in figures)]
    rows = []
    for case in CASES:
        for arm in dict.fromkeys((*STREAM_ARMS, *ARMS)):
            if (arm, case) not in figures:
                continue
            metrics = figures[arm, case]
            spread = [sample.rps for sample in samples[arm, case]]
            rows.append(
                [
                    case,
                    arm,
                    report.number(metrics["rps"]),
                    f"{report.number(min(spread))}..{report.number(max(spread))}",
                    *(report.number(metrics[name]) for name in list(UNITS)[1:]),
                    *(ratio(figures, arm, case, base) for base in bases),
                ]
            )
    columns = ["case", "arm", f"{what}/s", "min..max", "p50 ms", "p99 ms", "CPU ms"]
    columns += [f"x {base}" for base in bases]
    title = f"medians of {rounds} rounds of {seconds} s"
    report.show(title, columns, rows)
    taken = [sample for several in samples.values() for sample in several]
    others = median(sample.others for sample in taken)
    print("* 32x1 of an arm that cannot carry 32 calls on one connection")
    print(f"other processes kept {others:.1f} cores busy meanwhile (median)")
    if others > QUIET_CORES:
        print(f"this machine was not quiet: CPU ms tells more than {what}/s")


def as_rows(samples: Samples) -> list[report.Row]:
    """Return the medians as rows of the JSON file."""
    return [
        report.Row(arm=arm, case=case, metric=metric, value=value, unit=UNITS[metric])
        for (arm, case), metrics in summary(samples).items()
        for metric, value in metrics.items()
    ]


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.request")
    parser.add_argument("--quick", action="store_true", help="one round of 2 s, or 6")
    parser.add_argument("--stream", action="store_true", help="ask for 100 pieces")
    parser.add_argument("--arms", help=f"default: all; of {', '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument(
        "--seconds", type=int, help="of one measurement; default: 4, of streams 12"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(given)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    least = 6 if arguments.stream else 2
    arguments.seconds = arguments.seconds or (least if arguments.quick else 2 * least)
    known = STREAM_ARMS if arguments.stream else ARMS
    arguments.arms = arguments.arms.split(",") if arguments.arms else known
    unknown = set(arguments.arms) - set(known)
    if unknown:
        parser.error(f"no such arm: {', '.join(sorted(unknown))}")
    if arguments.seconds < 1 or arguments.rounds < 1:
        parser.error("--rounds and --seconds are at least 1")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    """Run the bench; return the exit code."""
    arguments = _arguments(given)
    sessions: list[Session] = []
    try:
        require_tools()
        build_shim()
        print("\n".join(report.machine()), flush=True)
        wanted = [[n for n in names if n in arguments.arms] for names in SESSIONS]
        asked = "stream" if arguments.stream else "one"
        sessions += [Session(names, asked) for names in wanted if names]
        arms = [arm for session in sessions for arm in session.arms()]
        samples = measure(arms, arguments.rounds, arguments.seconds)
    except LoadError as error:
        print(f"bench.request: {error}", file=sys.stderr)
        return 1
    finally:
        for session in sessions:
            session.stop()
    what = "streams" if arguments.stream else "requests"
    print_report(samples, arguments.rounds, arguments.seconds, what)
    if arguments.json:
        report.write(arguments.json, as_rows(samples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
