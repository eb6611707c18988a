"""The table of interoperability is current."""

from tests.interop import table


def test_the_table_is_current():
    assert table.PATH.read_text() == table.text(), "run: python -m tests.interop.table"


def test_each_row_says_what_is_done_or_why_not():
    rows = [line for line in table.text().splitlines() if line.startswith("| [`test_")]
    assert rows
    assert not [row for row in rows if row.endswith("|  |")]
    assert all(table.ABSENT.values())
    assert not {one.name for one in table.CASES} & set(table.ABSENT)
