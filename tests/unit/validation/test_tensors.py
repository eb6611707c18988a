import numpy as np
import pytest

from ztserve.errors import InvalidInput
from ztserve.types import DATATYPES, Tensor, TensorSpec
from ztserve.validation.tensors import TensorCheck

PIXELS = TensorSpec("pixels", "FP32", (-1, 64), low=0, high=16)


def tensor(shape=(2, 64), datatype="FP32", data=None):
    size = int(np.prod(shape)) * 4
    return Tensor("pixels", datatype, shape, b"\0" * size if data is None else data)


def refused(given, spec=PIXELS):
    with pytest.raises(InvalidInput) as caught:
        TensorCheck(spec).read(given)
    return caught.value.public


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_arrives_as_it_was_sent(datatype):
    sent = np.arange(6).reshape(2, 3).astype(DATATYPES[datatype])
    spec = TensorSpec("x", datatype, (-1, 3))
    got = TensorCheck(spec).read(Tensor("x", datatype, (2, 3), sent.tobytes()))
    assert got.dtype == sent.dtype
    assert got.tolist() == sent.tolist()


def test_the_bytes_of_the_wire_are_not_copied():
    data = np.ones((2, 64), "<f4").tobytes()
    got = TensorCheck(PIXELS).read(tensor(data=data))
    assert np.shares_memory(got, np.frombuffer(data, "u1"))
    assert got.flags.c_contiguous
    assert not got.flags.writeable


def test_bytes_that_lie_askew_are_copied_into_line():
    message = b"x" + np.ones((2, 64), "<f4").tobytes()
    got = TensorCheck(PIXELS).read(tensor(data=memoryview(message)[1:]))
    assert got.flags.aligned
    assert got.flags.c_contiguous
    assert got.tolist() == np.ones((2, 64)).tolist()


def test_a_view_with_gaps_is_read_as_its_elements():
    spread = np.zeros((2, 128), "<f4")
    spread[:, ::2] = 3
    got = TensorCheck(PIXELS).read(tensor(data=memoryview(spread[:, ::2])))
    assert got.tolist() == np.full((2, 64), 3.0).tolist()


@pytest.mark.parametrize(
    "shape", [(2, 63), (64,), (2, 64, 1), (), (0, 64), (-1, 64), (2, -64)]
)
def test_another_shape_is_refused_by_name(shape):
    got = list(shape)
    least = " with 1 or more for -1" if 0 in shape else ""
    expected = f"input 'pixels': expected shape [-1, 64]{least}, got {got}"
    assert refused(tensor(shape, data=b"")) == expected


def test_two_negative_sizes_do_not_make_a_positive_one():
    public = refused(
        Tensor("pixels", "FP32", (-1, -1), b"\0" * 4),
        TensorSpec("pixels", "FP32", (-1, -1)),
    )
    assert public == "input 'pixels': expected shape [-1, -1], got [-1, -1]"


def test_a_shape_of_many_dimensions_is_only_counted():
    public = refused(tensor((1,) * 5000, data=b""))
    assert public.endswith("expected shape [-1, 64], got 5000 dimensions")


@pytest.mark.parametrize("size", [0, 511, 513, 1024])
def test_the_bytes_must_be_exactly_those_of_the_shape(size):
    public = refused(tensor(data=b"\0" * size))
    expected = f"expected 512 bytes for shape [2, 64], got {size}"
    assert public == f"input 'pixels': {expected}"


@pytest.mark.parametrize(
    ("given", "got"), [("FP64", "FP64"), ("evil\n", "an unknown one")]
)
def test_another_datatype_is_refused_by_name(given, got):
    expected = f"expected datatype FP32 (numpy.float32), got {got}"
    assert refused(tensor(datatype=given)) == f"input 'pixels': {expected}"


def test_strings_are_no_tensor():
    public = refused(tensor(data=(b"\0" * 512,)))
    assert public == "input 'pixels': expected raw contents, got strings of bytes"


def test_the_element_at_fault_is_told_by_index_and_not_by_value():
    data = np.zeros((2, 64), "<f4")
    data[1, 3] = 777
    public = refused(tensor(data=data.tobytes()))
    assert public == "input 'pixels': element 67 is out of range; expected 0 to 16"
