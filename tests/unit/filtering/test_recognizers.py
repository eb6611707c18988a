import random
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ztserve.errors import ConfigError, Withheld
from ztserve.filtering import TextFilter

EXAMPLES = {
    "EMAIL_ADDRESS": ["bob.smith@example.com", "a+b@x.co.uk", "jürgen@müller.de"],
    "CREDIT_CARD": ["4111 1111 1111 1111", "5500-0000-0000-0004"],
    "US_SSN": ["219-09-9999", "219 09 9999"],
    "US_ITIN": ["912-70-1234"],
    "IBAN_CODE": ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000"],
    "PHONE_NUMBER": ["212-555-0123", "+44 20 7946 0958", "(212) 555-0123 ext. 5"],
    "IP_ADDRESS": ["10.1.2.3", "fe80::1", "::ffff:1.2.3.4"],
    "MAC_ADDRESS": ["aa:bb:cc:dd:ee:ff", "abcd.ef01.2345"],
    "CRYPTO": ["1BvBMSEYstWetqTFn5Au4m4GFg7xJaNVN2"],
}


@pytest.mark.parametrize(
    ("kind", "personal"),
    [(kind, personal) for kind, several in EXAMPLES.items() for personal in several],
)
def test_each_kind_is_found_in_a_sentence_and_told_by_kind_only(
    default_filter, kind, personal
):
    filtered = default_filter.apply(f"It is {personal} for now.")
    assert filtered.text == f"It is <{kind}> for now."
    assert filtered.findings == {kind: 1}


@pytest.mark.parametrize(
    "text",
    [
        "In 2024 we sold 1,234 units at 3.14 each, 10% more than in 2023.",
        "Version 1.2.3 was released on 2012-01-02 at 08:00.",
        "Names such as Alice Smith of Paris need a model.",
        "See http://example.com/page?id=12 and `x = a[1:2]`.",
        "Account 123456789012 is eleven plus one digits.",
    ],
)
def test_what_is_not_personal_is_left_alone(default_filter, text):
    assert default_filter.apply(text).text == text


@pytest.mark.slow
def test_findings_equal_those_of_plain_presidio(default_filter, plain_presidio, corpus):
    for text in corpus(seed=1, count=60):
        assert default_filter.apply(text).text == plain_presidio(text)


@pytest.mark.slow
def test_findings_equal_those_of_plain_presidio_on_many_texts(
    default_filter, plain_presidio, corpus
):
    found = 0
    for text in corpus(seed=2, count=400):
        filtered = default_filter.apply(text)
        assert filtered.text == plain_presidio(text)
        found += sum(filtered.findings.values())
    assert found > 1000


@pytest.mark.slow
def test_any_chunking_gives_what_the_whole_gives(default_filter, corpus):
    chance = random.Random(3)
    for text in corpus(seed=3, count=40):
        whole = default_filter.apply(text)
        for most in (1, 9, 200):
            stream, released, at = default_filter.stream(), "", 0
            while at < len(text):
                size = chance.randint(1, most)
                released += stream.feed(text[at : at + size])
                at += size
            assert released + stream.close() == whole.text
            assert stream.findings == whole.findings


@pytest.mark.slow
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.text("a1@. +-:()x4\n", max_size=12), max_size=12))
def test_any_chunking_of_any_text_gives_the_same(default_filter, chunks):
    whole = default_filter.apply("".join(chunks))
    stream = default_filter.stream()
    released = "".join(map(stream.feed, chunks)) + stream.close()
    assert (released, stream.findings) == (whole.text, whole.findings)


def test_a_search_in_which_presidio_skips_a_pattern_is_withheld(
    default_filter, monkeypatch
):
    import presidio_analyzer.pattern_recognizer as presidio

    from ztserve.filtering import recognizers

    slow = "a-" * 150 + "@ or bob@example.com"
    assert "<EMAIL_ADDRESS>" in default_filter.apply(slow).text
    monkeypatch.setattr(presidio, "REGEX_TIMEOUT_SECONDS", 1e-4)
    monkeypatch.setattr(recognizers, "REGEX_TIMEOUT_SECONDS", 1e-4)
    with pytest.raises(Withheld, match="may have skipped a pattern"):
        default_filter.apply(slow)


def test_without_presidio_the_default_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "ztserve.filtering.recognizers", raising=False)
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ConfigError, match=r"pip install 'ztserve\[text\]'"):
        TextFilter.default()
