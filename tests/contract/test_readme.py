"""What the README says, as far as a program can check it."""

import json
import re
from pathlib import Path

import pytest

from ztserve.cli import VERBS
from ztserve.config import Settings, entries

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
THREATS = README.partition("\n## Threats\n")[2].partition("\n## ")[0]
ROOMS = """
identity artifacts transport authorization validation inference filtering audit doors
pipeline config serving gateway cli testing
""".split()  # noqa: SIM905 - the order is easier to see


def defined_tests() -> set[str]:
    return {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text(), re.M)
    }


def test_every_test_in_the_threat_table_exists():
    named = set(re.findall(r"`(test_\w+)`", THREATS))
    assert len(named) > 30
    assert named - defined_tests() == set()


def test_every_row_of_the_threat_table_names_a_test():
    rows = [line for line in THREATS.splitlines() if line.startswith("| ")][1:]
    assert rows
    assert [row for row in rows if "`test_" not in row] == []


def test_every_verb_shown_exists_and_every_verb_is_shown():
    code = [text for kind, text in BLOCKS if kind != "python"]
    code += re.findall(r"`([^`\n]+)`", README)
    shown: set[str] = set()
    for text in code:
        for first, others in re.findall(
            r"(?:^|\s)ztserve ([a-z]+)((?: \| [a-z]+)*)", text
        ):
            shown |= {first, *others.replace("|", " ").split()}
    assert shown == set(VERBS)


def test_there_are_snippets_of_python():
    assert len(PYTHON) >= 4


@pytest.mark.parametrize("snippet", PYTHON, ids=range(len(PYTHON)))
def test_a_snippet_compiles(snippet):
    compile(snippet, "README.md", "exec")


def test_the_class_on_the_first_screen_is_the_examples_own():
    assert PYTHON[0] in (ROOT / "examples/digits.py").read_text()


@pytest.mark.parametrize("name", ["seed.yaml", "developer.yaml"])
def test_the_policies_of_init_are_those_of_the_examples(name):
    ours = ROOT / "examples/policies" / name
    assert ours.read_bytes() == (ROOT / "ztserve/cli/templates" / name).read_bytes()


def test_every_room_has_a_heading_in_the_order_of_the_picture():
    assert re.findall(r"^### (\w+)$", README, re.MULTILINE) == ROOMS
    for room in ROOMS:
        home = ROOT / "ztserve" / room
        assert home.is_dir() or home.with_suffix(".py").is_file()


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_of_settings_is_that_of_the_code():
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(.*?)` \|", README, re.MULTILINE)
    assert rows == [(key, told(value)) for key, value, _ in entries(Settings())]


def told(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, tuple) else str(value)


def test_it_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 450
