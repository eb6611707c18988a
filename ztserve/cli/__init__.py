"""What does a person type? One command, ``ztserve``, a verb a file."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Protocol, cast

from ztserve import __version__
from ztserve.cli.printing import printable
from ztserve.errors import ZTServeError

VERBS: Mapping[str, str] = {
    "init": "write a commented ztserve.toml, development policies and keys",
    "run": "serve module:app on a local Ray until Ctrl-C",
    "predict": "call a deployment over mTLS and print the answer",
    "status": "show what runs, and why something does not",
    "gateway": "run the HTTPS gateway until Ctrl-C",
    "key": "make a signing key, or show one",
    "sign": "sign a model directory, as the trainer, or a trust policy",
    "attest": "say of a signed model how its evaluation went, or something else",
    "verify": "verify a model as a replica would",
    "publish": "release a signed model as name:version, and put it into the registry",
    "bundle": "sign all that decides what runs, or hold this node against it",
    "registry": "serve a registry to replicas over mTLS, or push a model to a server",
    "svid": "write the developer's SVID, key and trust bundle to files",
    "quarantine": "refuse a principal or a stolen SVID at once, or let it in again",
    "agent": "show or stop the embedded identity agent",
    "audit": "show the audit log, or verify that it is self-consistent",
    "config": "show each setting and where it came from",
}
"""Each verb is the module of its name."""


class Verb(Protocol):
    """What each module of a verb offers."""

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""

    def run(self, chosen: argparse.Namespace) -> int:
        """Do it; return the exit code. Raises ZTServeError."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; a refusal is one sentence on stderr and exit code 2.

    Without any word the verbs are told there, which is code 2 as well.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        print(_overview(), file=sys.stderr)
        return 2
    chosen = _parser(words).parse_args(words)
    try:
        code = int(chosen.run(chosen))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has gone: nothing may be flushed to it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ZTServeError, OSError) as error:
        _hint(chosen.verb)
        print(printable(f"ztserve {chosen.verb}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _overview() -> str:
    """Return the verbs, a line each."""
    widest = max(map(len, VERBS))
    lines = [f"  {verb:{widest}}  {sentence}" for verb, sentence in VERBS.items()]
    usage = "usage: ztserve VERB ...; `ztserve VERB --help` tells of one"
    return "\n".join([usage, *lines])


def _hint(verb: str) -> None:
    """Name the likeliest cause of all, where it may be that."""
    from ztserve.config import FILE, found_file

    if verb != "init" and found_file() is None:
        print(
            f"there is no {FILE} in this folder: run `ztserve init`, or go to the "
            "project's folder",
            file=sys.stderr,
        )


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser that knows all verbs, and the arguments of the one asked for.

    Only that verb's module is imported, with the rooms that it needs.
    """
    parser = argparse.ArgumentParser(
        prog="ztserve",
        description="Signed models, served to verified callers only.",
    )
    parser.add_argument("--version", action="version", version=f"ztserve {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, sentence in VERBS.items():
        below = verbs.add_parser(name, help=sentence, description=sentence)
        if name == asked:
            verb = cast("Verb", import_module(f"ztserve.cli.{name}"))
            verb.arguments(below)
            below.set_defaults(run=verb.run)
    return parser
