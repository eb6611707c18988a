import pytest

from ztserve import Batch, ModelRef, TensorSpec, TextSpec, ZTDeployment
from ztserve.errors import ConfigError

X = TensorSpec("x", "FP32", (-1, 2))
Y = TensorSpec("y", "FP32", (-1, 2))
TEXT = TextSpec("text")


def made(name="Digits", **members):
    members.setdefault("inputs", (X,))
    members.setdefault("outputs", (Y,))
    members.setdefault("predict", lambda self, x: x)
    return type(name, (ZTDeployment,), members)


@pytest.mark.parametrize(
    ("name", "service"),
    [("Digits", "digits"), ("ImageNetV2", "image-net-v2"), ("HTTPModel", "http-model")],
)
def test_the_service_is_the_name_in_kebab_case(name, service):
    assert made(name).service == service


def test_lists_are_frozen():
    assert made(inputs=[X]).inputs == (X,)


def test_a_subclass_has_a_service_of_its_own():
    parent = made("Parent", service="inference-service")
    assert type("Child", (parent,), {}).service == "child"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"service": "Not Kebab"}, "service 'Not Kebab'"),
        ({"model": "digits"}, r"write model = ModelRef\('digits'\)"),
        ({"inputs": (("x", "FP32"),)}, "must hold TensorSpec or TextSpec"),
        ({"inputs": (X, X)}, "name something twice"),
        ({"inputs": ()}, "declare inputs and outputs"),
        ({"predict": lambda self, z: z}, "predict takes z, and the declared inputs"),
        ({"predict": lambda self, x, z: z}, "name them alike"),
        ({"outputs": (TEXT,), "batch": Batch(2)}, "texts cannot be joined"),
    ],
)
def test_a_class_that_cannot_work_is_refused_when_it_is_made(members, message):
    with pytest.raises(ConfigError, match=message):
        made(**members)


@pytest.mark.parametrize(
    "predict",
    [lambda self, x: x, lambda self, **inputs: 0, lambda self, x, more=1: x],
)
def test_predict_may_take_its_inputs_in_any_usual_way(predict):
    made(predict=predict)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorSpec("a b", "FP32", (1,)), "must be an identifier"),
        (lambda: TensorSpec("a", "FLOAT", (1,)), "datatype 'FLOAT' is none of"),
        (lambda: TensorSpec("a", "FP32", ()), "needs at least the batch axis"),
        (lambda: TensorSpec("a", "FP32", (0,)), "may hold -1"),
        (lambda: TensorSpec("a", "FP32", (True,)), "may hold -1"),
        (lambda: TensorSpec("a", "FP32", (1,) * 17), "at most 16"),
        (lambda: TensorSpec("a", "FP32", (1,), low=2, high=1), "low is above high"),
        (lambda: TextSpec("1"), "must be an identifier"),
        (lambda: TextSpec("a", max_chars=0), "must be positive"),
        (lambda: Batch(0), "max_size"),
        (lambda: Batch(1, wait_ms=-1), "wait_ms"),
        (lambda: ModelRef("Digits"), "expected name"),
        (lambda: ModelRef("digits:1@production"), "expected name"),
        (lambda: ModelRef("../digits"), "expected name"),
        (lambda: ModelRef("digits\n"), "expected name"),
        (lambda: ModelRef("digits@sha256:abc"), "expected name"),
    ],
)
def test_a_declaration_that_cannot_hold_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_reference_is_pinned_once():
    digest, other = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    ref = ModelRef("digits@production").pinned(digest)
    assert (ref.name, ref.alias, ref.digest) == ("digits", None, digest)
    assert ModelRef("digits:3").pinned(digest).version == "3"
    with pytest.raises(Exception, match="not to its pinned digest"):
        ref.pinned(other)
