import os
from pathlib import Path

import pytest

from ztserve.audit import Log, read, verify_log
from ztserve.errors import AuditError


@pytest.fixture
def written(path) -> Path:
    with Log(path, origin={}, segment_bytes=1500) as log:
        for n in range(20):
            log.event("note", n=n)
    return path


def test_an_untouched_log_is_self_consistent_and_said_to_be_no_more(written):
    report = verify_log(written)
    assert (report.status, report.first_bad) == ("self-consistent", None)
    assert (report.first_seq, report.last_seq) == (1, report.records)
    assert len(report.last_hash) == 64
    assert "no key and no outside checkpoint was checked" in report.message
    assert "a cut of its end cannot be told" in report.message
    assert "intact" not in report.message


@pytest.mark.parametrize(
    "more", [{"trust": object()}, {"trust": {}}, {"checkpoints": ("x",)}]
)
def test_trust_and_checkpoints_are_refused_not_ignored(written, more):
    with pytest.raises(AuditError, match="not supported yet"):
        verify_log(written, **more)


def test_a_later_file_can_be_verified_without_the_first(written):
    second = written.with_name("replica.jsonl.000002")
    written.unlink()
    report = verify_log(second)
    assert report.status == "self-consistent"
    assert report.first_seq > 1
    assert f"seq {report.first_seq}-" in report.message


def test_a_file_missing_in_the_middle_is_found(written):
    written.with_name("replica.jsonl.000002").unlink()
    report = verify_log(written)
    assert (report.status, report.first_bad) == ("broken", 1)
    assert report.bad_file == written.with_name("replica.jsonl.000003")
    assert "should follow" in report.message


def test_an_emptied_file_is_found(written):
    written.with_name("replica.jsonl.000002").write_bytes(b"")
    report = verify_log(written)
    assert (report.status, report.first_bad) == ("broken", 1)
    assert "empty, but others follow" in report.message


def test_an_empty_log_is_broken(tmp_path):
    (tmp_path / "a.jsonl").touch()
    report = verify_log(tmp_path / "a.jsonl")
    assert (report.status, report.first_bad) == ("broken", 1)
    assert "holds no record" in report.message


def test_a_torn_line_in_the_middle_of_the_files_is_found(written):
    with written.open("ab") as file:
        file.write(b'{"seq":')
    report = verify_log(written)
    assert report.status == "broken"
    assert "nothing accounts for" in report.message


def test_records_come_in_order_and_once_each(written):
    everything = sorted(written.parent.iterdir())
    seqs = [record["seq"] for record in read(written, *everything)]
    assert seqs == list(range(1, len(seqs) + 1))


def test_reading_names_the_line_that_is_no_record(written):
    with written.open("ab") as file:
        file.write(b"what?\n")
    with pytest.raises(
        AuditError, match=r"replica.jsonl, line \d+: not an audit record"
    ):
        list(read(written))


def test_a_line_still_being_written_is_passed_over(written):
    last = max(written.parent.iterdir())
    before = len(list(read(written)))
    with last.open("ab") as file:
        file.write(b'{"seq":')
    assert len(list(read(written))) == before


def test_a_line_without_end_is_not_read_into_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 1_000_000)
    assert verify_log(path).status == "broken"
    assert list(read(path)) == []


def test_a_missing_log_is_an_error_by_name(tmp_path):
    with pytest.raises(AuditError, match="there is no such file"):
        verify_log(tmp_path / "a.jsonl")
    with pytest.raises(AuditError, match="No such file"):
        list(read(tmp_path / "nowhere" / "a.jsonl"))


def test_a_pipe_in_place_of_a_log_does_not_hang_the_reader(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(AuditError, match="not a plain file"):
        verify_log(tmp_path / "a.jsonl")
