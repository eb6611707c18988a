"""The tables of what the standards require, and of the tests that show it.

docs/spiffe.md is of the SPIFFE standards, docs/http2.md of RFC 9113 and RFC 7541.

python -m tests.contract.conformance      writes both anew
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_TEST = re.compile(r"^ *(?:async )?def (test_\w+)\(", re.MULTILINE)
_UNMET = re.compile(r"^@pytest\.mark\.xfail\(.*?^def (test_\w+)\(", re.M | re.S)


@dataclass(frozen=True)
class Table:
    """One table: its requirements are in `source`, and it is written to `path`."""

    source: Path
    path: Path
    head: str
    ids: Callable[[str], list[str]]
    """The ids that the name of a test begins with."""

    def __str__(self) -> str:
        return self.path.stem

    def tests(self) -> dict[str, list[str]]:
        """Return the names of the tests of each id, with the file they are in."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for path in sorted((ROOT / "tests").rglob("test_*.py")):
            read, place = path.read_text(), path.relative_to(ROOT)
            unmet = set(_UNMET.findall(read))
            for name in _TEST.findall(read):
                note = " (not met yet)" if name in unmet else ""
                for key in self.ids(name):
                    found[key].append(f"[`{name}`](../{place}){note}")
        return found

    def requirements(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return the requirements by standard and id, and why some have no test."""
        read = tomllib.loads(self.source.read_text())
        standards = {table.pop("name"): table for table in read["standard"]}
        return standards, read["why_not"]

    def text(self) -> str:
        """Return the text of the table."""
        found, (standards, why_not) = self.tests(), self.requirements()
        lines = [self.head]
        for standard, musts in standards.items():
            lines += [f"## {standard}", "| id | requirement | shown by |"]
            lines.append("|---|---|---|")
            for key, text in musts.items():
                shown = "<br>".join(found[key]) or why_not.get(key, "")
                lines.append(f"| {key} | {text} | {shown} |")
            lines.append("")
        return "\n".join(lines)


def _spiffe_ids(name: str) -> list[str]:
    """Of test_x9_x10_..., X9: the first alone."""
    found = re.match(r"test_([ixbfwj]\d+)_", name)
    return [found[1].upper()] if found else []


def _http2_ids(name: str) -> list[str]:
    """Of test_s6_9_1a_h4_2b_..., 6.9.1a and H4.2b: s is RFC 9113, h is RFC 7541."""
    found = re.match(r"test_((?:[sh]\d+(?:_\d+)*[a-z]*_)+)", name)
    if found is None:
        return []
    each = re.findall(r"([sh])(\d+(?:_\d+)*[a-z]*)_", found[1])
    return [
        ("H" if letter == "h" else "") + number.replace("_", ".")
        for letter, number in each
    ]


SPIFFE = Table(
    HERE / "spiffe.toml",
    ROOT / "docs" / "spiffe.md",
    """\
# What the SPIFFE standards require, and the test that shows it
Generated from the tests by `python -m tests.contract.conformance`; do not edit.
A test of a requirement has its id at the beginning of its name.
The standards are those of the SPIFFE project: SPIFFE-ID, X509-SVID, JWT-SVID, Trust
Domain and Bundle, Federation, Workload Endpoint, Workload API.
""",
    _spiffe_ids,
)
HTTP2 = Table(
    HERE / "http2.toml",
    ROOT / "docs" / "http2.md",
    """\
# What HTTP/2 and HPACK require, and the test that shows it
Generated from the tests by `python -m tests.contract.conformance`; do not edit.
An id is a section of RFC 9113 and a letter, or one of RFC 7541 after an H. A test has
its ids at the beginning of its name: `test_s6_9_1a_h4_2b_...` is of 6.9.1a and H4.2b.
What is marked (ours) or (should) is no MUST of the standard, and holds all the same.
Where a test is (not met yet), the code falls short of it, and the test says how.
""",
    _http2_ids,
)
TABLES = (SPIFFE, HTTP2)


if __name__ == "__main__":
    for table in TABLES:
        table.path.write_text(table.text())
