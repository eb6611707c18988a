"""``ztserve audit``: read the log, and check that it hangs together."""

import argparse
import json
from pathlib import Path

from ztserve import audit, config
from ztserve.cli import show

HELP = "show the audit log, or verify that it is self-consistent"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("show", "verify"))
    parser.add_argument(
        "files", nargs="*", type=Path, help="default: all of the project"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Print records or verdicts; exit code 1 where a log is broken."""
    folder = config.load().audit.directory
    files = chosen.files or sorted(folder.glob("*.jsonl"))
    if chosen.action == "show":
        for record in audit.read(*files):
            print(json.dumps(record))
        return 0
    reports = [(path, audit.verify_log(path)) for path in files]
    show.table(
        "audit logs",
        ("file", "status", "records", "message"),
        [(path.name, r.status, r.records, r.message) for path, r in reports],
    )
    return 1 if any(report.status == "broken" for _, report in reports) else 0
