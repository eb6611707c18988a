"""What the tests of transport share: one authority, one echo server."""

from collections.abc import Iterator

import pytest

from tests.unit.transport.support import CLI, DOMAIN, SERVER, Served, serving
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Client


@pytest.fixture(scope="session")
def authority() -> ThrowAwayAuthority:
    return ThrowAwayAuthority(DOMAIN)


@pytest.fixture
def served(authority: ThrowAwayAuthority) -> Iterator[Served]:
    with serving(authority) as one:
        yield one


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    source = served.authority.source(CLI)
    with Client(served.address, source=source, server_id=SERVER) as one:
        yield one
