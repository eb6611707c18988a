"""``ztserve audit``: read the log, and check that it hangs together."""

import argparse
import json
from pathlib import Path

from ztserve import audit, config
from ztserve.cli import show
from ztserve.errors import AuditError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("show", "verify"))
    parser.add_argument(
        "files", nargs="*", type=Path, help="default: all of the project"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON (show always does, by line)"
    )


def run(chosen: argparse.Namespace) -> int:
    """Print records or verdicts; exit code 1 where a log is broken."""
    files = chosen.files or _all()
    if chosen.action == "show":
        for record in audit.read(*files):
            print(json.dumps(record))
        return 0
    reports = [(path, audit.verify_log(path)) for path in files]
    rows = [(str(path), r.status, r.records, r.message) for path, r in reports]
    heads = ("file", "status", "records", "message")
    if chosen.json:
        show.as_json([dict(zip(heads, row, strict=True)) for row in rows])
    else:
        show.table("audit logs", heads, rows)
    return 1 if any(report.status == "broken" for _, report in reports) else 0


def _all() -> list[Path]:
    folder = config.load().audit.directory
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        # That nothing is there must not read as that all is well.
        raise AuditError(f"there is no audit log in {folder}")
    return files
