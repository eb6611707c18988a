"""Each case of the grpc project with each client."""

import time

import pytest

from tests.interop.cases import CASES
from tests.interop.drivers import DRIVERS
from ztserve.transport import messages

pytestmark = pytest.mark.slow
COMPRESSED = {"client_compressed_unary": 1, "client_compressed_streaming": 1}


@pytest.fixture
def expanded(monkeypatch) -> list[int]:
    """The sizes of the messages that came compressed."""
    sizes: list[int] = []
    expand = messages.Reassembly._expanded

    def counted(self, message):
        sizes.append(len(message))
        return expand(self, message)

    monkeypatch.setattr(messages.Reassembly, "_expanded", counted)
    return sizes


@pytest.mark.parametrize("driver", DRIVERS, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, driver, served, expanded) -> None:
    case.run(driver, served)
    assert len(expanded) == COMPRESSED.get(case.name, 0)
    end = time.monotonic() + 5
    while served.server.in_flight:  # a call that was cancelled ends here as well
        assert time.monotonic() < end, "a call goes on that nobody waits for"
        time.sleep(0.01)
