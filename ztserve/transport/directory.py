"""The directory door: where the replicas of a deployment are.

It says where, never who. The SPIFFE ID that a client expects comes from the client's
own configuration, so that a wrong address costs availability and nothing else.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ztserve.errors import InvalidInput
from ztserve.transport import codec
from ztserve.transport.methods import Exchange, Method
from ztserve.transport.v1 import directory_pb2 as pb
from ztserve.types import Call, Operation

PATH = "/ztserve.v1.Directory/Watch"
WATCH = Operation("GET", frozenset((PATH, "/v1/deployments")), "/v1/deployments")
"""The operation under which policies speak of the directory."""

MAX_ENDPOINTS = 4096
_DEPLOYMENT = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}/[a-z0-9][a-z0-9.-]{0,62}\Z")
_ADDRESS = re.compile(
    r"(?:\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9][A-Za-z0-9.-]{0,252})"
    r":(?P<port>[0-9]{1,5})\Z"
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A replica that takes calls."""

    address: str
    """``host:port``"""
    model: str = ""
    version: str = ""
    digest: str = ""
    """``sha256:<64 hex digits>`` of the signed model."""


class Directory(Protocol):
    """What `directory_methods` serves."""

    def watch(self, call: Call, deployment: str) -> Iterator[tuple[Endpoint, ...]]:
        """Judge `call`, then yield where the replicas are, now and at each change.

        It must look at ``call.cancelled()`` and ``call.deadline`` every second or so.
        Raises Denied, or NotFound.
        """


def directory_methods(directory: Directory) -> tuple[Method, ...]:
    """Return the methods of the directory door."""

    def watch(exchange: Exchange) -> Iterator[bytes]:
        request = codec.parse(pb.WatchRequest, exchange.read())
        deployment = checked_deployment(request.deployment)
        for endpoints in directory.watch(exchange.call, deployment):
            yield pb.Deployment(
                endpoints=[
                    pb.Endpoint(
                        address=one.address,
                        model=one.model,
                        version=one.version,
                        digest=one.digest,
                    )
                    for one in endpoints
                ]
            ).SerializeToString()

    return (Method(PATH, WATCH, stream=watch),)


def watch_request(deployment: str) -> bytes:
    """Return the message that asks for `deployment`."""
    return pb.WatchRequest(deployment=deployment).SerializeToString()


def read_deployment(message: bytes) -> tuple[Endpoint, ...]:
    """Return the endpoints that a directory announces. Raises InvalidInput."""
    announced = codec.parse(pb.Deployment, message).endpoints
    if len(announced) > MAX_ENDPOINTS:
        raise InvalidInput(
            f"the directory announces {len(announced)} replicas, the limit is "
            f"{MAX_ENDPOINTS}"
        )
    return tuple(
        Endpoint(checked_address(one.address), one.model, one.version, one.digest)
        for one in announced
    )


def checked_deployment(text: str) -> str:
    """Return `text` if it is ``namespace/service``, or raise InvalidInput."""
    if not _DEPLOYMENT.match(text):
        raise InvalidInput(f"deployment {text!r:.200}: expected namespace/service")
    return text


def checked_address(text: str) -> str:
    """Return `text` if it is ``host:port``, or raise InvalidInput."""
    match = _ADDRESS.match(text)
    if match is None or not 0 < int(match["port"]) < 1 << 16:
        raise InvalidInput(f"address {text!r:.200}: expected host:port or [ip]:port")
    return text
