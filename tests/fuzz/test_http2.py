"""The fuzz itself: good conversations, a third opinion that sees, a short run."""

from random import Random

import pytest
from hpack.table import HeaderTable

from tests.fuzz import http2, http2_fields
from tests.fuzz.http2_classes import CLASSES, table
from tests.fuzz.http2_inputs import BOUNDS, Input, Inputs, cut
from ztserve.transport.http2 import frames
from ztserve.transport.http2.connection import Connection
from ztserve.transport.http2.intake import Intake
from ztserve.transport.http2.outbox import Outbox
from ztserve.transport.http2.streams import Stream, Streams

GOOD = {
    "request": http2_fields.REQUESTS,
    "response": http2_fields.RESPONSES,
    "trailers": http2_fields.TRAILERS,
}


@pytest.mark.parametrize("kind", GOOD)
def test_the_lists_that_are_broken_are_good(kind):
    for listed in GOOD[kind]:
        assert not http2_fields.why_malformed(listed, kind)


POST, RESPONSE = http2_fields.REQUESTS[0], http2_fields.RESPONSES[0]
FORBIDDEN = [
    ("request", POST[1:]),
    ("request", (*POST, POST[0])),
    ("request", (*POST[1:], POST[0])),
    ("request", (*POST, (b":status", b"200"))),
    ("request", (*POST, (b"X-A", b"1"))),
    ("request", (*POST, (b"x-a", b"1\n"))),
    ("request", (*POST, (b"x-a", b" 1"))),
    ("request", (*POST, (b"x-a", b"\x7f"))),
    ("request", (*POST, (b"connection", b"close"))),
    ("request", (*POST, (b"te", b"gzip"))),
    ("request", (*POST, (b"host", b"b.example"))),
    ("request", (*POST, (b"host", b"127.0.0.1:1"), (b"host", b"127.0.0.1:1"))),
    ("request", (*POST, (b"content-length", b"+1"))),
    ("request", (*POST, (b"content-length", b"1"), (b"content-length", b"2"))),
    ("request", ((b":method", b"CONNECT"), *POST[1:])),
    ("response", RESPONSE[1:]),
    ("response", ((b":status", b"101"), *RESPONSE[1:])),
    ("trailers", RESPONSE),
]


@pytest.mark.parametrize(("kind", "listed"), FORBIDDEN)
def test_the_third_opinion_sees_what_is_malformed(kind, listed):
    assert http2_fields.why_malformed(listed, kind)


def test_bytes_are_cut_after_the_preface_and_each_frame():
    wire = (
        frames.PREFACE + frames.settings({}) + frames.rst_stream(1, 8) + b"\0\0\x09\0"
    )
    steps = cut(wire, preface=True)
    assert steps[:2] == [frames.PREFACE, frames.settings({})]
    assert [len(step) for step in steps[2:]] == [13, 4]
    assert b"".join(steps) == wire


def test_what_breaks_conversations_is_made_alike_by_one_seed():
    one, other = Inputs(Random(3)), Inputs(Random(3))
    for _ in range(50):
        assert one.make() == other.make()


def test_the_table_has_each_class_and_is_short():
    lines = table(http2.Tally(0).classes, 0).splitlines()
    assert len(lines) <= 72
    assert len(lines) == len(CLASSES) + 6


@pytest.mark.slow
def test_a_short_run_finds_nothing():
    tally = http2.run(3000, seed=1)
    assert tally.findings == []
    assert tally.inputs.total() == 3000
    assert tally.inputs["client"] > 300
    assert tally.ended["not"] > 300
    assert len(tally.classes) > 20


def nothing(*_, **__):
    return None


def beyond_the_window(self, half, data, *, end):
    half.ends = end
    self._send(half, data, end=end)


CONTROLS = [
    ("fields", "ztserve.transport.http2.fields._check", nothing),
    ("frames", "ztserve.transport.http2.intake._check", nothing),
    ("late frames", Streams, "check_late", nothing),
    ("idle streams", Streams, "check_begun", nothing),
    ("content-length", Stream, "take", nothing),
    ("the windows of the peer", Outbox, "data", beyond_the_window),
    ("pushes", Connection, "_on_forbidden", nothing),
    ("settings", Connection, "_on_setting", nothing),
    ("the size of blocks", Intake, "_check_size", nothing),
    ("padding", "ztserve.transport.http2.connection.unpadded", bytes),
    ("a changed table", "ztserve.transport.http2.fields._Table.add", HeaderTable.add),
    ("the end of a stream", Streams, "end_theirs", nothing),
    ("an overflow", Outbox, "widen", nothing),
    ("unread blocks", "ztserve.transport.http2.fields.FieldReader.skip", nothing),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "control",
    [control[1:] for control in CONTROLS],
    ids=[name for name, *_ in CONTROLS],
)
def test_a_short_run_finds_what_is_broken(control, monkeypatch):
    monkeypatch.setattr(*control)
    assert http2.run(3000, seed=1, findings=1).findings


def test_a_mistake_of_ours_is_found(monkeypatch):
    fuzz = http2.Fuzz(0)
    head = b"\0\0\1\1\5\0\0\0\1\x82"  # :path is missing: it is refused
    steps = [frames.PREFACE, frames.settings({}), head]
    given = Input(client=False, bounds=BOUNDS[0], requests=[], steps=steps, seed=0)
    fuzz.judge(given)
    assert not fuzz.tally.findings
    monkeypatch.setattr("ztserve.transport.http2.fields._sorted", nothing)
    fuzz.judge(given)
    assert "raised TypeError" in fuzz.tally.findings[0]["why"]


def test_what_costs_too_much_is_found(monkeypatch):
    monkeypatch.setattr(http2, "LIMIT_S", 0.0)
    assert "took" in http2.run(1, seed=0).findings[0]["why"]


def test_what_is_held_beyond_the_bounds_is_found():
    connection = Connection(client=False)
    given = Input(client=False, bounds=BOUNDS[0], requests=[], steps=[], seed=0)
    assert not http2.unbounded(connection, given)
    connection._intake._rest += bytes(BOUNDS[0].max_frame_bytes + 10)
    assert "buffer" in http2.unbounded(connection, given)
