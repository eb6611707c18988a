"""docs/artifacts.md: each attack has its test."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    line
    for line in (ROOT / "docs/artifacts.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| attack")
]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


def test_there_are_many():
    assert len(ROWS) >= 45


@pytest.mark.parametrize("row", ROWS)
def test_an_attack_has_its_tests(row):
    names = re.findall(r"`(test_\w+)`", row)
    assert names
    assert [name for name in names if f"def {name}(" not in TESTS] == []
