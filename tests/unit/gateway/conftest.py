"""What the tests of the gateway share."""

import pytest

from tests.unit.gateway.support import DOMAIN, running
from ztserve.testing import ThrowAwayAuthority


@pytest.fixture(scope="session")
def authority() -> ThrowAwayAuthority:
    return ThrowAwayAuthority(DOMAIN)


@pytest.fixture
def edge(authority, tmp_path):
    with running(authority, tmp_path) as one:
        yield one
