import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve.errors import InvalidInput, ZTServeError
from ztserve.transport import codec, values
from ztserve.transport.v1 import inference_pb2 as pb
from ztserve.types import DATATYPES, Reply, Tensor


@pytest.mark.parametrize("datatype", [d for d in DATATYPES if d != "BF16"])
def test_an_array_keeps_its_own_datatype(datatype: str) -> None:
    array = np.ones((2, 3), DATATYPES[datatype])
    one = values.tensor("x", array)
    assert (one.datatype, one.shape, one.data) == (datatype, (2, 3), array.tobytes())


def test_lists_of_unequal_lengths_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="input 'x': nested lists must have equal"):
        values.tensor("x", [[1, 2, 3], [1, 2]])


def test_big_endian_and_strided_arrays_are_put_in_order() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    one = values.tensor("x", array)
    assert one.datatype == "INT32"
    assert np.frombuffer(one.data, "<i4").reshape(3, 2).tolist() == array.tolist()


@pytest.mark.parametrize(
    ("value", "datatype"),
    [([1.5], "FP32"), ([[1, 2]], "INT64"), ([True], "BOOL"), (2.5, "FP32")],
)
def test_lists_take_the_usual_datatype(value, datatype: str) -> None:
    assert values.tensor("x", value).datatype == datatype


def test_a_given_datatype_wins() -> None:
    assert values.tensor("x", [1, 2], "FP16").data == np.array([1, 2], "<f2").tobytes()
    bits = np.array([0x3F80], "<u2")
    assert values.tensor("x", bits, "BF16").datatype == "BF16"


def test_texts_become_bytes() -> None:
    assert values.tensor("t", "grüße") == Tensor(
        "t", "BYTES", (1,), ("grüße".encode(),)
    )
    assert values.tensor("t", b"x").data == (b"x",)
    assert values.tensor("t", [["a"], ["b"]]) == Tensor(
        "t", "BYTES", (2, 1), (b"a", b"b")
    )


@pytest.mark.parametrize(
    "value", [[object()], [1, "a", None], np.zeros(1, "c8"), [None]]
)
def test_what_no_datatype_can_hold_is_refused_by_name(value) -> None:
    with pytest.raises(InvalidInput, match="input 'x'"):
        values.tensor("x", value)


def test_an_unknown_datatype_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'FP8' is none of BOOL"):
        values.tensor("x", [1.0], "FP8")


def test_a_request_is_what_the_server_decodes() -> None:
    request = values.request({"x": [[1.0]], "t": "hi"}, model="m", id="me")
    decoded = codec.request(values.message(request))
    assert (decoded.model, decoded.id) == ("m", "me")
    assert decoded.inputs == request.inputs


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=20), min_size=2, max_size=5))
def test_answers_come_back_as_they_were_sent(strings: list[bytes]) -> None:
    outputs = (
        Tensor("p", "INT16", (2,), np.array([1, -1], "<i2").tobytes()),
        Tensor("t", "BYTES", (1,), ("grüße".encode(),)),
        Tensor("s", "BYTES", (len(strings),), tuple(strings)),
    )
    answer = codec.reply(Reply(outputs), "m", "", "")
    back = values.values(values.tensors(pb.ModelInferResponse.FromString(answer)))
    assert back["p"].tolist() == [1, -1]
    assert back["t"] == "grüße"
    assert back["s"].tolist() == strings


def broken(**wrong) -> pb.ModelInferResponse:
    m = pb.ModelInferResponse()
    chosen = {"datatype": "FP32", "shape": [2], "raw": b"12345678"} | wrong
    m.outputs.add(name="p", datatype=chosen["datatype"], shape=chosen["shape"])
    if chosen["raw"] is not None:
        m.raw_output_contents.append(chosen["raw"])
    return m


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"raw": b"123"}, "3 bytes for FP32"),
        ({"raw": None}, "0 raw contents for 1 outputs"),
        ({"datatype": "FP8"}, "8 bytes for FP8"),
        ({"shape": [-2]}, "has the shape"),
        ({"shape": [1 << 40]}, "8 bytes for FP32"),
        ({"datatype": "BYTES", "raw": b""}, "0 strings"),
    ],
)
def test_a_malformed_answer_is_refused(wrong, match: str) -> None:
    with pytest.raises(ZTServeError, match=f"malformed: .*{match}"):
        values.tensors(broken(**wrong))


def test_an_example_has_zeros_and_a_text() -> None:
    made = values.example((("x", "FP32", (-1, 4)), ("t", "BYTES", (1,))))
    assert made["x"].shape == (1, 4)
    assert made["t"] == "hello"
