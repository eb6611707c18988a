import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ztserve.audit import Log, lines, read, verify_log
from ztserve.audit.chain import Chain
from ztserve.errors import AuditError, ConfigError


def open_chain(path, **limits):
    settings = {"max_bytes": 10**8, "reserve_bytes": 10**6, "segment_bytes": 10**7}
    return Chain(path, lambda n: lines.event("head", {"n": n}), **(settings | limits))


def note(chain, text="x"):
    chain.append(lines.event("note", {"text": text}))


def fill(chain):
    for _ in range(100):
        note(chain)


def notes(path):
    return [
        line["unmapped"]["text"]
        for line in read(path)
        if line["activity_name"] == "note"
    ]


def test_files_and_directory_are_private(path):
    old = os.umask(0)
    try:
        open_chain(path).close()
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_log_that_is_there_is_continued(path):
    for text in ("one", "two"):
        chain = open_chain(path)
        note(chain, text)
        chain.close()
    assert notes(path) == ["one", "two"]
    report = verify_log(path)
    assert (report.status, report.records, report.last_seq) == ("self-consistent", 4, 4)


def test_a_log_goes_on_in_another_file_when_one_is_full(path):
    chain = open_chain(path, segment_bytes=2000)
    for n in range(50):
        note(chain, str(n))
    chain.close()
    chain = open_chain(path, segment_bytes=2000)
    note(chain, "50")
    chain.close()
    names = sorted(p.name for p in path.parent.iterdir())
    assert names[:2] == ["replica.jsonl", "replica.jsonl.000002"]
    assert len(names) > 5
    assert all(p.stat().st_size <= 2000 for p in path.parent.iterdir())
    assert notes(path) == [str(n) for n in range(51)]
    assert verify_log(path).status == "self-consistent"


@pytest.mark.parametrize(
    "torn", [b'{"seq":3,"prev":"', b'{"seq":9,"prev":""}', b"\0\0"]
)
def test_a_torn_last_line_is_closed_and_accounted_for(path, torn):
    chain = open_chain(path)
    note(chain)
    chain.close()
    with path.open("ab") as file:
        file.write(torn)
    assert verify_log(path).torn == 1
    chain = open_chain(path)
    note(chain)
    chain.close()
    report = verify_log(path)
    assert (report.status, report.torn, report.records) == ("self-consistent", 1, 5)
    assert notes(path) == ["x", "x"]


def test_a_file_that_was_begun_and_got_no_line_is_continued(path):
    chain = open_chain(path)
    note(chain)
    chain.close()
    (path.parent / "replica.jsonl.000002").touch(0o600)
    chain = open_chain(path)
    note(chain)
    chain.close()
    assert (verify_log(path).status, verify_log(path).last_seq) == (
        "self-consistent",
        4,
    )
    path.rename(path.parent / "elsewhere")
    (path.parent / "replica.jsonl.000002").write_bytes(b"")
    with pytest.raises(AuditError, match="put it back"):
        open_chain(path)


def test_room_made_by_archiving_is_used_without_a_restart(path):
    chain = open_chain(path, max_bytes=6000, reserve_bytes=2000, segment_bytes=1000)
    with pytest.raises(AuditError, match="archive its finished files"):
        fill(chain)
    shutil.move(path, path.parent.parent / "archived")
    with pytest.raises(AuditError):
        note(chain)  # looked at most once a second
    chain._measure_at = 0
    note(chain)
    chain.close()


@pytest.mark.parametrize(
    ("limits"),
    [
        {"max_bytes": 5, "reserve_bytes": 5},
        {"reserve_bytes": 0},
        {"segment_bytes": 0},
    ],
)
def test_impossible_limits_are_refused(path, limits):
    with pytest.raises(ConfigError, match="expected 0 < reserve_bytes < max_bytes"):
        open_chain(path, **limits)


def test_two_writers_of_one_log_are_refused(path):
    chain = open_chain(path)
    with pytest.raises(AuditError, match="being written by another"):
        open_chain(path)
    chain.close()
    open_chain(path).close()


def test_a_file_that_is_no_audit_log_is_not_appended_to(path):
    path.parent.mkdir(0o700)
    path.write_text("precious notes\n")
    path.chmod(0o600)
    with pytest.raises(AuditError, match="is no audit log"):
        open_chain(path)
    assert path.read_text() == "precious notes\n"
    path.write_bytes(b"x" * 2_000_000)
    with pytest.raises(AuditError, match="is no audit log"):
        open_chain(path)


def test_a_closed_chain_writes_nothing(path):
    chain = open_chain(path)
    chain.close()
    chain.close()
    with pytest.raises(AuditError, match="is closed"):
        note(chain)


FILL = """
import resource, signal, sys
from pathlib import Path
from ztserve.audit import Log
from ztserve.errors import AuditError
log = Log(Path(sys.argv[1]), origin={})
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
failures = 0
for n in range(100):
    try:
        log.event("note", text=f"{n:0200d}")
    except AuditError as error:
        failures += 1
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
log.event("note", text="after")
log.close()
"""


@pytest.mark.slow
def test_a_short_write_is_an_error_and_the_chain_goes_on_once_there_is_room(path):
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    messages = done.stdout.splitlines()
    assert "bytes could be written; is the disk full?" in messages[0]
    assert "cannot be written: File too large" in messages[-1]
    report = verify_log(path)
    assert (report.status, report.torn) == ("self-consistent", 1)
    assert len(notes(path)) == 100 - len(messages) + 1
    assert notes(path)[-1] == "after"


def test_a_log_used_by_its_name_alone_lies_in_the_working_directory(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o700)
    with Log(Path("a.jsonl"), origin={}):
        pass
    assert verify_log(Path("a.jsonl")).records == 1
