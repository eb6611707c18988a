"""``ztserve status``: the deployments, their replicas, and why one does not run."""

import argparse
import sys
from dataclasses import asdict

from ztserve import config
from ztserve.cli import show
from ztserve.cli.printing import printable
from ztserve.serving.cluster import NoCluster, attached, replicas, statuses
from ztserve.serving.running import noted_address


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--address", help="of the Ray cluster (default: that of `run`)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Ask Serve; what could not start comes first, with its own sentence.

    Raises NoCluster where nothing runs.
    """
    settings = config.load()
    address = chosen.address or noted_address(settings)
    try:
        with attached(address or "auto"):
            rows = statuses()
            places = replicas(settings)
    except NoCluster as error:
        if address:
            raise
        raise NoCluster(
            f"nothing serves the project of {settings.base.resolve()}: start it with "
            "`ztserve run module:app`, or name host:port of its Ray with --address"
        ) from error
    if not (address or places):
        # It may still be ours, if no replica of it could start.
        print(
            f"no replica of the project of {settings.base.resolve()} runs; this is "
            "what else the Ray of this machine has",
            file=sys.stderr,
        )
    if chosen.json:
        show.as_json(
            {
                "deployments": [asdict(row) for row in rows],
                "replicas": {key: [asdict(e) for e in value] for key, value in places},
            }
        )
        return 0
    for row in rows:
        if row.why:
            print(printable(f"{row.deployment}: {row.why}"))
    show.table(
        "deployments",
        ("app", "deployment", "state", "replicas"),
        [(row.app, row.deployment, row.state, row.replicas) for row in rows],
    )
    show.table(
        "replicas",
        ("service", "address", "model", "version", "digest"),
        [
            (key, e.address, e.model, e.version, e.digest)
            for key, value in places
            for e in value
        ],
    )
    return 0
