import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ztserve.audit import Log
from ztserve.types import Call, Caller, Operation, Peer

PEER = "spiffe://dev.ztserve.internal/ns/ml-api/sa/api-gateway"


def make_call(call_id: str = "call-1", *, peer: str = PEER, **fields: object) -> Call:
    when = datetime(2030, 1, 1, tzinfo=UTC)
    settings: dict[str, object] = {
        "caller": Caller("https://issuer", "alice", proof=f"x, asserted by {PEER}"),
        "operation": Operation("POST", frozenset({"/v1/predict"}), "/v1/predict"),
        "source_ip": "10.1.2.3",
        "source_port": 4444,
        **fields,
    }
    return Call(
        id=call_id,
        peer=Peer(peer, 0xC0FFEE, when, when, "ab" * 32),
        deadline=1e9,
        **settings,
    )


@pytest.fixture
def call() -> Callable[..., Call]:
    return make_call


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit" / "replica.jsonl"


@pytest.fixture
def log(path: Path) -> Iterator[Log]:
    with Log(path, origin={"service": "inference-service", "replica": "r1"}) as log:
        yield log


@pytest.fixture
def records(path: Path) -> Callable[[], list[dict]]:
    """Read the log's records but its first, each parsed as strict JSON."""

    def strict(text: str) -> object:
        raise ValueError(text)

    def read() -> list[dict]:
        lines = path.read_text("ascii").splitlines()
        return [json.loads(line, parse_constant=strict) for line in lines[1:]]

    return read
