"""ztserve: a secure model-serving runtime on Ray Serve.

Every replica has its own SPIFFE identity, talks only over mutual TLS gRPC, serves only
weights whose signature it verified itself, and wraps inference in authorization, input
validation, output filtering and audit. Subclass `ZTDeployment`, declare inputs and
outputs, and run ``ztserve run module:app``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztserve.artifacts import VerifiedModel
    from ztserve.serving import ZTDeployment
    from ztserve.transport import AsyncClient, Client
    from ztserve.types import Batch, ModelRef, TensorSpec, TextSpec

__version__ = "0.1.0"

_HOME = {
    "AsyncClient": "ztserve.transport",
    "Batch": "ztserve.types",
    "Client": "ztserve.transport",
    "ModelRef": "ztserve.types",
    "TensorSpec": "ztserve.types",
    "TextSpec": "ztserve.types",
    "VerifiedModel": "ztserve.artifacts",
    "ZTDeployment": "ztserve.serving",
}

__all__ = [
    "AsyncClient",
    "Batch",
    "Client",
    "ModelRef",
    "TensorSpec",
    "TextSpec",
    "VerifiedModel",
    "ZTDeployment",
]


def __getattr__(name: str) -> object:
    # Lazy, so that a command or a client pays neither for Ray nor for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'ztserve' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
