from datetime import UTC, datetime

import pytest
from asn1crypto import core
from hypothesis import given
from hypothesis import strategies as some

from ztserve.artifacts.statements import der
from ztserve.artifacts.statements.strict import Malformed


@given(some.integers(-(1 << 200), 1 << 200))
def test_integers_are_those_of_asn1crypto(value):
    assert der.integer(value) == core.Integer(value).dump()
    assert der.read(der.integer(value), "x").integer("x") == value


@pytest.mark.slow
@given(
    some.integers(0, 2),
    some.integers(0, 39),
    some.lists(some.integers(0, 1 << 64), max_size=8),
)
def test_object_identifiers_are_those_of_asn1crypto(first, second, others):
    dotted = ".".join(map(str, (first, second, *others)))
    if not others:
        dotted += ".1"
    assert der.oid(dotted) == core.ObjectIdentifier(dotted).dump()
    assert der.read(der.oid(dotted), "x").oid("x") == dotted


@given(some.binary(max_size=300))
def test_octets_are_those_of_asn1crypto(content):
    raw = der.element(der.OCTETS, content)
    assert raw == core.OctetString(content).dump()
    assert der.read(raw, "x").expect(der.OCTETS, "x") == content


@given(some.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw):
    try:
        elements = der.read_all(raw, "x")
    except Malformed:
        return
    assert b"".join(each.raw for each in elements) == raw
    assert b"".join(der.element(each.tag, each.content) for each in elements) == raw


@pytest.mark.slow
@given(some.datetimes(datetime(1000, 1, 1), timezones=some.just(UTC)))
def test_times_are_read_as_written(moment):
    raw = der.time(moment)
    assert der.read(raw, "x").time("x") == moment.replace(microsecond=0)


@pytest.mark.parametrize(
    ("text", "microsecond"),
    [("20260102030405Z", 0), ("20260102030405.5Z", 500_000)],
)
def test_a_time_may_have_a_fraction(text, microsecond):
    raw = der.element(der.GENERALIZED_TIME, text.encode())
    expected = datetime(2026, 1, 2, 3, 4, 5, microsecond, tzinfo=UTC)
    assert der.read(raw, "x").time("x") == expected


@pytest.mark.parametrize(
    "text",
    [
        "20260102030405",
        "20260102030405+0100",
        "202601020304Z",
        "20260102030405.Z",
        "20260102030405.50Z",
        "20261302030405Z",
        "2026010203040xZ",
        "",
    ],
)
def test_a_time_of_another_form_is_refused(text):
    raw = der.element(der.GENERALIZED_TIME, text.encode())
    with pytest.raises(Malformed, match=r"x: .*time"):
        der.read(raw, "x").time("x")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 DER elements, expected one"),
        (b"\x04", "cut short"),
        (b"\x04\x02a", "cut short"),
        (b"\x04\x84\xff\xff\xff\xff", "cut short"),
        (b"\x04\x85\x01\x00\x00\x00\x00", "cut short"),
        (b"\x04\x80a\x00\x00", "a length that is not DER"),
        (b"\x04\x81\x01a", "a length that is not DER"),
        (b"\x04\x82\x00\x81" + b"a" * 129, "a length that is not DER"),
        (b"\x1f\x01\x00", "a DER tag of several bytes"),
        (b"\x04\x00\x04\x00", "2 DER elements, expected one"),
        (b"\x05\x00" * 257, "more than 256 DER elements"),
    ],
)
def test_what_is_not_der_is_refused(raw, message):
    with pytest.raises(Malformed, match=f"x: {message}"):
        der.read(raw, "x")


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"\xff\xff"])
def test_an_integer_that_is_not_the_shortest_is_refused(content):
    with pytest.raises(Malformed, match="x: not an integer in DER"):
        der.read(der.element(der.INTEGER, content), "x").integer("x")


@pytest.mark.parametrize("content", [b"", b"\x80\x01", b"\x2a\x80\x01", b"\x2a\x81"])
def test_an_object_identifier_that_is_not_der_is_refused(content):
    with pytest.raises(Malformed, match="x: not an object identifier in DER"):
        der.read(der.element(der.OID, content), "x").oid("x")
    huge = der.element(der.OID, b"\xff" * 60 + b"\x01")
    with pytest.raises(Malformed, match="x: not an object identifier in DER"):
        der.read(huge, "x").oid("x")


def test_elements_are_taken_in_their_order():
    items = der.read(der.sequence(der.integer(1), der.oid("1.2.3")), "x").items(
        der.SEQUENCE, "x"
    )
    assert items.optional(der.OID) is None
    assert items.next().integer("x") == 1
    with pytest.raises(Malformed, match="x: has more than it should"):
        items.end()
    assert [each.oid("x") for each in items.rest()] == ["1.2.3"]
    items.end()
    with pytest.raises(Malformed, match="x: ends too early"):
        items.next()
    with pytest.raises(Malformed, match="x: DER tag 0x30, expected 0x31"):
        der.read(der.sequence(), "x").items(der.SET, "x")
