"""How results look: tables and colours for a person, plain text in a pipe, JSON on
request.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Return a console that is wide and plain where stdout is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; in a pipe, its cells separated by tabs."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(str(cell) for cell in row))
        return
    drawn = Table(*heads, title=title or None, title_justify="left")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    console().print(drawn)


def as_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, default=str))
