"""``ztserve agent``: what the embedded identity agent is doing, and its end."""

import argparse

from ztserve import config, identity
from ztserve.cli import show


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
        rows = [(name, value) for name, value in answer.items() if name != "ok"]
        show.table("identity agent", ("", ""), rows)
    return 0
