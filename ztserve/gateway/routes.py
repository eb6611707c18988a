"""Which deployment a request is for, and what the request is called in policies."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, Protocol

from ztserve.errors import ConfigError, InvalidInput, NotFound, Unavailable
from ztserve.gateway.head import Head
from ztserve.types import Caller, Operation, Request, Tensor, operations

LIVE = "/v2/health/live"
READY = "/v2/health/ready"
KNOWN_S = 2.0
"""How long a request waits for the directory's first word about a model."""
_BY_BODY = {"/v1/predict": "ModelInfer", "/v1/stream": "ModelStreamInfer"}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_BY_PATH = re.compile(r"/v2/models/([A-Za-z0-9._-]{1,128})/(infer|stream)")
_METHODS = {"infer": "ModelInfer", "stream": "ModelStreamInfer"}


class Deployment(Protocol):
    """How a deployment is called: `transport.AsyncClient`, in short."""

    @property
    def model(self) -> str:
        """The name of the model that it serves; empty while that is not known."""

    async def start(self) -> None:
        """Begin to look for replicas, and for the name of their model."""

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


@lru_cache(maxsize=1024)
def operation(method: str, model: str) -> Operation:
    """Return an operation under all of its names, as far as the model is known."""
    known = operations(model)[method]
    if model:
        return known
    names = frozenset(name for name in known.names if "/models/" not in name)
    return replace(known, names=names)


class Routes:
    """The deployments behind one gateway, by name, such as ``inference-service``.

    Callers name a deployment's model, or the deployment itself. ConfigError: none.
    """

    def __init__(self, deployments: Mapping[str, Deployment]) -> None:
        if not deployments:
            raise ConfigError(
                "the gateway has no deployment to route to: name one in [gateway] "
                "deployments"
            )
        self._deployments = dict(deployments)

    def all(self) -> Collection[Deployment]:
        """Return every deployment."""
        return self._deployments.values()

    @property
    def sole(self) -> Deployment | None:
        """The only deployment, where there is just one."""
        one, *others = self._deployments.values()
        return None if others else one

    async def known(self, model: str) -> Deployment:
        """Return what `find` does; wait a moment for what is not known yet."""
        ends = time.monotonic() + KNOWN_S
        while True:
            try:
                return self.find(model)
            except Unavailable:
                if time.monotonic() > ends:
                    raise
            await asyncio.sleep(0.05)

    def find(self, model: str) -> Deployment:
        """Return the deployment that `model` means; empty: the sole one.

        Raises NotFound, Unavailable where that cannot be told yet, and InvalidInput
        where nothing is named and several are there.
        """
        sole = self.sole
        if not model:
            if sole is None:
                raise InvalidInput("model_name is missing, and several are served here")
            return sole
        if model in self._deployments:
            return self._deployments[model]
        for one in self._deployments.values():
            if one.model == model:
                return one
        unknown = not all(one.model for one in self._deployments.values())
        if not unknown or not _NAME.fullmatch(model):
            raise NotFound(f"there is no model {model!r} here")
        if sole is None:
            raise Unavailable("what is served here is not known yet; try again")
        # Whoever serves another model refuses this one itself.
        return sole
