from asyncio import CancelledError

import pytest

from ztserve.errors import (
    AuditError,
    Cancelled,
    Denied,
    InferenceError,
    InvalidInput,
)
from ztserve.types import Reply, Request, Tensor


def reply(data: object = b"12345678", **findings: int) -> Reply:
    return Reply((Tensor("p", "FP32", (1, 2), data),), findings)


def test_a_released_call_leaves_one_line_that_says_who_what_and_how(log, call, records):
    with log.record(call(notes=("caller header dropped",))) as record:
        record.rule, record.shadow = "policy/rule[0]", ("policy/rule[1]",)
        record.stage("authorization")
        record.received(Request("digits", "", "mine-7", (), size=300))
        record.model, record.version, record.digest = "digits", "3", "sha256:ab"
        record.rows = 2
        record.stage("validation")
        record.stage("inference")
        record.released(reply(EMAIL=2))
    (line,) = records()
    assert line["class_uid"] == 6003
    assert (line["status"], line["status_id"], line["status_code"]) == (
        "released",
        1,
        "",
    )
    assert line["actor"]["user"] == {
        "uid": "spiffe://dev.ztserve.internal/ns/ml-api/sa/api-gateway",
        "credential_uid": "c0ffee",
    }
    assert line["src_endpoint"] == {"ip": "10.1.2.3", "port": 4444}
    assert line["api"] == {"operation": "/v1/predict", "request": {"uid": "call-1"}}
    more = line["unmapped"]
    assert more["caller"]["subject"] == "alice"
    assert more["caller"]["proof"].startswith("x, asserted by spiffe://")
    assert more["policy"] == {"rule": "policy/rule[0]", "shadow": ["policy/rule[1]"]}
    assert more["model"] == {"name": "digits", "version": "3", "digest": "sha256:ab"}
    assert (more["request_id"], more["rows"]) == ("mine-7", 2)
    assert (more["bytes_in"], more["bytes_out"]) == (300, 8)
    assert more["findings"] == {"EMAIL": 2}
    assert more["notes"] == ["caller header dropped"]
    assert list(more["stages_us"]) == [
        "authorization",
        "receive",
        "validation",
        "inference",
        "filtering",
    ]
    assert sum(more["stages_us"].values()) <= more["total_us"] + 5


def test_time_is_rfc_3339_in_utc_with_microseconds(log, call, records):
    with log.record(call()) as record:
        record.described()
    assert len(records()[0]["time"]) == len("2025-01-01T00:00:00.000000Z")
    assert records()[0]["time"].endswith("Z")


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (Denied("no", "no rule allows it"), "refused", "no rule allows it"),
        (InvalidInput("pixels: NaN"), "refused", "pixels: NaN"),
        (Cancelled("gone"), "cancelled", "gone"),
        (GeneratorExit(), "cancelled", ""),
        (CancelledError(), "cancelled", ""),
        (
            InferenceError("predict raised KeyError"),
            "failed",
            "predict raised KeyError",
        ),
        (ValueError("the card number was 4111"), "failed", ""),
        (KeyboardInterrupt(), "failed", ""),
    ],
)
def test_however_a_call_ends_its_record_says_it(
    log, call, records, error, outcome, reason
):
    with pytest.raises(type(error)), log.record(call()):
        raise error
    (line,) = records()
    assert (line["status"], line["status_id"]) == (outcome, 2)
    assert (line["status_code"], line["status_detail"]) == (
        type(error).__name__,
        reason,
    )


def test_a_call_that_ends_without_an_answer_is_unfinished(log, call, records):
    with log.record(call()):
        pass
    assert (records()[0]["status"], records()[0]["status_id"]) == ("unfinished", 0)


def test_an_error_after_release_is_not_read_as_success(log, call, records):
    record = log.record(call())
    record.released(reply())
    with pytest.raises(ValueError), record:
        raise ValueError
    assert records()[0]["status"] == "failed"


def test_a_stream_is_announced_before_its_first_piece_and_closed_after_its_last(
    log, call, records
):
    with log.record(call()) as record:
        record.released(reply(EMAIL=1), last=False)
        assert [line["status"] for line in records()] == ["unfinished"]
        record.released(reply(EMAIL=1), last=False)
        record.stage("inference")
        record.released(None)
    begun, ended = records()
    assert (begun["status"], ended["status"]) == ("unfinished", "released")
    assert begun["api"] == ended["api"]
    assert ended["unmapped"]["bytes_out"] == 16
    assert ended["unmapped"]["findings"] == {"EMAIL": 2}


def test_a_stream_that_its_reader_leaves_is_cancelled(log, call, records):
    def pieces():
        with log.record(call()) as record:
            while True:
                record.released(reply(), last=False)
                yield

    stream = pieces()
    next(stream)
    stream.close()
    assert [line["status"] for line in records()] == ["unfinished", "cancelled"]


@pytest.mark.parametrize("data", [b"123456", memoryview(b"123456"), (b"123", b"456")])
def test_bytes_out_counts_every_form_of_tensor(log, call, records, data):
    with log.record(call()) as record:
        record.released(reply(data))
    assert records()[0]["unmapped"]["bytes_out"] == 6


def test_a_stage_that_comes_again_adds_up(log, call, records):
    with log.record(call()) as record:
        for name in ("inference", "filtering", "inference"):
            record.stage(name)
        record.described()
    assert list(records()[0]["unmapped"]["stages_us"]) == ["inference", "filtering"]


def test_a_record_that_cannot_be_written_is_an_audit_error_that_keeps_its_cause(
    log, call
):
    log.close()
    with pytest.raises(AuditError, match="closed") as raised:  # noqa: SIM117
        with log.record(call()):
            raise Denied("no")
    assert isinstance(raised.value.__context__, Denied)
