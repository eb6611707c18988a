import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve.errors import ConfigError, Withheld
from ztserve.filtering import TextFilter
from ztserve.filtering.text import Recognizer, Span, merged

PUBLIC = "the model's answer could not be checked for personal data"


def find_digits(text):
    return [Span(m.start(), m.end(), "NUMBER", 1.0) for m in re.finditer(r"\d+", text)]


NUMBERS = Recognizer(re.compile(r"\d"), find_digits)
RULES = TextFilter([NUMBERS], max_run_chars=64)


def streamed(rules, chunks):
    stream = rules.stream()
    released = [stream.feed(chunk) for chunk in chunks]
    return "".join([*released, stream.close()]), stream.findings


def test_findings_become_their_kind_and_are_counted():
    filtered = RULES.apply("1 and 22 and\n333")
    assert filtered.text == "<NUMBER> and <NUMBER> and\n<NUMBER>"
    assert filtered.findings == {"NUMBER": 3}


def test_a_clean_text_is_left_alone():
    text = "Nothing to see here.\n\tReally: nothing\r\n"
    assert RULES.apply(text).text == text
    assert RULES.apply("").text == ""
    assert RULES.apply(text).findings == {}


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.lists(st.text("ab1 .,\n\"(x@:'", max_size=9) | st.text(max_size=4), max_size=20)
)
def test_any_chunking_gives_what_the_whole_gives(chunks):
    text = "".join(chunks)
    try:
        whole = RULES.apply(text)
    except Withheld:
        for pieces in (chunks, list(text)):
            with pytest.raises(Withheld, match="without a place to cut"):
                streamed(RULES, pieces)
        return
    for pieces in (chunks, list(text)):
        assert streamed(RULES, pieces) == (whole.text, whole.findings)


def test_words_leave_as_soon_as_they_are_whole():
    stream = RULES.stream()
    assert stream.feed("Hel") == ""
    assert stream.feed("lo wor") == "Hello "
    assert stream.feed("ld 4") == "world "
    assert stream.feed("2") == ""
    assert stream.feed(" is the answer") == "<NUMBER> is the "
    assert stream.close() == "answer"


@pytest.mark.parametrize("chunk", [1, 7, 65, 1000])
def test_a_run_too_long_to_hold_back_is_withheld(chunk):
    text = "then " + "4 " * 33 + "end\n"
    with pytest.raises(Withheld) as caught:
        streamed(RULES, [text[i : i + chunk] for i in range(0, len(text), chunk)])
    assert caught.value.public == PUBLIC
    expected = "more than 64 characters without a place to cut; expected words or lines"
    assert caught.value.reason == f"text: {expected}"


def test_a_run_as_long_as_allowed_passes():
    assert RULES.apply("4" * 63 + "\n").text == "<NUMBER>\n"
    assert RULES.apply("ok " + "4" * 64).text == "ok <NUMBER>"


def test_a_search_that_takes_too_long_is_withheld():
    def slow(text):
        started = time.thread_time()
        while time.thread_time() - started < 0.03:
            pass
        return find_digits(text)

    rules = TextFilter([Recognizer(re.compile(r"\d"), slow)], max_scan_s=0.05)
    assert rules.apply("1 now").text == "<NUMBER> now"
    with pytest.raises(Withheld, match="looking through it took too long") as caught:
        rules.apply("1 now 2 then 3 last")
    assert caught.value.public == PUBLIC


def test_a_search_that_may_have_missed_something_is_withheld():
    def gave_up(text):
        raise TimeoutError("may have skipped a pattern")

    rules = TextFilter([Recognizer(re.compile(r"\d"), gave_up)])
    with pytest.raises(Withheld, match="may have skipped a pattern"):
        rules.apply("room 1")
    assert rules.apply("no room").text == "no room"


def test_a_search_that_fails_is_withheld_and_not_quoted():
    def fails(text):
        raise ValueError(f"cannot read {text}")

    rules = TextFilter([Recognizer(re.compile(r"\d"), fails)])
    with pytest.raises(Withheld) as caught:
        rules.apply("room 1")
    assert caught.value.reason == "text: a search failed"


def test_a_stream_that_was_withheld_stays_shut():
    stream = RULES.stream()
    with pytest.raises(Withheld):
        stream.feed("4" * 65)
    for act in (lambda: stream.feed("ok "), stream.close):
        with pytest.raises(Withheld, match="without a place to cut"):
            act()


def test_a_closed_stream_takes_no_more():
    stream = RULES.stream()
    stream.close()
    with pytest.raises(Withheld, match="it had been closed"):
        stream.feed("more")


def test_overlapping_findings_become_one_of_the_surest_kind():
    spans = [Span(4, 9, "B", 0.5), Span(0, 6, "A", 1.0), Span(9, 12, "C", 0.4)]
    assert merged(spans) == [Span(0, 9, "A", 1.0), Span(9, 12, "C", 0.4)]
    inside = [Span(0, 9, "LONG", 0.5), Span(2, 4, "SHORT", 0.5)]
    assert merged(inside) == [Span(0, 9, "LONG", 0.5)]


def test_a_filter_without_recognizers_is_refused():
    with pytest.raises(ConfigError, match="needs at least one recognizer"):
        TextFilter([])


@pytest.mark.parametrize("limits", [{"max_run_chars": 0}, {"max_scan_s": 0}])
def test_no_limit_can_be_off(limits):
    with pytest.raises(ConfigError, match="must be positive"):
        TextFilter([NUMBERS], **limits)
