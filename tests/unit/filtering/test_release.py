import re

import numpy as np
import pytest

from ztserve.errors import Withheld
from ztserve.filtering import OutputFilter, TextFilter
from ztserve.filtering.text import Recognizer, Span
from ztserve.types import Outputs, TensorSpec, TextSpec

SCORE = TensorSpec("score", "FP32", (1,), low=0, high=1)
ANSWER = TextSpec("answer", max_chars=40)


def find_digits(text):
    return [Span(m.start(), m.end(), "NUMBER", 1.0) for m in re.finditer(r"\d+", text)]


RULES = TextFilter([Recognizer(re.compile(r"\d"), find_digits)])


def stream(*specs, wanted=(), max_bytes=1024, max_pieces=100):
    rules = OutputFilter(specs, text=RULES, max_bytes=max_bytes, max_pieces=max_pieces)
    return rules.stream(wanted)


def feed(release, **values):
    return told(release.feed(Outputs(values)))


def told(reply):
    if reply is None:
        return None
    return [tensor.data for tensor in reply.outputs], dict(reply.findings)


def score(value=0.5):
    return np.array([value], "<f4")


def reason(act):
    with pytest.raises(Withheld) as caught:
        act()
    return caught.value.reason


def test_text_leaves_as_words_become_whole_and_findings_with_them():
    release = stream(ANSWER)
    assert feed(release, answer="Room") is None
    assert feed(release, answer=" 4") == ([(b"Room ",)], {})
    assert feed(release, answer="2 is") is None
    assert feed(release, answer=" free") == ([(b"<NUMBER> is ",)], {"NUMBER": 1})
    assert told(release.close()) == ([(b"free",)], {})


def test_tensors_leave_as_they_come():
    release = stream(SCORE, ANSWER)
    assert feed(release, score=score(), answer="a b") == (
        [score().tobytes(), (b"a ",)],
        {},
    )
    assert feed(release, score=score(1)) == ([score(1).tobytes()], {})
    assert told(release.close()) == ([(b"b",)], {})


def test_only_the_wanted_leave_and_all_are_checked():
    release = stream(SCORE, ANSWER, wanted=("score",))
    assert feed(release, answer="room 1 now ") is None
    assert feed(release, score=score()) == ([score().tobytes()], {})
    expected = "output 'score': element 0 is out of range; expected 0 to 1"
    assert reason(lambda: feed(release, answer="x", score=score(2))) == expected


def test_a_tensor_that_never_came_is_missed_at_the_end():
    release = stream(SCORE, ANSWER)
    feed(release, answer="all there is")
    assert reason(release.close) == "output 'score': missing: it never came"


def test_an_empty_stream_of_text_is_an_empty_text():
    assert stream(ANSWER).close() is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"weights": "x"}, "output 'weights': not declared"),
        ({"score": "x"}, "output 'score': expected an array, got str"),
        ({"score": score(np.nan)}, "output 'score': element 0 is NaN"),
        ({"answer": b"x"}, "output 'answer': expected a str, got bytes"),
        ({"answer": "\ud800\n"}, "output 'answer': character 0 is no Unicode"),
        ({"answer": "x" * 41}, "output 'answer': expected at most 40 characters"),
    ],
)
def test_a_piece_that_is_not_as_declared_ends_the_stream(values, expected):
    release = stream(SCORE, ANSWER)
    assert reason(lambda: feed(release, **values)).startswith(expected)
    assert reason(lambda: feed(release, answer="x")) == "stream: fed after its end"
    assert reason(release.close) == "stream: fed after its end"


def test_the_length_of_a_text_is_that_of_all_its_pieces():
    release = stream(ANSWER)
    for _ in range(20):
        feed(release, answer="a ")
    expected = "output 'answer': expected at most 40 characters"
    assert reason(lambda: feed(release, answer="b")) == expected


def test_bytes_are_bounded_over_all_pieces():
    release = stream(SCORE, max_bytes=8)
    feed(release, score=score())
    feed(release, score=score())
    expected = "output 'score': expected at most 0 bytes, got 4"
    assert reason(lambda: feed(release, score=score())) == expected


def test_pieces_are_bounded_in_number():
    release = stream(ANSWER, max_pieces=2)
    feed(release, answer="")
    feed(release, answer="")
    expected = "stream: more pieces than max_pieces allows"
    assert reason(lambda: feed(release, answer="")) == expected


def test_a_closed_stream_takes_no_more():
    release = stream(ANSWER)
    release.close()
    assert reason(lambda: feed(release, answer="x")) == "stream: fed after its end"
