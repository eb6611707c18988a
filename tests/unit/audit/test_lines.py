import json

from ztserve.audit import lines
from ztserve.types import Caller

HOSTILE = '"}\n{"seq":9\x00\x1b[2J\u2028\ud800😀\\' + "😀" * 5000


def test_the_longest_hostile_record_is_one_bounded_line_of_json(log, call, records):
    it = call(
        HOSTILE,
        peer=HOSTILE,
        caller=Caller(HOSTILE, HOSTILE, proof=HOSTILE),
        notes=(HOSTILE,) * 50,
        source_ip=HOSTILE,
    )
    with log.record(it) as record:
        record.rule, record.shadow = HOSTILE, (HOSTILE,) * 50
        record.model = record.version = record.digest = HOSTILE
        record.request_id = record.resource = HOSTILE
        record.reason = record.error = HOSTILE
        record.findings = {f"{n}{HOSTILE}": n for n in range(50)}
        for n in range(50):
            record.stage(f"{n}{HOSTILE}")
        record.described()
        assert len(lines.call(record)) + 128 < lines.MAX_LINE_BYTES
    (line,) = records()
    assert line["actor"]["user"]["uid"].startswith('"}\n{"seq":9\x00\x1b[2J')
    assert line["actor"]["user"]["uid"].endswith("…")


def test_a_line_without_caller_says_null(log, call, records):
    with log.record(call(caller=None)) as record:
        record.described()
    assert records()[0]["unmapped"]["caller"] is None


def test_what_was_read_of_a_model_is_told_where_something_was(log, call, records):
    for resource in ("", "model.safetensors[0:+64]"):
        with log.record(call()) as record:
            record.resource = resource
            record.described()
    without, told = records()
    assert "resource" not in without["unmapped"]
    assert told["unmapped"]["resource"] == "model.safetensors[0:+64]"


def test_an_event_carries_its_fields_as_plain_json(log, records):
    log.event(
        "model-verified",
        kind="x",
        serial=2**159,
        signers=("a", "b"),
        ratio=float("nan"),
        deep={"a": {"b": {"c": 1}}},
        ready=True,
        other=object,
    )
    (line,) = records()
    assert (line["class_uid"], line["activity_name"]) == (6002, "model-verified")
    fields = line["unmapped"]
    assert fields["serial"] == f"{2**159:x}"
    assert fields["signers"] == ["a", "b"]
    assert (fields["ratio"], fields["ready"], fields["kind"]) == ("nan", True, "x")


def test_an_event_too_large_to_keep_is_still_noted(log, records):
    log.event("odd", **{f"f{n}": ["😀" * 2048] * 32 for n in range(32)})
    assert list(records()[0]["unmapped"]) == ["dropped_bytes"]


def test_refused_handshakes_are_one_counted_line(log, records):
    log.refused_handshakes("no certificate", 7, "10.0.0.9")
    (line,) = records()
    assert (line["class_uid"], line["count"]) == (3002, 7)
    assert line["status_detail"] == "no certificate"
    assert line["src_endpoint"] == {"ip": "10.0.0.9"}


def test_what_is_not_a_record_is_not_parsed():
    for line in (b"", b"[]", b"{}", b'{"seq":"1","prev":""}', b"[" * 100_000, b"\xff"):
        assert lines.parse(line) is None
    assert lines.parse(json.dumps({"seq": 1, "prev": ""}).encode()) is not None
