import json

import numpy as np
import pytest

from ztserve.errors import InferenceError, InvalidInput
from ztserve.gateway.payload import read_request, write_reply
from ztserve.types import DATATYPES, Request, Tensor


def body(**fields) -> bytes:
    one = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2.5], **fields}
    return json.dumps({"inputs": [one]}).encode()


def refused(data: bytes) -> str:
    with pytest.raises(InvalidInput) as caught:
        read_request(data)
    assert len(caught.value.public) < 500
    return caught.value.public


def test_a_whole_request_is_read():
    request = read_request(
        json.dumps(
            {
                "model_name": "digits",
                "model_version": "3",
                "id": "mine",
                "inputs": json.loads(body())["inputs"],
                "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
                "parameters": {},
            }
        ).encode()
    )
    assert (request.model, request.version, request.id) == ("digits", "3", "mine")
    assert request.outputs == ("y",)
    assert request.inputs == (
        Tensor("x", "FP32", (2,), np.array([1, 2.5], "<f4").tobytes()),
    )
    assert request.size > 0


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("BOOL", [True, False]),
        ("UINT8", [0, 255]),
        ("UINT16", [0, 65535]),
        ("UINT32", [0, 2**32 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("INT8", [-128, 127]),
        ("INT16", [-(2**15), 2**15 - 1]),
        ("INT32", [-(2**31), 2**31 - 1]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("FP16", [1, -65504.0]),
        ("FP32", [0.1, 3.4e38]),
        ("FP64", [0.1, 1.7e308]),
    ],
)
def test_every_datatype_arrives_bit_for_bit_and_comes_back(datatype, data):
    (tensor,) = read_request(body(datatype=datatype, data=data)).inputs
    assert tensor.data == np.array(data, DATATYPES[datatype]).tobytes()
    answer = json.loads(write_reply(Request("m", "", "", ()), [tensor]))
    back = answer["outputs"][0]["data"]
    assert np.array(back, DATATYPES[datatype]).tobytes() == tensor.data


def test_bf16_is_rounded_to_even_and_comes_back():
    data = [1.0, -2.5, 3.0e38, 1.00390625, 1.01171875]
    (tensor,) = read_request(body(datatype="BF16", shape=[5], data=data)).inputs
    bits = np.frombuffer(tensor.data, "<u2").tolist()
    assert bits == [0x3F80, 0xC020, 0x7F62, 0x3F80, 0x3F82]
    answer = json.loads(write_reply(Request("m", "", "", ()), [tensor]))
    assert answer["outputs"][0]["data"][:2] == [1.0, -2.5]


def test_texts_travel_as_strings():
    (tensor,) = read_request(body(datatype="BYTES", data=["é", ""])).inputs
    assert tensor.data == ("é".encode(), b"")
    answer = json.loads(write_reply(Request("m", "", "", ()), [tensor]))
    assert answer["outputs"][0]["data"] == ["é", ""]


def test_data_may_be_nested_as_its_shape_says():
    nested = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    (tensor,) = read_request(body(shape=[2, 2, 2], data=nested)).inputs
    assert np.frombuffer(tensor.data, "<f4").tolist() == list(range(1, 9))
    assert read_request(body(shape=[0, 4], data=[])).inputs[0].data == b""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", "refused"),
        (b"[]", "must be an object"),
        (b"null", "must be an object"),
        (b"{}", "inputs must be a list"),
        (b'{"inputs": []}', "at least one"),
        (b'{"inputs": {}}', "inputs must be a list"),
        (b'{"inputs": [1]}', "inputs[0] must be an object"),
        (b'{"inputs": [], "inputs": []}', "given twice"),
        (b'{"inputs": [], "model": "x"}', "unknown field 'model'"),
        (b'{"inputs": [{}], "id": 5}', "id must be a text"),
        (b'{"inputs": [{}], "id": "' + b"x" * 300 + b'"}', "id must be a text"),
        (b'{"inputs": [{}]}', "inputs[0]: name is missing"),
        (json.dumps({"inputs": [{}] * 300}).encode(), "at most 256"),
        (body()[:-1] + b', "outputs": [{}]}', "outputs[0]: name is missing"),
        (body()[:-1] + b', "outputs": [{"name": "y", "a": 1}]}', "unknown field 'a'"),
        (body()[:-1] + b', "parameters": {"priority": 1}}', "unknown field 'priority'"),
        (
            body()[:-1] + b', "parameters": {"binary_data_output": true}}',
            "binary tensors are not taken",
        ),
        (body(parameters={"binary_data_size": 8}), "binary tensors are not taken"),
        (body(name=""), "name is missing"),
        (body(datatype="FP31"), "input 'x': datatype must be one of BOOL"),
        (body(shape=None), "input 'x': shape must be a list"),
        (body(shape=[]), "shape must be a list"),
        (body(shape=[-1]), "shape must be a list"),
        (body(shape=[True]), "shape must be a list"),
        (body(shape=[2.0]), "shape must be a list"),
        (body(shape=[1] * 17), "shape must be a list"),
        (body(shape=[2**40]), "shape must be a list"),
        (body(shape=[3]), "data has 2 elements, shape [3] has 3"),
        (body(shape=[2**30, 2**30]), "data has 2 elements"),
        (body(data=None), "data must be a list"),
        (body(data="12"), "data must be a list"),
        (body(data=[[1, 2]]), "not nested as shape says"),
        (body(shape=[2, 2], data=[[1, 2], [3]]), "not nested as shape says"),
        (body(shape=[2, 2], data=[[1, 2], 3]), "not nested as shape says"),
        (body(data=[1, [2]]), "takes numbers only"),
        (body(data=["1", "2"]), "takes numbers only"),
        (body(data=[True, False]), "takes numbers only"),
        (body(data=[None, 1]), "takes numbers only"),
        (body(data=[{}, 1]), "takes numbers only"),
        (body(datatype="INT32", data=[1, 2.0]), "whole numbers only"),
        (body(datatype="INT32", data=[1, True]), "whole numbers only"),
        (body(datatype="BOOL", data=[1, 0]), "true and false only"),
        (body(datatype="UINT8", data=[1, 256]), "reaches from 0 to 255"),
        (body(datatype="UINT8", data=[1, -1]), "reaches from 0 to 255"),
        (body(datatype="INT64", data=[1, 2**63]), "reaches from"),
        (body(datatype="FP16", data=[1, 65520.0]), "beyond FP16"),
        (body(datatype="BF16", data=[1, 1e39]), "beyond BF16"),
        (body(data=[1, 1e39]), "beyond FP32"),
        (body(data=[1, 10**400]), "beyond FP32"),
        (body().replace(b"2.5", b"1e999"), "beyond FP32"),
        (body().replace(b"2.5", b"NaN"), "NaN is not JSON"),
        (body().replace(b"2.5", b"-Infinity"), "-Infinity is not JSON"),
        (body().replace(b"2.5", b"1" * 5000), "not JSON"),
        (body(datatype="BYTES", data=["a", 1]), "given as strings"),
        (body(datatype="BYTES", data=["a", "\ud800"]), "surrogate"),
    ],
)
def test_what_is_not_to_the_letter_is_refused_by_name(data, message):
    assert message in refused(data)


def test_a_refusal_does_not_quote_what_a_parser_stumbled_over():
    assert "secret" not in refused(b'{"inputs": secret}')


def test_an_output_that_json_cannot_say_is_withheld():
    request = Request("m", "", "", ())
    nan = Tensor("y", "FP32", (1,), np.array([np.nan], "<f4").tobytes())
    with pytest.raises(InferenceError, match="not finite"):
        write_reply(request, [nan])
    with pytest.raises(InferenceError, match="no text"):
        write_reply(request, [Tensor("y", "BYTES", (1,), (b"\xff",))])


def test_an_answer_names_model_version_and_the_callers_own_id():
    answer = json.loads(write_reply(Request("m", "3", "mine", ()), []))
    assert answer == {
        "model_name": "m",
        "model_version": "3",
        "id": "mine",
        "outputs": [],
    }
