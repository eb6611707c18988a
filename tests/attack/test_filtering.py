"""Outputs that carry out what must not leave.

Each test first shows the attack at work where the control is not, on the way that a
server without it would go.
"""

import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from ztserve.errors import Withheld
from ztserve.filtering import OutputFilter, TextFilter
from ztserve.filtering.text import Recognizer
from ztserve.types import Outputs, TensorSpec, TextSpec

ROOT = Path(__file__).parents[2]
CARD, MAIL, PHONE = "4111 1111 1111 1111", "bob.smith@example.com", "212-555-0123"
NEVER = Recognizer(re.compile(r"(?!)"), lambda text: [])
SCORES = TensorSpec("scores", "FP32", (-1, 3), low=0, high=1)


@pytest.fixture(scope="module")
def rules():
    return TextFilter.default()


def streamed(rules, *chunks):
    stream = rules.stream()
    return "".join(map(stream.feed, chunks)) + stream.close()


# --- text -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("secret", [CARD, MAIL, PHONE])
def test_personal_data_split_over_two_chunks_at_every_place(rules, secret):
    text = f"You can have {secret} if you like."
    leaked = 0
    for at in range(1, len(text)):
        first, second = text[:at], text[at:]
        # Without hold-back: each chunk is filtered, and neither holds a finding.
        leaked += secret in rules.apply(first).text + rules.apply(second).text
        assert secret not in streamed(rules, first, second)
        assert streamed(rules, first, second) == rules.apply(text).text
    assert leaked > 2


def test_personal_data_one_character_at_a_time(rules):
    text = f"Take {CARD}, {MAIL} and {PHONE} ext. 5 or not."
    naive = "".join(rules.apply(character).text for character in text)
    assert naive == text
    expected = "Take <CREDIT_CARD>, <EMAIL_ADDRESS> and <PHONE_NUMBER> or not."
    assert streamed(rules, *text) == expected


@pytest.mark.slow
def test_personal_data_behind_a_prefix_that_makes_a_pattern_time_out(
    rules, monkeypatch
):
    from presidio_analyzer import pattern_recognizer
    from presidio_analyzer.predefined_recognizers import EmailRecognizer

    text = "a-" * 1500 + f"@ or {MAIL}"
    # Without: Presidio logs the time-out, skips the pattern and has found nothing.
    monkeypatch.setattr(pattern_recognizer, "REGEX_TIMEOUT_SECONDS", 0.2)
    assert EmailRecognizer().analyze(text, ["EMAIL_ADDRESS"]) == []
    with pytest.raises(Withheld, match="no recognizer could get through in time"):
        rules.apply(text)
    with pytest.raises(Withheld, match="no recognizer could get through in time"):
        streamed(rules, *text)


@pytest.mark.parametrize("run", ["1/", "a@a.", "1.", "4111 ", "1 - ", "a-", "(", "::a"])
def test_a_run_that_is_never_cut_holds_back_memory_and_time_without_end(run):
    endless = run * 5_000

    def held(max_run_chars):
        shut = TextFilter([NEVER], max_run_chars=max_run_chars).stream()
        shut.feed(endless)
        return len(shut.close())

    # Without: all of it is held back, and then looked through at once.
    assert held(10**9) == len(endless)
    with pytest.raises(Withheld, match="without a place to cut"):
        held(4096)


@pytest.mark.slow
def test_a_text_that_is_slow_everywhere_is_not_looked_through_for_ever():
    from ztserve.filtering.recognizers import recognizers

    text = ("1/" * 2000 + "\n") * 100
    rules = TextFilter(recognizers(), max_scan_s=0.2)
    started = time.thread_time()
    with pytest.raises(Withheld, match="looking through it took too long"):
        rules.apply(text)
    # One search of one segment may run over; a hundred segments may not.
    assert time.thread_time() - started < 5


ASCII_ONLY = re.compile(
    r"\b[a-z.]+@[a-z]+\.[a-z]+|\d{3}[ .-]?\d{3}[ .-]?\d{4}", re.ASCII
)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("jürgen@müller.de", "EMAIL_ADDRESS"),
        ("".join(chr(0x660 + int(d)) for d in "2125550123"), "PHONE_NUMBER"),
        ("\uff0b1 212\u200b555\u200b0123", "PHONE_NUMBER"),
        ("212\u00a0555\u00a00123", "PHONE_NUMBER"),
        ("212\u2013555\u20130123", "PHONE_NUMBER"),
        ("212\u00ad5550123", "PHONE_NUMBER"),
    ],
)
def test_the_same_data_in_characters_that_a_plain_pattern_does_not_know(
    rules, text, kind
):
    assert not ASCII_ONLY.search(text)
    for filtered in (rules.apply(f"at {text} now").text, streamed(rules, *text)):
        assert filtered.removeprefix("at ").removesuffix(" now") == f"<{kind}>"


def test_digits_that_the_pattern_knows_and_the_checksum_does_not(rules):
    import regex
    from presidio_analyzer.predefined_recognizers import CreditCardRecognizer

    newer = regex.findall(r"\d", "".join(map(chr, range(0x10000, 0x20000))))
    unknown = [digit for digit in newer if not digit.isdecimal()]
    if not unknown:
        pytest.skip("this Python knows all digits that regex knows")
    text = "4111 1111 1111 1" + unknown[0] * 3
    # Without: Presidio fails in the middle, and whoever goes on sends all of it.
    with pytest.raises(ValueError, match="invalid literal for int"):
        CreditCardRecognizer().analyze(text, ["CREDIT_CARD"])
    with pytest.raises(Withheld, match="a search failed"):
        rules.apply(text)


def test_findings_and_refusals_never_hold_the_content(rules):
    found = rules.apply(f"{CARD} and {MAIL}").findings
    assert found == {"CREDIT_CARD": 1, "EMAIL_ADDRESS": 1}
    with pytest.raises(Withheld) as caught:
        rules.apply(f"{CARD} " * 1000)
    assert "4111" not in caught.value.public + caught.value.reason


# --- what the model may not give ----------------------------------------------------


def naive(values):
    """What a server without the filter sends."""
    return {name: np.asarray(value).tobytes() for name, value in values.items()}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"scores": np.full((1, 3), np.nan, "<f4")}, "element 0 is NaN"),
        ({"scores": np.full((1, 3), np.inf, "<f4")}, "element 0 is out of range"),
        ({"scores": np.full((1, 3), 1.5, "<f4")}, "element 0 is out of range"),
        ({"scores": np.zeros((1, 3), "<f8")}, "expected dtype float32, got float64"),
        ({"scores": np.zeros((1, 4096), "<f4")}, "expected shape [-1, 3]"),
        (
            {"scores": np.ma.masked_invalid(np.full((1, 3), np.nan, "<f4"))},
            "expected an array, got MaskedArray",
        ),
    ],
)
def test_a_model_that_breaks_its_contract(values, reason):
    assert naive(values)["scores"]
    with pytest.raises(Withheld) as caught:
        OutputFilter((SCORES,), text=None, max_bytes=1024).release(Outputs(values))
    assert caught.value.public == (
        "the model's answer did not meet its declared contract"
    )
    assert caught.value.reason.startswith(f"output 'scores': {reason}")


def test_a_model_that_sends_its_weights_along():
    values = {"scores": np.zeros((1, 3), "<f4"), "weights": np.ones(1000, "<f4")}
    assert len(naive(values)["weights"]) == 4000
    rules = OutputFilter((SCORES,), text=None, max_bytes=10**6)
    for act in (rules.release, rules.stream().feed):
        with pytest.raises(Withheld, match="'weights': not declared"):
            act(Outputs(values))


def test_an_array_that_changes_after_it_was_checked():
    value = np.zeros((1, 3), "<f4")
    # Without a copy: what was checked is not what is sent.
    view = memoryview(value).cast("B")
    rules = OutputFilter((SCORES,), text=None, max_bytes=1024)
    (tensor,) = rules.release(Outputs({"scores": value})).outputs
    value[:] = 777
    assert np.frombuffer(view, "<f4")[0] == 777
    assert np.frombuffer(tensor.data, "<f4").tolist() == [0, 0, 0]


def endless(stream):
    for _ in range(10_000):
        stream.feed(Outputs({"answer": "word "}))


def test_a_stream_that_never_ends(rules):
    spec = TextSpec("answer", max_chars=10**9)
    # Without: every piece is within bounds, and there is always another.
    assert len("word " * 10_000) < spec.max_chars
    for limits in ({"max_bytes": 1000}, {"max_bytes": 10**9, "max_pieces": 1000}):
        stream = OutputFilter((spec,), text=rules, **limits).stream()
        with pytest.raises(Withheld, match=r"at most \d bytes|more pieces"):
            endless(stream)
        with pytest.raises(Withheld, match="fed after its end"):
            stream.close()


def test_personal_data_in_a_stream_of_replies(rules):
    text = f"Mail {MAIL} or pay with {CARD} today."
    answers = OutputFilter((TextSpec("answer"),), text=rules, max_bytes=1024)
    stream = answers.stream()
    replies = [stream.feed(Outputs({"answer": c})) for c in text] + [stream.close()]
    sent = b"".join(reply.outputs[0].data[0] for reply in replies if reply)
    assert sent == b"Mail <EMAIL_ADDRESS> or pay with <CREDIT_CARD> today."
    whole = answers.release(Outputs({"answer": text}))
    assert whole.outputs[0].data == (sent,)
    told = [reply.findings for reply in replies if reply and reply.findings]
    assert told == [{"EMAIL_ADDRESS": 1}, {"CREDIT_CARD": 1}]


# --- what the filter itself may not do ------------------------------------------------

WATCH = """
    import json, os, socket, sys, tempfile

    os.environ["TLDEXTRACT_CACHE"] = tempfile.mkdtemp()
    events = []

    def watch(event, args):
        if event.startswith("socket."):
            events.append([event, repr(args)])
            if event not in ("socket.__new__", "socket.bind"):
                raise OSError("no way out")

    sys.addaudithook(watch)
"""
OURS = """
    from ztserve.filtering import TextFilter

    rules = TextFilter.default()
    assert rules.apply("bob@example.com, 212-555-0123").text.startswith("<EMAIL")
"""
PRESIDIOS = """
    import logging
    logging.disable()
    from presidio_analyzer.predefined_recognizers import EmailRecognizer

    EmailRecognizer().analyze("bob@example.com", ["EMAIL_ADDRESS"])
"""


def watched(code):
    """Run `code` under an audit hook; return what it did with sockets."""
    script = (
        textwrap.dedent(WATCH) + textwrap.dedent(code) + "\nprint(json.dumps(events))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_an_address_in_the_text_that_makes_the_filter_call_out():
    # Without: the first e-mail address makes Presidio look up the public suffix list.
    assert any(event == "socket.getaddrinfo" for event, _ in watched(PRESIDIOS))
    # urllib3 (imported, not used) tries once whether it can bind ::1; nothing else.
    done = [event for event in watched(OURS) if event[0] != "socket.__new__"]
    assert [event for event, _ in done] in ([], ["socket.bind"])
    assert all(args.endswith("('::1', 0))") for _, args in done)
