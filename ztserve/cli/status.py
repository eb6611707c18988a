"""``ztserve status``: the deployments, their replicas, and why one does not run."""

import argparse
from dataclasses import asdict

from ztserve.cli import show
from ztserve.serving.cluster import attached, statuses

HELP = "show what runs, and why something does not"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--address", default="auto", help="of the Ray cluster")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Ask Serve; what could not start comes first, with its own sentence."""
    with attached(chosen.address):
        rows = statuses()
    if chosen.json:
        show.as_json([asdict(row) for row in rows])
        return 0
    for row in rows:
        if row.why:
            print(f"{row.deployment}: {row.why}")
    show.table(
        "deployments",
        ("app", "deployment", "state", "replicas"),
        [(row.app, row.deployment, row.state, row.replicas) for row in rows],
    )
    return 0
