"""How far the reading of a model is, on a terminal: a bar, with bytes and rate."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ztserve import artifacts
from ztserve.cli.printing import printable


@contextmanager
def bar(title: str) -> Iterator[Callable[[artifacts.Progress], None] | None]:
    """Give what shows progress on stderr until the block ends, and then is gone.

    None where stderr is no terminal: a log has no use for it.
    """
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[verified]:.0%} verified", markup=False),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as drawn:
        task = drawn.add_task(printable(title), total=None, verified=0.0)

        def tell(now: artifacts.Progress) -> None:
            part = now.verified / now.total if now.total else 1.0
            drawn.update(task, total=now.total, completed=now.read, verified=part)

        yield tell
