import pytest

from ztserve.audit import refusals
from ztserve.audit.refusals import LINES_PER_MINUTE, MAX_KEYS, OTHERS, Refusals
from ztserve.errors import AuditError


def counts(kept: Refusals) -> list[str]:
    written: list[str] = []
    kept.flush(written.append)
    return written


def test_the_first_twenty_a_minute_get_a_line_and_the_rest_are_counted():
    kept = Refusals()
    own = [kept.is_line("spiffe://a", "Denied") for _ in range(50)]
    assert own == [True] * LINES_PER_MINUTE + [False] * 30
    (line,) = counts(kept)
    assert '"count":30' in line
    assert '"uid":"spiffe://a"' in line
    assert '"status_code":"Denied"' in line
    assert counts(kept) == []


def test_principals_and_errors_are_counted_apart():
    kept = Refusals()
    for _ in range(LINES_PER_MINUTE):
        kept.is_line("spiffe://a", "Denied")
    assert kept.is_line("spiffe://b", "Denied")
    assert kept.is_line("spiffe://a", "InvalidInput")
    assert not kept.is_line("spiffe://a", "Denied")


def test_after_a_minute_lines_begin_anew(monkeypatch):
    now = 100.0
    monkeypatch.setattr(refusals, "monotonic", lambda: now)
    kept = Refusals()
    for _ in range(LINES_PER_MINUTE + 5):
        kept.is_line("spiffe://a", "Denied")
    now += 60
    assert kept.is_line("spiffe://a", "Denied")
    assert '"count":5' in counts(kept)[0]


@pytest.mark.slow
def test_memory_is_bounded_and_those_beyond_it_are_counted_together(monkeypatch):
    now = 100.0
    monkeypatch.setattr(refusals, "monotonic", lambda: now)
    kept = Refusals()
    written = sum(kept.is_line(f"spiffe://{n}", "Denied") for n in range(10_000))
    assert len(kept._tallies) == MAX_KEYS + 1
    assert written == MAX_KEYS + LINES_PER_MINUTE
    (line,) = counts(kept)
    assert OTHERS in line
    assert f'"count":{10_000 - written}' in line
    now += 60
    assert kept.is_line("spiffe://new", "Denied")
    assert len(kept._tallies) == 1


def test_a_count_that_cannot_be_written_is_kept():
    kept = Refusals()
    kept.count("spiffe://a", "AuditError")

    def full(line: str) -> None:
        raise AuditError("full")

    with pytest.raises(AuditError):
        kept.flush(full)
    kept.count("spiffe://a", "AuditError")
    assert '"count":2' in counts(kept)[0]
