"""docs/spiffe.md: each MUST of the SPIFFE standards, and the tests that show it.

python -m tests.contract.conformance      writes it anew
"""

import re
import tomllib
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = ROOT / "docs" / "spiffe.md"
_TEST = re.compile(r"^ *(?:async )?def (test_([ixbfwj])(\d+)_\w+)\(", re.MULTILINE)

HEAD = """\
# What the SPIFFE standards require, and the test that shows it
Generated from the tests by `python -m tests.contract.conformance`; do not edit.
A test of a requirement has its id at the beginning of its name.
The standards are those of the SPIFFE project: SPIFFE-ID, X509-SVID, JWT-SVID, Trust
Domain and Bundle, Federation, Workload Endpoint, Workload API.
"""


def tests() -> dict[str, list[str]]:
    """Return the names of the tests of each id, with the file they are in."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, letter, number in _TEST.findall(path.read_text()):
            place = path.relative_to(ROOT)
            found[f"{letter.upper()}{number}"].append(f"[`{name}`](../{place})")
    return found


def requirements() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the requirements by standard and id, and why some have no test."""
    read = tomllib.loads((HERE / "spiffe.toml").read_text())
    standards = {table.pop("name"): table for table in read["standard"]}
    return standards, read["why_not"]


def table() -> str:
    """Return the text of docs/spiffe.md."""
    found, (standards, why_not) = tests(), requirements()
    lines = [HEAD]
    for standard, musts in standards.items():
        lines += [f"## {standard}", "| id | requirement | shown by |", "|---|---|---|"]
        for key, text in musts.items():
            shown = "<br>".join(found[key]) or why_not.get(key, "")
            lines.append(f"| {key} | {text} | {shown} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    TABLE.write_text(table())
