import os
import time
from threading import Thread

import pytest

from ztserve.audit import Log, read, verify_log
from ztserve.errors import AuditError, Denied, Unauthenticated


def deny(log, call, times):
    for _ in range(times):
        with pytest.raises(Denied), log.record(call):
            raise Denied("no")


def serve(log, call, times):
    for _ in range(times):
        with log.record(call) as record:
            record.described()


def test_a_log_begins_with_who_writes_it(log, path):
    first = path.read_text().splitlines()[0]
    assert '"activity_name":"log-opened"' in first
    assert '"schema":"ztserve-audit/1"' in first
    assert '"service":"inference-service"' in first
    assert f'"pid":"{os.getpid()}"' in first


@pytest.mark.slow
def test_refusals_beyond_twenty_are_counted_within_a_second_or_so(log, call, records):
    deny(log, call(), 100)
    assert len(records()) == 20
    until = time.monotonic() + 5
    while len(records()) == 20 and time.monotonic() < until:
        time.sleep(0.05)
    assert records()[-1]["count"] == 80


def test_closing_writes_what_was_counted(log, call, records, path):
    deny(log, call(), 25)
    log.close()
    assert records()[-1]["count"] == 5
    assert verify_log(path).status == "self-consistent"


def test_a_refusal_cannot_be_counted_after_closing(log, call):
    deny(log, call(), 20)
    log.close()
    with pytest.raises(AuditError, match="closed"), log.record(call()):
        raise Denied("no")


def test_a_call_refused_before_it_was_one_has_a_line_and_is_counted_by_address(
    log, records
):
    error = Unauthenticated("no", "expired")
    for port in range(30):
        log.refused("/x", error, principal="", address=f"10.0.0.9:{port}")
    log.refused("/x", Denied("no"), principal="spiffe://t/a", address="nonsense")
    log.flush()
    first, *_, named, counted = records()
    assert (first["status_code"], first["status_detail"]) == (
        "Unauthenticated",
        "expired",
    )
    assert first["src_endpoint"] == {"ip": "10.0.0.9", "port": 0}
    assert first["api"] == {"operation": "/x"}
    assert named["actor"]["user"]["uid"] == "spiffe://t/a"
    assert (counted["count"], counted["actor"]["user"]["uid"]) == (10, "10.0.0.9")


def test_served_calls_are_never_counted_together(log, call, records):
    serve(log, call(), 50)
    assert len(records()) == 50


@pytest.mark.parametrize("threads", [8])
def test_threads_share_one_unbroken_chain(log, call, path, threads):
    running = [
        Thread(target=serve, args=(log, call(f"{n}"), 200)) for n in range(threads)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    report = verify_log(path)
    assert (report.status, report.records) == ("self-consistent", threads * 200 + 1)


def test_when_the_budget_is_used_up_calls_fail_and_refusals_are_still_written(
    path, call, records
):
    limits = {"max_bytes": 60_000, "reserve_bytes": 30_000}
    with Log(path, origin={}, **limits) as log:
        with pytest.raises(AuditError, match=r"holds \d+ of at most 30000 bytes"):
            serve(log, call(), 1000)
        served = len(records())
        assert 10 < served < 100
        with pytest.raises(Denied), log.record(call()):
            raise Denied("no")
        log.event("stop")
        log.refused_handshakes("no TLS", 1)
    lines = records()
    assert [line.get("status_code") for line in lines[-4:-1]] == [
        "Denied",
        None,
        "handshake",
    ]
    # The call that could not be answered is not lost either.
    assert (lines[-1]["status_code"], lines[-1]["count"]) == ("AuditError", 1)
    assert sum("count" not in line and line["class_uid"] == 6003 for line in lines) == (
        served + 1
    )


def test_a_stream_that_cannot_be_announced_does_not_begin(path, call):
    with Log(path, origin={}, max_bytes=2000, reserve_bytes=1900) as log:
        record = log.record(call())
        with pytest.raises(AuditError, match="archive its finished files"):  # noqa: SIM117
            with record:
                record.released(None, last=False)
    # Counted once, though its announcement and its end could both not be written.
    assert record.error == "AuditError"


def test_an_origin_cannot_be_mistaken_for_lines(path):
    with Log(path, origin={"service": 'x"}\n{"seq":1'}):
        pass
    assert verify_log(path).records == 1


def test_each_line_bears_the_deployment_bundle_also_in_the_next_file(tmp_path):
    path = tmp_path / "audit" / "r.jsonl"
    with Log(path, origin={}, segment_bytes=600) as log:
        log.event("before")
        log.bear("sha256:" + "a" * 64)
        for _ in range(4):
            log.event("after")
    first, second, *others = read(path)
    assert not {"metadata"} & {*first, *second}
    labels = ["deployment:sha256:" + "a" * 64]
    assert all(line["metadata"] == {"labels": labels} for line in others)
    assert [line["activity_name"] for line in others].count("log-opened") >= 1
    assert verify_log(path).status == "self-consistent"
