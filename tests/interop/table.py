"""The table of who was tried with our server and our client, and what came of it.

python -m tests.interop.table      writes docs/interop.md anew
"""

import ast
import json
import re
from pathlib import Path

from tests.interop.cases import ABSENT, CASES
from tests.interop.drivers import DRIVERS
from tests.interop.others import OF_OURS, OTHERS
from tests.interop.own import ABSENT_HERE, EVERY, OWN

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATH = ROOT / "docs" / "interop.md"
RAN_WITH = {"Node": "20.20.2", "curl": "7.88.1", "nghttp and h2load": "1.52.0"}
"""What is not pinned: the versions of the machine that the table was made on."""
PINNED = ("grpcio", "grpcio-health-checking", "grpcio-reflection")
IN_PART = "without "
"""So begins the note of a case of which something is not offered."""
HEAD = """\
# Who talks to our server and our client, and what they see
Generated from the tests by `python -m tests.interop.table`; do not edit.
The cases are those of the grpc project's interop-test-descriptions.md, on its
TestService ([service.py](../tests/interop/service.py)), served by us over mutual TLS.
✓: [test_cases.py](../tests/interop/test_cases.py) runs the case with this client, it
passes, and the server has let go of the call afterwards. A client that is not installed
is skipped aloud. "in part": so does what we offer of it. -: not run. "not offered": the
test sees that the driver of our own client ([own.py](../tests/interop/own.py)) says so.
"""
OTHERS_HEAD = """\
## Our client, and others' servers
The same cases by our own client, blocking and awaited, to others' servers
([others.py](../tests/interop/others.py)) over mutual TLS: they take only certificates
of our authority, and prove the SPIFFE ID that our client expects. ✓:
[test_others.py](../tests/interop/test_others.py) runs it with both clients.
"""


def text() -> str:
    """Return the text of docs/interop.md."""
    parts = [_cases(), _others(), _tools(), _versions()]
    return "\n".join([HEAD, *(line for part in parts for line in (*part, ""))])


def _cases() -> list[str]:
    lines = [
        "## Cases",
        f"| case | {' | '.join(EVERY)} | how it differs, or why not |",
    ]
    lines.append("|---|" + "---|" * (len(EVERY) + 1))
    for case in CASES:
        mark = "in part" if case.note.startswith(IN_PART) else "✓"
        own = ABSENT_HERE.get(case.name, mark)
        marks = [mark] * len(DRIVERS) + [own] * len(OWN)
        lines.append(f"| {case.name} | {' | '.join(marks)} | {case.note} |")
    for name, reason in ABSENT.items():
        lines.append(f"| {name} | {'- | ' * len(EVERY)}{reason} |")
    return lines


def _others() -> list[str]:
    lines = [OTHERS_HEAD, f"| case | {' | '.join(OTHERS)} |"]
    lines.append("|---|" + "---|" * len(OTHERS))
    for case in CASES:
        absent = ABSENT_HERE.get(case.name)
        mark = absent or ("below" if case.name in OF_OURS else "✓")
        lines.append(f"| {case.name} | {' | '.join([mark] * len(OTHERS))} |")
    return [*lines, "", *_told_by("test_others.py")]


def _tools() -> list[str]:
    return ["## Tools, and grpc's own services", *_told_by("test_tools.py")]


def _told_by(file: str) -> list[str]:
    """Return a table of the tests in a file that say what they show."""
    lines = ["| shown by | what is done and seen |", "|---|---|"]
    path = HERE / file
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            said = " ".join((ast.get_docstring(node) or "").split())
            if not said:
                continue
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
