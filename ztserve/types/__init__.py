"""The values that travel through the rooms, and the one clock.

A ladder: `Call` is made only by transport and gateway, `Request` by whoever decodes
the wire, `Inputs` only by validation, `Outputs` only by inference, `Reply` only by
filtering. Each room takes nothing less, so a skipped room is a type error
(``tests/contract/test_architecture.py`` keeps the makers honest).
"""

from ztserve.types.calls import (
    EMPTY,
    Array,
    Call,
    Caller,
    Inputs,
    Operation,
    Outputs,
    Peer,
    Receive,
    Reply,
    Request,
    Service,
    Tensor,
    Value,
    operations,
)
from ztserve.types.clock import now, on_clock_step
from ztserve.types.refs import ModelRef
from ztserve.types.specs import (
    DATATYPES,
    Batch,
    Description,
    Elements,
    Spec,
    TensorSpec,
    TextSpec,
)

__all__ = [
    "DATATYPES",
    "EMPTY",
    "Array",
    "Batch",
    "Call",
    "Caller",
    "Description",
    "Elements",
    "Inputs",
    "ModelRef",
    "Operation",
    "Outputs",
    "Peer",
    "Receive",
    "Reply",
    "Request",
    "Service",
    "Spec",
    "Tensor",
    "TensorSpec",
    "TextSpec",
    "Value",
    "now",
    "on_clock_step",
    "operations",
]
