"""What does a person type? One command, ``ztserve``, a verb a file."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from ztserve.errors import ZTServeError

VERBS = (
    "init",
    "run",
    "predict",
    "status",
    "gateway",
    "key",
    "sign",
    "verify",
    "publish",
    "svid",
    "agent",
    "audit",
    "config",
)


class Verb(Protocol):
    """What each module of this room offers."""

    HELP: str

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""

    def run(self, chosen: argparse.Namespace) -> int:
        """Do it; return the exit code. Raises ZTServeError."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; a refusal is one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="ztserve",
        description="Signed models, served to verified callers only.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for name in VERBS:
        verb = cast("Verb", import_module(f"ztserve.cli.{name}"))
        below = verbs.add_parser(name, help=verb.HELP, description=verb.HELP)
        verb.arguments(below)
        below.set_defaults(run=verb.run)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except ZTServeError as error:
        print(f"ztserve {chosen.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
