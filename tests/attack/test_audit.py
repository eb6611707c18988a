"""Attacks on the audit log: forge a line, change the past, fill it, go around it."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ztserve.audit import Log, Record, lines, read, verify_log
from ztserve.errors import AuditError, Denied
from ztserve.types import Call, Caller, Operation, Peer, Reply, Request

ROOT = Path(__file__).parents[2]
FORGED = 'x"}}\n{"seq":99,"prev":"","status":"released"}\r\n\u2028\x1b[2J'


def make_call(call_id="c", peer="spiffe://t/a", **fields) -> Call:
    when = datetime(2030, 1, 1, tzinfo=UTC)
    settings = {
        "caller": None,
        "operation": Operation("POST", frozenset({"/v1/predict"}), "/v1/predict"),
        "deadline": 1e9,
        **fields,
    }
    return Call(id=call_id, peer=Peer(peer, 7, when, when, ""), **settings)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit" / "replica.jsonl"


def write(path, count=10):
    with Log(path, origin={}) as log:
        for n in range(count):
            with log.record(make_call(f"call-{n}")) as record:
                record.described()


# --- forging lines ----------------------------------------------------------------


def hostile(log):
    it = make_call(
        FORGED,
        FORGED,
        caller=Caller(FORGED, FORGED, {FORGED: FORGED}, FORGED),
        headers={FORGED: FORGED},
        host=FORGED,
        source_ip=FORGED,
        notes=(FORGED,),
    )
    with log.record(it) as record:
        record.rule, record.shadow = FORGED, (FORGED,)
        record.model = record.version = record.digest = FORGED
        record.received(Request(FORGED, FORGED, FORGED, ()))
        record.stage(FORGED)
        raise Denied(FORGED, FORGED)


def test_no_value_can_begin_a_line_or_add_a_field(path):
    with Log(path, origin={"service": FORGED}) as log:
        with pytest.raises(Denied):
            hostile(log)
        log.event(FORGED, **{FORGED: FORGED})
        log.refused_handshakes(FORGED, 1, FORGED)
    data = path.read_bytes()
    assert data.count(b"\n") == 4
    assert all(byte == 0x0A or 0x20 <= byte < 0x7F for byte in data)
    assert [record["seq"] for record in read(path)] == [1, 2, 3, 4]
    refused = list(read(path))[1]
    assert (refused["status"], refused["status_detail"]) == ("refused", FORGED)
    assert refused["actor"]["user"]["uid"] == FORGED
    assert verify_log(path).status == "self-consistent"


def test_without_escaping_the_same_values_forge_a_record(path, monkeypatch):
    monkeypatch.setattr(lines, "_escape", lambda value: f'"{value}"')
    monkeypatch.setattr(Denied, "__str__", lambda _: FORGED)
    lines._source.cache_clear()
    with Log(path, origin={}) as log, pytest.raises(Denied):
        hostile(log)
    assert b'\n{"seq":99,"prev":"","status":"released"}' in path.read_bytes()
    lines._source.cache_clear()
    lines._caller.cache_clear()
    lines._served.cache_clear()
    lines._kind.cache_clear()


def test_nothing_of_headers_claims_or_foreign_exceptions_is_written(path):
    secret = "4111-1111-1111-1111"
    it = make_call(
        headers={"authorization": secret}, caller=Caller("i", "s", {"card": secret})
    )
    with Log(path, origin={}) as log, pytest.raises(ValueError), log.record(it):
        raise ValueError(secret)
    assert secret not in path.read_text()


# --- changing the past ------------------------------------------------------------


def edit(data):
    data[4] = data[4].replace(b"released", b"refused!")


def delete(data):
    del data[4]


def delete_the_first(data):
    del data[0]


def reorder(data):
    data[4], data[5] = data[5], data[4]


def insert(data):
    data.insert(4, data[4])


def insert_what_is_no_record(data):
    data.insert(4, b"torn or so\n")


def renumber_after_deletion(data):
    del data[4]
    for n in range(4, len(data)):
        data[n] = data[n].replace(b'"seq":%d,' % (n + 2), b'"seq":%d,' % (n + 1))


def pass_off_as_torn(data):
    data[4] = data[4][:50] + b" torn\n"


CHANGES = [
    edit,
    delete,
    delete_the_first,
    reorder,
    insert,
    insert_what_is_no_record,
    renumber_after_deletion,
    pass_off_as_torn,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_line_is_found_and_named(path, change):
    write(path)
    data = path.read_bytes().splitlines(keepends=True)
    change(data)
    path.write_bytes(b"".join(data))
    report = verify_log(path)
    assert report.status == "broken"
    assert report.bad_file == path
    first_bad = 1 if change is delete_the_first else report.first_bad
    assert first_bad in (1, 5, 6)
    assert report.records == first_bad - 1
    assert f"line {report.first_bad}" in report.message


@pytest.mark.parametrize("change", [edit, delete, reorder], ids=lambda c: c.__name__)
def test_a_log_without_a_chain_hides_the_same_changes(path, change):
    write(path)
    data = path.read_bytes().splitlines(keepends=True)
    change(data)
    # What a log of bare JSON lines can check: that each line is JSON.
    assert all(json.loads(line) for line in data)


def test_a_cut_end_and_a_whole_rewriting_are_not_passed_off_as_intact(path):
    write(path)
    data = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(data[:5]))
    report = verify_log(path)
    assert (report.status, report.records) == ("self-consistent", 5)
    assert "a cut of its end cannot be told" in report.message
    assert "rewritten it" in report.message


# --- going around it --------------------------------------------------------------


def test_a_link_in_place_of_the_log_is_refused(path, tmp_path):
    target = tmp_path / "passwd"
    target.write_text("root\n")
    path.parent.mkdir(0o700)
    path.symlink_to(target)
    with pytest.raises(AuditError, match="expected a plain file of our own"):
        Log(path, origin={})
    path.unlink()
    os.link(target, path)
    path.chmod(0o600)
    with pytest.raises(AuditError, match="2 names; expected a plain file"):
        Log(path, origin={})
    assert target.read_text() == "root\n"


def test_a_link_in_place_of_the_next_file_is_refused(path, tmp_path):
    target = tmp_path / "target"
    target.touch()
    with Log(path, origin={}, segment_bytes=1000) as log:
        path.with_name("replica.jsonl.000002").symlink_to(target)
        with pytest.raises(AuditError, match="expected a plain file of our own"):
            log.event("note", text="x" * 1000)
        assert target.read_bytes() == b""


def test_a_directory_behind_a_link_is_refused(path, tmp_path):
    (tmp_path / "real").mkdir(0o700)
    path.parent.symlink_to(tmp_path / "real")
    with pytest.raises(AuditError, match="expected a directory, not a link"):
        Log(path, origin={})


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_directory_that_others_can_write_is_refused(path, mode):
    path.parent.mkdir()
    path.parent.chmod(mode)
    with pytest.raises(AuditError, match=f"has mode {mode:o}"):
        Log(path, origin={})


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o644])
def test_a_file_that_others_can_read_or_write_is_refused(path, mode):
    path.parent.mkdir(0o700)
    path.touch()
    path.chmod(mode)
    with pytest.raises(AuditError, match=f"has mode {mode:o}"):
        Log(path, origin={})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_another_user_are_refused(path):
    path.parent.mkdir(0o700)
    path.touch(0o600)
    os.chown(path, 12345, -1)
    with pytest.raises(AuditError, match="uid 12345"):
        Log(path, origin={})
    os.chown(path.parent, 12345, -1)
    with pytest.raises(AuditError, match=r"audit directory .* uid 12345"):
        Log(path, origin={})


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_what_is_no_plain_file_is_refused(path, make):
    path.parent.mkdir(0o700)
    make(path, 0o600)
    with pytest.raises(AuditError, match="expected a plain file"):
        Log(path, origin={})


@pytest.mark.parametrize("away", ["moved", "deleted", "replaced"])
def test_a_log_taken_away_while_in_use_stops_the_answers(path, away):
    with Log(path, origin={}) as log:
        if away == "deleted":
            path.unlink()
        else:
            path.rename(path.with_name("elsewhere"))
        if away == "replaced":
            path.touch(0o600)
        log._chain._check_at = 0  # looked at once a second
        with pytest.raises(AuditError, match="moved or deleted while in use"):
            log.event("note")


# --- filling it -------------------------------------------------------------------


def test_a_full_disk_refuses_the_answer_and_heals(path):
    with Log(path, origin={}) as log:
        mine = os.dup(log._chain._fd)
        full = os.open("/dev/full", os.O_RDWR)
        log.event("before")  # so that the look at the file is not due
        os.dup2(full, log._chain._fd)
        with pytest.raises(AuditError, match="No space left on device"):  # noqa: SIM117
            with log.record(make_call("lost")) as record:
                record.described()
        os.dup2(mine, log._chain._fd)
        with log.record(make_call("served")) as record:
            record.described()
        os.close(mine)
        os.close(full)
    assert verify_log(path).status == "self-consistent"
    served = [r for r in read(path) if r["class_uid"] == 6003]
    assert served[0]["api"]["request"]["uid"] == "served"
    assert (served[1]["status_code"], served[1]["count"]) == ("AuditError", 1)


@pytest.mark.slow
def test_a_denied_caller_cannot_fill_the_disk(path):
    with Log(path, origin={}) as log:
        before = path.stat().st_size
        for n in range(20_000):
            with pytest.raises(Denied), log.record(make_call(f"call-{n}")):
                raise Denied("no", "r" * 10_000)
        seconds = 10
        assert path.stat().st_size - before < 20 * 3000 + seconds * 500
    refused = [r for r in read(path) if r["class_uid"] == 6003]
    assert sum(r.get("count", 1) for r in refused) == 20_000
    assert verify_log(path).status == "self-consistent"


def test_without_counting_the_same_flood_fills_it(path, monkeypatch):
    monkeypatch.setattr("ztserve.audit.refusals.LINES_PER_MINUTE", 10**9)
    with Log(path, origin={}) as log:
        for n in range(500):
            with pytest.raises(Denied), log.record(make_call(f"call-{n}")):
                raise Denied("no", "r" * 10_000)
    assert path.stat().st_size > 500 * 1500


# --- killing it -------------------------------------------------------------------

SERVE = """
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from ztserve.audit import Log
from ztserve.types import Call, Operation, Peer
when = datetime(2030, 1, 1, tzinfo=UTC)
peer = Peer("spiffe://t/a", 7, when, when, "")
operation = Operation("POST", frozenset({"/v1/predict"}), "/v1/predict")
log = Log(Path(sys.argv[1]), origin={}, segment_bytes=100_000)
def serve(thread):
    n = 0
    while True:
        n += 1
        call = f"{thread}-{n}"
        with log.record(Call(call, peer, None, operation, 1e9)) as record:
            record.described()
        os.write(1, call.encode() + b"\\n")
for thread in range(4):
    Thread(target=serve, args=(thread,)).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_every_acknowledged_call_is_in_the_log_of_a_killed_process(path, attempt):
    command = [sys.executable, "-c", SERVE, str(path)]
    acknowledged = []
    until = time.monotonic() + 60
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as server:
        for line in server.stdout:
            acknowledged.append(line.decode().strip())
            if len(acknowledged) == 3000 + attempt * 777 or time.monotonic() > until:
                server.kill()
                break
        acknowledged += server.stdout.read().decode().split("\n")[:-1]
    assert len(acknowledged) >= 3000
    recorded = {
        r["api"]["request"]["uid"] for r in read(path) if r["class_uid"] == 6003
    }
    assert set(acknowledged) <= recorded
    assert verify_log(path).status == "self-consistent"
    with Log(path, origin={}):
        pass
    assert verify_log(path).status == "self-consistent"


# --- leaving before the end -------------------------------------------------------


def begun_and_left(log, times):
    for n in range(times):
        with suppress(GeneratorExit), log.record(make_call(f"call-{n}")) as record:
            record.released(Reply((), {"EMAIL_ADDRESS": 1}), last=False)
            raise GeneratorExit


def ends(path):
    return [
        r
        for r in read(path)
        if r["class_uid"] == 6003 and r["status"] == "cancelled" and "unmapped" in r
    ]


def test_who_leaves_before_the_end_hides_nothing_of_what_left(path):
    with Log(path, origin={}) as log:
        begun_and_left(log, 60)
    assert [r["unmapped"]["findings"] for r in ends(path)] == [
        {"EMAIL_ADDRESS": 1}
    ] * 60


def test_counted_like_refusals_most_endings_would_be_hidden(path, monkeypatch):
    monkeypatch.setattr(
        Record, "announced", property(lambda _: False, lambda _, value: None)
    )
    with Log(path, origin={}) as log:
        begun_and_left(log, 60)
    assert len(ends(path)) < 60
