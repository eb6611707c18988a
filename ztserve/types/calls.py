"""What travels through the rooms for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from datetime import datetime

    from ztserve.types.specs import Description

EMPTY: Mapping[str, str] = MappingProxyType({})

Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
Value: TypeAlias = Array | str
"""What a model takes or gives under one name: a tensor, or a text."""


# --- who ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of this hop, proved by mTLS. Made only by `identity`."""

    id: str
    """Its SPIFFE ID (an `identity.SpiffeId`)."""
    serial: int
    """Serial number of its X.509-SVID: which replica, not only which service."""
    not_after: datetime
    """When the first certificate of its chain expires (UTC)."""
    not_before: datetime
    chain_sha256: str
    """SHA-256 over the DER chain as sent, leaf first."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The end user behind the peer, and how that is known."""

    issuer: str
    """Who vouches for the subject: a trust domain or a token issuer."""
    subject: str
    claims: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    proof: str = ""
    """How it was proved, e.g. ``x509-svid`` or ``x509-svid, asserted by <peer>``."""


# --- what is asked --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation under all of its names.

    Policies may use any of the names: `paths` matches if any name matches,
    `notPaths` only if none does, so that a second name is never a way around.
    """

    method: Literal["GET", "POST"]
    names: frozenset[str]
    title: str
    """The name by which people and audit records know it, e.g. ``/v1/predict``."""


_GRPC = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/Check"
"""gRPC's own way to ask for readiness: one more name of the same operation."""


def operations(model: str) -> Mapping[str, Operation]:
    """Return the Open Inference Protocol's operations on `model`, by gRPC method."""
    paths: dict[str, tuple[Literal["GET", "POST"], tuple[str, ...]]] = {
        "ModelInfer": ("POST", ("/v1/predict", f"/v2/models/{model}/infer")),
        "ModelStreamInfer": ("POST", ("/v1/stream", f"/v2/models/{model}/stream")),
        "ServerLive": ("GET", ("/v2/health/live",)),
        "ServerReady": ("GET", ("/v2/health/ready", _HEALTH)),
        "ModelReady": ("GET", (f"/v2/models/{model}/ready",)),
        "ServerMetadata": ("GET", ("/v2",)),
        "ModelMetadata": ("GET", (f"/v2/models/{model}",)),
    }
    return {
        name: Operation(method, frozenset((_GRPC + name, *names)), names[0])
        for name, (method, names) in paths.items()
    }


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it arrived, before its body is read.

    Made only by transport and gateway, and only for a verified peer.
    """

    id: str
    """Made here, never taken from the caller: names the call in the audit."""
    peer: Peer
    caller: Caller | None
    operation: Operation
    deadline: float
    """When the caller stops waiting (`time.monotonic` seconds); always bounded."""
    headers: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    host: str = ""
    port: int = 0
    source_ip: str = ""
    source_port: int = 0
    notes: tuple[str, ...] = ()
    """What was dropped from the call on the way in, for the audit."""
    cancelled: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as it is on the wire: not checked (in a Request) or final (in a Reply).

    `data` is little-endian, C-contiguous, unpadded; for ``BYTES`` a tuple of strings
    of bytes instead.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A decoded request that nothing has checked yet."""

    model: str
    version: str
    id: str
    """The caller's own id, echoed and nothing more."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    """The outputs asked for; empty: all."""
    size: int = 0
    """Bytes of the message on the wire."""


Receive: TypeAlias = Callable[[], Request]
"""Reads the body of a call, bounded in bytes and time; raises a CallError."""


# --- what passes through the model ----------------------------------------------


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the model takes: each value checked against its spec.

    Arrays are C-contiguous with the batch axis first and may be read-only; ``BF16``
    is held as its bits in uint16.
    """

    values: Mapping[str, Value]
    rows: int
    """Size of the batch axis, common to all tensors; 1 where there is only text."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the model gave, unchecked. ``BF16`` is held as its bits in uint16."""

    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Reply:
    """What may leave. Made only by filtering."""

    outputs: tuple[Tensor, ...]
    findings: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """What was redacted, kind to count; never the content."""


class Service(Protocol):
    """What transport serves: the pipeline of one deployment."""

    def infer(self, call: Call, receive: Receive) -> Reply:
        """Answer one request; raise a CallError or InferenceError to refuse it."""

    def stream(self, call: Call, receive: Receive) -> Iterator[Reply]:
        """Answer one request piece by piece."""

    def describe(self, call: Call) -> Description:
        """Answer live, ready and metadata calls."""
