import time
from itertools import pairwise

import pytest

from ztserve.filtering.segments import last_cut, last_word, may_cut, suspects


def cuts(text):
    """Every cut of `text`, by asking for the last one again and again."""
    found, end = [], len(text)
    while end and (cut := last_cut(text, 0, end, 0)):
        found.append(cut)
        end = cut - 1
    return found[::-1]


def pieces(text):
    bounds = [0, *cuts(text), len(text)]
    return [text[a:b] for a, b in pairwise(bounds) if a != b]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("call me at once", ["call ", "me ", "at ", "once"]),
        ("end. Then USA, NATO: go ", ["end. ", "Then ", "USA, ", "NATO: ", "go "]),
        ("one\n2\n3", ["one\n", "2\n", "3"]),
        ('{"id":1}', ['{"', 'id"', ":1}"]),
        ("你好\uff0c世界。再见", ["你好\uff0c", "世界。", "再见"]),
        # What may hold spaces stays together:
        ("4111 1111 1111 1111 is", ["4111 1111 1111 1111 is"]),
        ("+1 212 555 0123 x 45 or", ["+1 212 555 0123 x 45 or"]),
        ("212 ext. 45 extension 6", ["212 ext. 45 extension 6"]),
        ("GB82 WEST 1234 and so on", ["GB82 WEST 1234 and so on"]),
        ("gb82 west, then", ["gb82 west, ", "then"]),
        ("(a +b [c d", ["(a +b [c d"]),
        ("A B C", ["A B C"]),
    ],
)
def test_a_text_is_cut_where_nothing_personal_can_go_on(text, expected):
    assert pieces(text) == expected


def test_a_cut_depends_only_on_what_comes_before_it():
    text = 'Ring (212) 555 0123 ext 4, gb82 west 1234; "x" 你好。ok\n' * 3
    whole = cuts(text)
    for end in range(len(text)):
        assert cuts(text[:end]) == [cut for cut in whole if cut <= end]


def test_a_cut_ends_only_where_one_may_and_at_words():
    text = 'Ring (212) 555 0123 ext 4, "x" 你好。ok\nthen 5 more'
    for cut in cuts(text):
        assert may_cut(text[cut - 1])
        assert last_word(text[:cut], 0) == cut


def test_suspects_are_the_segments_that_hold_a_trigger():
    text = "Nothing here at all. Mail a@b.org now, or 10 of these. Bye now"
    found = [text[start:end] for start, end in suspects(text)]
    assert found == ["a@b.org ", "10 of "]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["a" * 100_000, "a(" * 50_000, "AB " * 30_000, "1 " * 50_000, "ab12 go " * 9_000],
)
def test_looking_for_cuts_takes_time_in_proportion(text):
    started = time.thread_time()
    list(suspects(text))
    last_cut(text, 0, len(text), 0)
    assert time.thread_time() - started < 2
