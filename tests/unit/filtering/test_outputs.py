import re

import numpy as np
import pytest

from ztserve.errors import ConfigError, InvalidInput, Withheld
from ztserve.filtering import OutputFilter, TextFilter
from ztserve.filtering.text import Recognizer, Span
from ztserve.types import DATATYPES, Outputs, TensorSpec, TextSpec

SCORES = TensorSpec("scores", "FP32", (-1, 3), low=0, high=1)
LABEL = TensorSpec("label", "INT64", (-1,))
ANSWER = TextSpec("answer", max_chars=30)
PUBLIC = "the model's answer did not meet its declared contract"


def find_digits(text):
    return [Span(m.start(), m.end(), "NUMBER", 1.0) for m in re.finditer(r"\d+", text)]


RULES = TextFilter([Recognizer(re.compile(r"\d"), find_digits)])


def output_filter(*specs, text=RULES, max_bytes=1024):
    return OutputFilter(specs, text=text, max_bytes=max_bytes)


def scores(value=0.5, rows=2):
    return np.full((rows, 3), value, "<f4")


def withheld(rules, **values):
    with pytest.raises(Withheld) as caught:
        rules.release(Outputs(values))
    assert caught.value.public == PUBLIC
    return caught.value.reason


def test_what_was_declared_leaves_in_its_order():
    rules = output_filter(SCORES, ANSWER, LABEL)
    values = {"answer": "room 42", "label": np.array([7]), "scores": scores()}
    reply = rules.release(Outputs(values))
    assert [tensor.name for tensor in reply.outputs] == ["scores", "answer", "label"]
    first, second, third = reply.outputs
    assert (first.datatype, first.shape) == ("FP32", (2, 3))
    assert first.data == scores().tobytes()
    assert (second.datatype, second.shape) == ("BYTES", (1,))
    assert second.data == (b"room <NUMBER>",)
    assert third.data == np.array([7], "<i8").tobytes()
    assert reply.findings == {"NUMBER": 1}


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_leaves_as_it_is(datatype):
    value = np.arange(6).reshape(2, 3).astype(DATATYPES[datatype])
    rules = output_filter(TensorSpec("x", datatype, (-1, 3)), text=None)
    (tensor,) = rules.release(Outputs({"x": value})).outputs
    assert (tensor.datatype, tensor.data) == (datatype, value.tobytes())


def test_what_leaves_is_a_copy_in_c_order():
    value = np.arange(6, dtype="<f4").reshape(3, 2).T / 6
    (tensor,) = output_filter(SCORES).release(Outputs({"scores": value})).outputs
    before = np.ascontiguousarray(value).tobytes()
    value[:] = np.nan
    assert tensor.data == before


def test_the_wanted_outputs_leave_and_all_are_checked():
    rules = output_filter(SCORES, LABEL, ANSWER)
    values = {"scores": scores(), "label": np.array([7]), "answer": "room 42"}
    reply = rules.release(Outputs(values), wanted=("label",))
    assert [tensor.name for tensor in reply.outputs] == ["label"]
    assert reply.findings == {}
    values["scores"] = scores(np.nan)
    with pytest.raises(Withheld, match="element 0 is NaN"):
        rules.release(Outputs(values), wanted=("label",))


@pytest.mark.parametrize("wanted", [("other",), ("label", "label"), ("label", "x")])
def test_only_declared_outputs_can_be_wanted(wanted):
    rules = output_filter(SCORES, LABEL)
    expected = "outputs: expected some of 'scores', 'label', each name once"
    for act in (rules.select, rules.stream):
        with pytest.raises(InvalidInput) as caught:
            act(wanted)
        assert caught.value.public == expected


def test_a_missing_or_undeclared_output_is_withheld():
    rules = output_filter(SCORES, LABEL)
    assert withheld(rules, scores=scores()) == "output 'label': missing"
    values = {"scores": scores(), "label": np.array([1]), "weights": np.ones(9)}
    assert withheld(rules, **values) == "output 'weights': not declared"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (scores(np.nan), "element 0 is NaN; expected 0 to 1"),
        (scores(np.inf), "element 0 is out of range; expected 0 to 1"),
        (scores(1.01), "element 0 is out of range; expected 0 to 1"),
        (scores().astype("f8"), "expected dtype float32, got float64"),
        (scores().astype(">f4"), "expected dtype float32, got >f4"),
        (scores()[0], "expected shape [-1, 3], got [3]"),
        (scores()[:, :2], "expected shape [-1, 3], got [2, 2]"),
        (scores(rows=100), "expected at most 1024 bytes, got 1200"),
        ([[0.5] * 3], "expected an array, got list"),
        ("0.5", "expected an array, got str"),
        (np.ma.masked_invalid(scores(np.nan)), "expected an array, got MaskedArray"),
    ],
)
def test_a_tensor_that_is_not_as_declared_is_withheld(value, reason):
    assert withheld(output_filter(SCORES), scores=value) == f"output 'scores': {reason}"


def test_a_free_dimension_may_be_empty():
    rules = output_filter(TensorSpec("boxes", "FP32", (-1, -1, 4)))
    value = np.zeros((1, 0, 4), "<f4")
    (tensor,) = rules.release(Outputs({"boxes": value})).outputs
    assert (tensor.shape, tensor.data) == ((1, 0, 4), b"")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("x" * 31, "expected at most 30 characters"),
        (b"bytes", "expected a str, got bytes"),
        ("ab\ud800", "character 2 is no Unicode"),
    ],
)
def test_a_text_that_is_not_as_declared_is_withheld(value, reason):
    assert withheld(output_filter(ANSWER), answer=value) == f"output 'answer': {reason}"


def test_bytes_are_bounded_in_all():
    rules = output_filter(SCORES, ANSWER, max_bytes=26)
    rules.release(Outputs({"scores": scores(), "answer": "ok"}))
    reason = withheld(rules, scores=scores(), answer="not")
    assert reason == "output 'answer': expected at most 2 bytes, got 3"


def test_a_text_output_needs_a_filter():
    with pytest.raises(ConfigError, match="'answer' is a text and needs a text filter"):
        output_filter(SCORES, ANSWER, text=None)


@pytest.mark.parametrize("specs", [(), (SCORES, SCORES)])
def test_declarations_are_at_least_one_and_by_distinct_names(specs):
    with pytest.raises(ConfigError, match="expected at least one, each name once"):
        output_filter(*specs)


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_pieces": 0}])
def test_no_limit_can_be_off(limits):
    with pytest.raises(ConfigError, match="must be positive"):
        OutputFilter((SCORES,), text=None, **{"max_bytes": 1, **limits})
