"""Every MUST of the SPIFFE standards has a test, and the table of them is current."""

from tests.contract import conformance

STANDARDS, WHY_NOT = conformance.requirements()
IDS = [key for musts in STANDARDS.values() for key in musts]


def test_every_must_has_a_test_or_a_reason():
    found = conformance.tests()
    missing = [key for key in IDS if not found[key] and not WHY_NOT.get(key)]
    assert not missing, f"no test_{missing[0].lower()}_... and no why_not: {missing}"


def test_no_test_bears_an_id_that_no_standard_has():
    assert set(conformance.tests()) <= set(IDS)


def test_the_table_is_current():
    assert conformance.TABLE.read_text() == conformance.table(), (
        "run: python -m tests.contract.conformance"
    )
