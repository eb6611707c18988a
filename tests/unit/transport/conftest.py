"""What the tests of transport share: one authority, one echo server."""

from collections.abc import Iterator

import pytest

from tests.unit.transport import support
from tests.unit.transport.support import CLI, DOMAIN, SERVER, Served, serving
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Client, Server
from ztserve.transport.server import GrpcServer


@pytest.fixture(scope="session")
def authority() -> ThrowAwayAuthority:
    return ThrowAwayAuthority(DOMAIN)


@pytest.fixture(params=[GrpcServer, Server], ids=["grpcio", "loop"])
def engine(request, monkeypatch) -> type:
    """Each implementation of the server, in the place of the one that ships."""
    monkeypatch.setattr(support, "Server", request.param)
    return request.param


@pytest.fixture
def served(authority: ThrowAwayAuthority) -> Iterator[Served]:
    with serving(authority) as one:
        yield one


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    source = served.authority.source(CLI)
    with Client(served.address, source=source, server_id=SERVER) as one:
        yield one
