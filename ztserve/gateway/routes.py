"""Which deployment a request is for, and what the request is called in policies."""

import re
from collections.abc import AsyncIterator, Mapping
from typing import Literal, NamedTuple, Protocol, cast

from ztserve.errors import ConfigError, InvalidInput, NotFound
from ztserve.gateway.head import Head
from ztserve.types import Caller, Operation, Request, Tensor, operations

LIVE = "/v2/health/live"
READY = "/v2/health/ready"
_BY_BODY = {"/v1/predict": "ModelInfer", "/v1/stream": "ModelStreamInfer"}
_BY_PATH = re.compile(r"/v2/models/([A-Za-z0-9._-]{1,128})/(infer|stream)")
_METHODS = {"infer": "ModelInfer", "stream": "ModelStreamInfer"}


class Deployment(Protocol):
    """How a deployment is called: `transport.AsyncClient`, in short."""

    @property
    def model(self) -> str:
        """The name of the model that it serves; empty while that is not known."""

    async def ready(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the deployment says that it is ready."""

    async def send(
        self,
        request: Request,
        *,
        timeout_s: float | None = None,
        caller: Caller | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the answer to a request."""

    def send_stream(
        self,
        request: Request,
        *,
        timeout_s: float | None = None,
        caller: Caller | None = None,
    ) -> AsyncIterator[tuple[Tensor, ...]]:
        """Yield the answer to a request, piece by piece."""

    async def close(self) -> None:
        """Take no more calls."""


class Asked(NamedTuple):
    """What a request's path asks for."""

    method: str
    """A method of the Open Inference Protocol; empty: the path is none of ours."""
    model: str
    """As the path has it; empty: the body says."""


def asked(head: Head) -> Asked:
    """Return what the path of a request asks for."""
    if head.method == "GET":
        return Asked("ServerReady" if head.path == READY else "", "")
    if head.path in _BY_BODY:
        return Asked(_BY_BODY[head.path], "")
    match = _BY_PATH.fullmatch(head.path)
    return Asked(_METHODS[match[2]], match[1]) if match else Asked("", "")


class Routes:
    """The deployments behind one gateway."""

    def __init__(self, deployments: Mapping[str, Deployment]) -> None:
        """Take deployments by name, such as ``inference-service``. ConfigError: none.

        Callers name a deployment's model, or the deployment itself.
        """
        if not deployments:
            raise ConfigError(
                "the gateway has no deployment to route to: name one in [gateway] "
                "deployments"
            )
        self._deployments = dict(deployments)
        self._known: dict[str, Mapping[str, Operation]] = {}

    def __iter__(self) -> "AllDeployments":
        return iter(self._deployments.values())

    def find(self, model: str) -> tuple[str, Deployment]:
        """Return the deployment that `model` names, and its model's own name.

        Raises NotFound, and InvalidInput where nothing is named and several are there.
        """
        if not model and len(self._deployments) == 1:
            (one,) = self._deployments.values()
            return one.model, one
        if not model:
            raise InvalidInput(
                "model_name is missing, and there are several: "
                f"{', '.join(sorted(self._names()))}"
            )
        if model in self._deployments:
            return self._deployments[model].model, self._deployments[model]
        for one in self._deployments.values():
            if one.model == model:
                return model, one
        if len(self._deployments) == 1 and not self._names() & {model}:
            (one,) = self._deployments.values()
            if not one.model:
                # Not known yet what it serves: it will refuse another model itself.
                return model, one
        raise NotFound(f"no model {model!r} here")
