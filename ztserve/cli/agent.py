"""``ztserve agent``: what the embedded identity agent is doing, and its end."""

import argparse
from collections.abc import Mapping
from typing import Any

from ztserve import config, identity
from ztserve.cli import show

_FEDERATION = ("trust_domain", "profile", "sequence", "age_s", "problem")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("status", "stop"))
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Ask the agent over its admin socket."""
    socket = identity.admin_path(config.agent_directory(config.load()))
    answer = identity.admin(socket, {"op": chosen.action})
    if chosen.action == "stop":
        print("the agent stops")
    elif chosen.json:
        show.as_json(answer)
    else:
        _tell(answer)
    return 0


def _tell(status: Mapping[str, Any]) -> None:
    lists = {"registrations": ("pid", "id"), "federation": _FEDERATION}
    rows = [
        (name, value)
        for name, value in status.items()
        if name not in (*lists, "ok") and value not in (None, "")
    ]
    show.table(f"identity agent of {status['trust_domain']}", ("", ""), rows)
    for name, columns in lists.items():
        if found := status.get(name):
            show.table(name, columns, [[one[c] for c in columns] for one in found])
