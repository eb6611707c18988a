import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve.errors import InvalidInput
from ztserve.types import Tensor, TextSpec
from ztserve.validation.texts import TextCheck

CHECK = TextCheck(TextSpec("prompt", max_chars=10))


def text(raw, shape=(1,)):
    return Tensor("prompt", "BYTES", shape, (raw,))


def refused(given):
    with pytest.raises(InvalidInput) as caught:
        CHECK.read(given)
    assert caught.value.public.startswith("input 'prompt': ")
    return caught.value.public.removeprefix("input 'prompt': ")


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_text_is_one_string_of_bytes(shape):
    assert CHECK.read(text("naïve 🙂\t\r\n".encode(), shape)) == "naïve 🙂\t\r\n"


@pytest.mark.parametrize(
    "given",
    [
        text(b"a", ()),
        text(b"a", (2,)),
        text(b"a", (1, 1, 1)),
        Tensor("prompt", "FP32", (1,), b"\0\0\0\0"),
    ],
)
def test_anything_but_one_text_is_refused(given):
    assert refused(given) == "expected one text (BYTES of shape [1])"


@pytest.mark.parametrize("data", [b"abc", (), (b"a", b"b"), memoryview(b"a")])
def test_the_contents_are_exactly_one_string(data):
    given = Tensor("prompt", "BYTES", (1,), data)
    assert refused(given) == "expected exactly one string of bytes"


@pytest.mark.parametrize(
    ("raw", "at"),
    [
        (b"ab\xff", 2),
        (b"\xc0\x80", 0),  # NUL, overlong
        (b"a\xed\xa0\x80", 1),  # a lone surrogate
        (b"\xf4\x90\x80\x80", 0),  # beyond U+10FFFF
        (b"abc\xe2\x82", 3),  # cut short
    ],
)
def test_only_strict_utf8_is_text(raw, at):
    assert refused(text(raw)) == f"byte {at} is not UTF-8; expected UTF-8 text"


@pytest.mark.parametrize("code", [*range(9), 11, 12, *range(14, 32), 127])
def test_control_characters_are_refused_by_place(code):
    public = refused(text(b"ab" + bytes([code])))
    assert public == "character 2 is a control character; expected text"


def test_length_counts_characters():
    assert len(CHECK.read(text(("ü" * 10).encode()))) == 10
    assert refused(text(b"a" * 11)) == "expected at most 10 characters, got 11"
    assert refused(text(b"a" * 41)) == "expected at most 10 characters"


@settings(deadline=None)
@given(st.binary(max_size=48))
def test_it_returns_text_within_its_bounds_or_refuses(raw):
    try:
        got = CHECK.read(text(raw))
    except InvalidInput:
        return
    assert got.encode() == raw
    assert len(got) <= 10
    assert "\0" not in got
