"""What every bench says: the machine, a table, and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import re
import ssl
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence


class Row(TypedDict):
    """One measured value, as the JSON file holds it."""

    arm: str
    case: str
    metric: str
    value: float
    unit: str


def machine() -> list[str]:
    """Return lines that name the machine, its versions and what else it is doing."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo)
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    gib = int(memory[1]) / 2**20 if memory else 0
    packages = ("ray", "grpcio", "torch", "numpy", "protobuf", "ztserve")
    return [
        f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, "
        f"{gib:.0f} GiB, Linux {platform.release()}",
        f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, "
        + ", ".join(f"{name} {_version(name)}" for name in packages),
        f"{_first_line('h2load', '--version')}, {_first_line('wrk', '-v')}",
        "load average " + " ".join(f"{load:.1f}" for load in os.getloadavg()),
    ]


def number(value: float) -> str:
    """Return `value` with three or more significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first two columns to the left, figures to the right."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < 2 else "right")
    previous = ""
    for row in rows:
        if previous and row[0] != previous:
            table.add_row()
        previous = row[0]
        table.add_row(*row)
    console.print(table)


def write(path: str, rows: Sequence[Row]) -> None:
    """Write `rows` to `path` as one JSON list."""
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    return (done.stdout + done.stderr).splitlines()[0].split(" Copyright")[0]
