"""The table of who was tried with our server, and what came of it.

python -m tests.interop.table      writes docs/interop.md anew
"""

import ast
import json
import re
from pathlib import Path

from tests.interop.cases import ABSENT, CASES
from tests.interop.drivers import DRIVERS, NOT_YET

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATH = ROOT / "docs" / "interop.md"
RAN_WITH = {"Node": "20.20.2", "curl": "7.88.1", "nghttp and h2load": "1.52.0"}
"""What is not pinned: the versions of the machine that the table was made on."""
PINNED = ("grpcio", "grpcio-health-checking", "grpcio-reflection")
IN_PART = "without "
"""So begins the note of a case of which something is not offered."""
HEAD = """\
# Who talks to our server, and what they see
Generated from the tests by `python -m tests.interop.table`; do not edit.
The cases are those of the grpc project's interop-test-descriptions.md, on its
TestService ([service.py](../tests/interop/service.py)), served by us over mutual TLS.
✓: [test_cases.py](../tests/interop/test_cases.py) runs the case with this client, it
passes, and the server has let go of the call afterwards. A client that is not installed
is skipped aloud. "in part": so does what we offer of it. -: not run.
"""


def text() -> str:
    """Return the text of docs/interop.md."""
    return "\n".join([HEAD, *_cases(), "", *_tools(), "", *_versions(), ""])


def _cases() -> list[str]:
    drivers = [*DRIVERS, *NOT_YET]
    lines = [
        "## Cases",
        f"| case | {' | '.join(drivers)} | how it differs, or why not |",
    ]
    lines.append("|---|" + "---|" * (len(drivers) + 1))
    for case in CASES:
        mark = "in part" if case.note.startswith(IN_PART) else "✓"
        marks = [mark] * len(DRIVERS) + ["not yet"] * len(NOT_YET)
        lines.append(f"| {case.name} | {' | '.join(marks)} | {case.note} |")
    for name, reason in ABSENT.items():
        lines.append(f"| {name} | {'- | ' * len(drivers)}{reason} |")
    return lines


def _tools() -> list[str]:
    lines = [
        "## Tools, and grpc's own services",
        "| shown by | what is done and seen |",
    ]
    lines.append("|---|---|")
    path = HERE / "test_tools.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            said = " ".join((ast.get_docstring(node) or "").split())
            place = f"../{path.relative_to(ROOT)}"
            lines.append(f"| [`{node.name}`]({place}) | {said} |")
    return lines


def _versions() -> list[str]:
    pins = dict(re.findall(r"^(\S+)==(\S+)$", _read("constraints.txt"), re.MULTILINE))
    packages = json.loads(_read("tests/interop/node/package-lock.json"))["packages"]
    versions = {name: pins[name] for name in PINNED}
    versions["@grpc/grpc-js"] = packages["node_modules/@grpc/grpc-js"]["version"]
    lines = ["## Versions", "| client | version |", "|---|---|"]
    return lines + [f"| {name} | {it} |" for name, it in (versions | RAN_WITH).items()]


def _read(path: str) -> str:
    return (ROOT / path).read_text()


if __name__ == "__main__":
    PATH.write_text(text())
