"""``ztserve config show``: each setting, its value, and where it came from."""

import argparse

from ztserve import config
from ztserve.cli import show


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("show",))
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Print the settings in force in this directory."""
    rows = list(config.entries(config.load()))
    if chosen.json:
        show.as_json({name: value for name, value, _ in rows})
    else:
        show.table("settings", ("setting", "value", "from"), rows)
    return 0
