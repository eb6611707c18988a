"""How results look: tables for a person, plain text in a pipe, JSON on request."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ztserve.cli.printing import printable


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; in a pipe, its cells separated by tabs."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(printable(str(cell)) for cell in row))
        return
    drawn = Table(title=title or None, title_justify="left")
    for head in heads:
        # Folded, never cut: a digest must be there to the last digit.
        drawn.add_column(head, overflow="fold")
    for row in rows:
        # As Text: what stands in brackets is no markup.
        drawn.add_row(*(Text(printable(str(cell))) for cell in row))
    Console(highlight=False).print(drawn)


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Print what is known of one thing, a line each; in a pipe, with a tab between.

    Nothing is cut off: a digest must be there to the last digit.
    """
    rows = [(printable(name), printable(str(value))) for name, value in pairs]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        between = " " * (width - len(name) + 2) if sys.stdout.isatty() else "\t"
        print(f"{name}{between}{value}")


def as_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, default=str))
