"""The values that travel through the rooms, and the one clock.

A ladder: `Call` is made only by transport and gateway, `Request` by whoever decodes
the wire, `Inputs` only by validation, `Outputs` only by inference, `Reply` only by
filtering. Each room takes nothing less, so a skipped room is a type error
(``tests/contract/test_makers.py`` keeps the makers honest).
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from ztserve.errors import ConfigError, VerificationError

EMPTY: Mapping[str, str] = MappingProxyType({})

Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
Value: TypeAlias = Array | str
"""What a model takes or gives under one name: a tensor, or a text."""

_START_WALL, _START_MONOTONIC = time.time(), time.monotonic()


def now() -> datetime:
    """Return the time in UTC, never behind monotonic progress since start-up.

    A wall clock that is set back can therefore not revive what has expired.
    """
    steady = _START_WALL + (time.monotonic() - _START_MONOTONIC)
    return datetime.fromtimestamp(max(time.time(), steady), UTC)


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


def operations(model: str) -> Mapping[str, Operation]:
    """Return the Open Inference Protocol's operations on `model`, by gRPC method."""
    paths: dict[str, tuple[Literal["GET", "POST"], tuple[str, ...]]] = {
        "ModelInfer": ("POST", ("/v1/predict", f"/v2/models/{model}/infer")),
        "ModelStreamInfer": ("POST", ("/v1/stream", f"/v2/models/{model}/stream")),
        "ServerLive": ("GET", ("/v2/health/live",)),
        "ServerReady": ("GET", ("/v2/health/ready",)),
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


# --- what a deployment declares -------------------------------------------------

DATATYPES: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        "BOOL": np.dtype("bool"),
        "UINT8": np.dtype("u1"),
        "UINT16": np.dtype("<u2"),
        "UINT32": np.dtype("<u4"),
        "UINT64": np.dtype("<u8"),
        "INT8": np.dtype("i1"),
        "INT16": np.dtype("<i2"),
        "INT32": np.dtype("<i4"),
        "INT64": np.dtype("<i8"),
        "FP16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),
        "FP32": np.dtype("<f4"),
        "FP64": np.dtype("<f8"),
    }
)
"""Open Inference Protocol datatypes of tensors, as numpy holds them."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")


def _require(fact: object, message: str) -> None:
    if not fact:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a deployment takes or gives.

    `shape` has the batch axis first; -1 is a free dimension. `low` and `high` bound
    every element, inclusively; floating-point elements must always be finite.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        here = f"TensorSpec {self.name!r}: "
        _require(_NAME.match(self.name), here + "the name must be an identifier")
        _require(
            self.datatype in DATATYPES,
            here + f"datatype {self.datatype!r} is none of {', '.join(DATATYPES)}",
        )
        _require(self.shape, here + "the shape needs at least the batch axis")
        _require(
            all(type(n) is int and (n == -1 or n > 0) for n in self.shape),
            here + f"shape {self.shape!r} may hold -1 (free) or positive sizes",
        )
        _require(len(self.shape) <= 16, here + "a shape has at most 16 dimensions")
        if self.low is not None and self.high is not None:
            _require(self.low <= self.high, here + "low is above high")


_GREATEST = {
    "FP16": 65504.0,
    "BF16": 2.0**128 - 2.0**120,
    "FP32": 2.0**128 - 2.0**104,
    "FP64": sys.float_info.max,
}
_least, _most = np.minimum.reduce, np.maximum.reduce


def _nearest(bound: float, datatype: str) -> float:
    if datatype == "BF16":  # the upper half of a float32, rounded to even
        bits = np.array([bound], "<f4").view("<u4")
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(bits.view("<f4")[0])
    return float(DATATYPES[datatype].type(bound)) if datatype in _GREATEST else bound


class Elements:
    """The check of every element of a tensor: finite, and within its spec's bounds.

    NaN propagates to the least and the greatest element, and an infinity lies beyond
    the datatype's greatest number, so these two tell all. A bound is rounded to the
    tensor's precision; ConfigError where the datatype cannot hold it.
    """

    def __init__(self, spec: TensorSpec) -> None:
        most = _GREATEST.get(spec.datatype, math.inf)
        self._bf16, self._bool = spec.datatype == "BF16", spec.datatype == "BOOL"
        bounds = [0.0, 1.0] if self._bool else [-most, most]
        for at, bound in enumerate((spec.low, spec.high)):
            if bound is not None:
                here = f"TensorSpec {spec.name!r}: bound {bound!r} "
                _require(abs(bound) <= most, here + f"is beyond {spec.datatype}")
                bounds[at] = _nearest(bound, spec.datatype)
        self._low, self._high = bounds
        self._free = bounds == [-math.inf, math.inf]
        bounded = spec.low is not None or spec.high is not None or self._bool
        self._expected = f"{bounds[0]:g} to {bounds[1]:g}" if bounded else "finite"

    def check(self, flat: Array) -> None:
        """Raise ValueError at the first element of 1-D `flat` that does not hold."""
        if self._free or not flat.size:
            return
        seen: Any = flat
        if self._bf16:
            seen = (seen.astype("<u4") << 16).view("<f4")
        elif self._bool:
            seen = seen.view("u1")
        if not (self._low <= _least(seen).item() and _most(seen).item() <= self._high):
            bad = int(np.argmin((seen >= self._low) & (seen <= self._high)))
            what = "NaN" if math.isnan(seen[bad]) else "out of range"
            raise ValueError(f"element {bad} is {what}; expected {self._expected}")


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A text that a deployment takes or gives (``BYTES`` of shape [1], UTF-8).

    As an output it passes the PII filter.
    """

    name: str
    max_chars: int = 8192

    def __post_init__(self) -> None:
        here = f"TextSpec {self.name!r}: "
        _require(_NAME.match(self.name), here + "the name must be an identifier")
        _require(self.max_chars > 0, here + "max_chars must be positive")


Spec: TypeAlias = TensorSpec | TextSpec


@dataclass(frozen=True, slots=True)
class Batch:
    """Join calls on axis 0 after validation, split them again before filtering."""

    max_size: int
    """Most rows in one call of `predict`."""
    wait_ms: float = 0.0
    """Longest wait for calls that have already been admitted."""

    def __post_init__(self) -> None:
        _require(self.max_size >= 1, "Batch: max_size must be at least 1")
        _require(0 <= self.wait_ms <= 1000, "Batch: wait_ms must lie in 0..1000")


_REF = re.compile(
    r"(?P<name>[a-z0-9](?:[a-z0-9._-]{0,127}))"
    r"(?::(?P<version>[A-Za-z0-9][A-Za-z0-9._-]{0,127}))?"
    r"(?:@(?:(?P<digest>sha256:[0-9a-f]{64})|(?P<alias>[a-z][a-z0-9._-]{0,63})))?\Z"
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model: ``name[:version][@alias | @sha256:<64 hex>]``.

    A bare name means its newest version. Raises ConfigError on anything else.
    """

    text: str

    def __post_init__(self) -> None:
        match = _REF.match(self.text)
        _require(
            match and not (match["alias"] and match["version"]),
            f"model reference {self.text!r}: expected name[:version], name@alias or "
            "name[:version]@sha256:<64 hex digits>, all in lower case",
        )

    def _part(self, group: str) -> str | None:
        match = _REF.match(self.text)
        return match[group] if match else None

    @property
    def name(self) -> str:
        """The model's name."""
        return self._part("name") or ""

    @property
    def version(self) -> str | None:
        """The version asked for, if one is."""
        return self._part("version")

    @property
    def alias(self) -> str | None:
        """The alias asked for, if one is."""
        return self._part("alias")

    @property
    def digest(self) -> str | None:
        """The pinned digest (``sha256:...``), if one is."""
        return self._part("digest")

    def pinned(self, digest: str) -> ModelRef:
        """Return this reference fixed to `digest`.

        Raises VerificationError where it is already fixed to another.
        """
        if self.digest is not None and self.digest != digest:
            raise VerificationError(
                f"model {self.text} resolved to {digest}, not to its pinned digest"
            )
        version = f":{self.version}" if self.version else ""
        return ModelRef(f"{self.name}{version}@{digest}")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Description:
    """What a deployment tells of itself to those who may ask."""

    model: str
    version: str
    digest: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    ready: bool = True
