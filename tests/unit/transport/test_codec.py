import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve.errors import InvalidInput
from ztserve.transport import codec
from ztserve.transport.v1 import inference_pb2 as pb
from ztserve.types import DATATYPES, Description, Reply, Tensor, TensorSpec, TextSpec

TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-32768, 32767]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 65535]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [0.5, -2.0]),
    "FP64": ("fp64_contents", [0.5, -2.0]),
}


def typed(datatype: str, **contents) -> bytes:
    m = pb.ModelInferRequest(model_name="m")
    one = m.inputs.add(name="x", datatype=datatype, shape=[2])
    for field, values in contents.items():
        getattr(one.contents, field).extend(values)
    return m.SerializeToString()


def raw(datatype: str, data: bytes, shape=(2,)) -> bytes:
    m = pb.ModelInferRequest(model_name="m", model_version="1", id="me")
    m.inputs.add(name="x", datatype=datatype, shape=shape)
    m.raw_input_contents.append(data)
    m.outputs.add(name="y")
    return m.SerializeToString()


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_become_little_endian_bytes(datatype: str) -> None:
    field, values = TYPED[datatype]
    [tensor] = codec.request(typed(datatype, **{field: values})).inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", datatype, (2,))
    assert np.frombuffer(tensor.data, DATATYPES[datatype]).tolist() == values


@pytest.mark.parametrize("datatype", DATATYPES)
def test_raw_contents_pass_unchanged(datatype: str) -> None:
    data = np.ones(2, DATATYPES[datatype]).tobytes()
    message = raw(datatype, data)
    request = codec.request(message)
    assert (request.model, request.version, request.id) == ("m", "1", "me")
    assert request.outputs == ("y",)
    assert request.size == len(message)
    assert request.inputs == (Tensor("x", datatype, (2,), data),)


def test_strings_come_raw_and_typed_alike() -> None:
    data = (b"", "grüße".encode(), b"\x00\xff")
    assert codec.request(raw("BYTES", codec.raw(data))).inputs[0].data == data
    one = codec.request(typed("BYTES", bytes_contents=data)).inputs[0]
    assert one.data == data


def test_a_message_that_is_no_protobuf_is_refused() -> None:
    with pytest.raises(InvalidInput, match="not a valid ModelInferRequest") as caught:
        codec.request(b"\xff\xff\xff")
    assert caught.value.public.startswith("the message is not a valid")


def test_both_kinds_of_contents_at_once_are_refused() -> None:
    m = pb.ModelInferRequest.FromString(typed("FP32", fp32_contents=[1.0]))
    m.raw_input_contents.append(b"1234")
    with pytest.raises(InvalidInput, match="input 'x' has both"):
        codec.request(m.SerializeToString())


def test_raw_contents_for_some_inputs_only_are_refused() -> None:
    m = pb.ModelInferRequest.FromString(raw("FP32", b"1234"))
    m.inputs.add(name="z", datatype="FP32", shape=[1])
    with pytest.raises(InvalidInput, match="1 entries for 2 inputs"):
        codec.request(m.SerializeToString())


def test_contents_in_the_field_of_another_datatype_are_refused() -> None:
    with pytest.raises(InvalidInput, match="fp64_contents is filled, but FP32"):
        codec.request(typed("FP32", fp64_contents=[1.0]))


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "TEXT", ""])
def test_a_datatype_without_typed_contents_is_refused(datatype: str) -> None:
    with pytest.raises(InvalidInput, match="input 'x': datatype"):
        codec.request(typed(datatype))


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT8", 128),
        ("INT8", -129),
        ("INT16", 32768),
        ("UINT8", 256),
        ("UINT16", 65536),
    ],
)
def test_an_element_that_does_not_fit_its_datatype_is_refused(datatype, value) -> None:
    with pytest.raises(InvalidInput, match=f"input 'x': .* outside of {datatype}"):
        codec.request(typed(datatype, **{TYPED[datatype][0]: [value]}))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x05\x00\x00\x00abc", "claims 5 bytes, 3 are left"),
        (b"\x01\x00", "2 stray bytes"),
        (b"\xff\xff\xff\xffx", "claims 4294967295 bytes"),
    ],
)
def test_broken_string_lengths_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(InvalidInput, match=f"input 'x': .*{match}"):
        codec.request(raw("BYTES", data))


def test_too_many_strings_are_refused() -> None:
    with pytest.raises(InvalidInput, match="more than 65536 strings"):
        codec.request(raw("BYTES", bytes(4 * (codec.MAX_STRINGS + 1))))


def test_too_many_tensors_dimensions_and_long_names_are_refused() -> None:
    m = pb.ModelInferRequest()
    for _ in range(codec.MAX_TENSORS + 1):
        m.inputs.add(name="x", datatype="FP32")
    with pytest.raises(InvalidInput, match="more than 256 tensors"):
        codec.request(m.SerializeToString())
    with pytest.raises(InvalidInput, match="at most 16 dimensions"):
        codec.request(raw("FP32", b"", [1] * 17))
    with pytest.raises(InvalidInput, match="at most 256 characters"):
        codec.request(pb.ModelInferRequest(id="x" * 257).SerializeToString())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_invalid_input(data: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        codec.request(data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_raw_strings_decode_or_are_invalid_input(data: bytes) -> None:
    try:
        found = codec.strings(data, "here")
    except InvalidInput:
        return
    assert codec.raw(found) == data


def test_a_reply_travels_raw() -> None:
    outputs = (
        Tensor("p", "FP32", (1, 2), memoryview(np.ones((1, 2), "<f4")).cast("B")),
        Tensor("t", "BYTES", (2,), (b"one", b"")),
    )
    answer = codec.reply(Reply(outputs), "digits", "3", "me")
    m = pb.ModelInferResponse.FromString(answer)
    assert pb.ModelStreamInferResponse.FromString(codec.piece(answer)) == (
        pb.ModelStreamInferResponse(infer_response=m)
    )
    assert (m.model_name, m.model_version, m.id) == ("digits", "3", "me")
    assert [(t.name, t.datatype, list(t.shape)) for t in m.outputs] == [
        ("p", "FP32", [1, 2]),
        ("t", "BYTES", [2]),
    ]
    assert m.raw_output_contents[0] == np.ones((1, 2), "<f4").tobytes()
    assert m.raw_output_contents[1] == b"\x03\x00\x00\x00one\x00\x00\x00\x00"


def test_answers_that_differ_in_any_part_are_not_taken_for_each_other() -> None:
    def message(name: str, datatype: str, shape: tuple[int, ...], *given: str) -> bytes:
        outputs = (Tensor(name, datatype, shape, b"abcd"),)
        return codec.reply(Reply(outputs), *given)

    given = ("p", "FP32", (1,), "m", "1", "me")
    others = ("q", "INT32", (1, 1), "n", "2", "you")
    made = {message(*given)}  # type: ignore[arg-type]
    for at, other in enumerate(others):
        made.add(message(*given[:at], other, *given[at + 1 :]))  # type: ignore[arg-type]
    assert len(made) == 1 + len(others)
    again = pb.ModelInferResponse.FromString(message(*given))  # type: ignore[arg-type]
    assert (again.model_name, again.model_version, again.id) == ("m", "1", "me")


@pytest.mark.parametrize("size", [0, 127, 128, 16_383, 16_384, 3 << 20])
def test_raw_contents_of_any_size_are_a_field_of_protobuf(size: int) -> None:
    outputs = (Tensor("p", "UINT8", (size,), bytes(size)),)
    m = pb.ModelInferResponse.FromString(codec.reply(Reply(outputs), "m", "", ""))
    assert m.raw_output_contents == [bytes(size)]
    assert m.SerializeToString() == codec.reply(Reply(outputs), "m", "", "")


def test_a_description_tells_specs_and_digest() -> None:
    about = Description(
        "digits",
        "3",
        "sha256:1",
        (TensorSpec("x", "FP32", (-1, 64)),),
        (TextSpec("t"),),
    )
    m = codec.metadata(about)
    assert (m.name, list(m.versions), m.properties["digest"]) == (
        "digits",
        ["3"],
        "sha256:1",
    )
    assert [(t.name, t.datatype, list(t.shape)) for t in (*m.inputs, *m.outputs)] == [
        ("x", "FP32", [-1, 64]),
        ("t", "BYTES", [1]),
    ]


@pytest.mark.parametrize("field", [5, 6, 7])
def test_millions_of_empty_tensors_are_counted_not_unpacked(field):
    message = bytes([field << 3 | 2, 0]) * 200_000
    with pytest.raises(InvalidInput, match="more than"):
        codec.request(message)


@pytest.mark.slow
def test_uncounted_they_would_all_be_unpacked(monkeypatch):
    monkeypatch.setattr(codec, "MAX_TENSORS", 10**9)
    message = bytes([6 << 3 | 2, 0]) * 200_000
    assert len(codec.request(message).outputs) == 200_000
