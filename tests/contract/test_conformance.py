"""Every MUST of the standards has a test, and the tables of them are current."""

import pytest

from tests.contract import conformance

each_table = pytest.mark.parametrize("table", conformance.TABLES, ids=str)


def ids(table):
    standards, _ = table.requirements()
    return [key for musts in standards.values() for key in musts]


@each_table
def test_every_must_has_a_test_or_a_reason(table):
    found, (_, why_not) = table.tests(), table.requirements()
    missing = [key for key in ids(table) if not found[key] and not why_not.get(key)]
    assert not missing, f"neither a test named by its id nor a why_not: {missing}"


@each_table
def test_no_must_has_both_a_test_and_a_reason_for_none(table):
    found, (_, why_not) = table.tests(), table.requirements()
    assert set(why_not) <= set(ids(table))
    assert not [key for key in why_not if found[key]]


@each_table
def test_no_test_bears_an_id_that_no_standard_has(table):
    assert set(table.tests()) <= set(ids(table))


@each_table
def test_no_id_occurs_twice(table):
    assert len(ids(table)) == len(set(ids(table)))


@each_table
def test_the_table_is_current(table):
    assert table.path.read_text() == table.text(), (
        "run: python -m tests.contract.conformance"
    )
