import asyncio

import pytest

from ztserve.errors import ConfigError, InvalidInput, NotFound, Unavailable
from ztserve.gateway.head import Head
from ztserve.gateway.routes import Asked, Routes, asked, operation
from ztserve.types import EMPTY


class Known:
    """A deployment as far as its name matters here."""

    def __init__(self, model: str) -> None:
        self.model = model


def head(method: str, path: str) -> Head:
    return Head(method, path, "g", EMPTY, 0, expects=False, closes=False, dropped=())


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/v1/predict", Asked("ModelInfer", "")),
        ("POST", "/v1/stream", Asked("ModelStreamInfer", "")),
        ("POST", "/v2/models/m.1/infer", Asked("ModelInfer", "m.1")),
        ("POST", "/v2/models/m/stream", Asked("ModelStreamInfer", "m")),
        ("GET", "/v2/health/ready", Asked("ServerReady", "")),
        ("GET", "/v1/predict", Asked("", "")),
        ("POST", "/v2/health/ready", Asked("", "")),
        ("POST", "/v2/models/m/n/infer", Asked("", "")),
        ("POST", "/v2/models/m/ready", Asked("", "")),
        ("POST", "/v2/models/" + "m" * 129 + "/infer", Asked("", "")),
    ],
)
def test_paths_and_what_they_ask_for(method, path, expected):
    assert asked(head(method, path)) == expected


def test_an_operation_has_all_names_that_are_known():
    assert operation("ModelInfer", "").names == {
        "/v1/predict",
        "/inference.GRPCInferenceService/ModelInfer",
    }
    assert "/v2/models/m/infer" in operation("ModelInfer", "m").names
    assert operation("ServerReady", "").names == operation("ServerReady", "m").names


def test_a_sole_deployment_needs_no_name():
    one = Known("m")
    routes = Routes({"service": one})
    assert routes.sole is one
    assert routes.find("") is routes.find("m") is routes.find("service") is one
    with pytest.raises(NotFound, match="there is no model 'other' here"):
        routes.find("other")


def test_a_sole_deployment_of_an_unknown_model_is_asked_itself():
    one = Known("")
    routes = Routes({"service": one})
    assert routes.find("anything") is one
    for name in ("a/b", "a b", "..%2f", "x" * 129):
        with pytest.raises(NotFound):
            routes.find(name)


def test_several_deployments_are_told_apart_by_name():
    one, two = Known("m"), Known("n")
    routes = Routes({"a": one, "b": two})
    assert routes.sole is None
    assert routes.find("m") is one
    assert routes.find("b") is two
    with pytest.raises(InvalidInput, match="several are served here"):
        routes.find("")
    with pytest.raises(NotFound):
        routes.find("o")


@pytest.mark.slow
def test_a_model_that_may_be_there_is_waited_for(monkeypatch):
    one, two = Known("m"), Known("")
    routes = Routes({"a": one, "b": two})
    with pytest.raises(Unavailable, match="not known yet"):
        routes.find("n")

    async def wait() -> object:
        asyncio.get_running_loop().call_later(0.1, setattr, two, "model", "n")
        return await routes.known("n")

    assert asyncio.run(wait()) is two
    two.model = ""
    monkeypatch.setattr("ztserve.gateway.routes.KNOWN_S", 0.1)
    with pytest.raises(Unavailable):
        asyncio.run(routes.known("n"))


def test_no_deployment_is_refused():
    with pytest.raises(ConfigError, match=r"name one in \[gateway\] deployments"):
        Routes({})
