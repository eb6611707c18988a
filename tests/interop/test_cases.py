"""Each case of the grpc project with each client."""

import time

import pytest

from tests.interop.cases import CASES
from tests.interop.drivers import DRIVERS, Driver
from tests.interop.own import ABSENT_HERE, EVERY, OWN, NotOffered
from ztserve.transport import messages

pytestmark = pytest.mark.slow
COMPRESSED = {"client_compressed_unary": 1, "client_compressed_streaming": 1}


@pytest.fixture
def expanded(monkeypatch) -> list[int]:
    """The sizes of the messages that came compressed."""
    sizes: list[int] = []
    expand = messages.expanded

    def counted(message, most):
        sizes.append(len(message))
        return expand(message, most)

    monkeypatch.setattr(messages, "expanded", counted)
    return sizes


RUN = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in CASES
    for name in EVERY
    if name in DRIVERS or case.name not in ABSENT_HERE
]


@pytest.mark.parametrize("driver", OWN, indirect=True)
@pytest.mark.parametrize("name", ABSENT_HERE)
def test_what_our_client_does_not_offer(name, driver: Driver, served) -> None:
    (case,) = (one for one in CASES if one.name == name)
    with pytest.raises(NotOffered, match=ABSENT_HERE[name]):
        case.run(driver, served)


@pytest.mark.parametrize(("case", "driver"), RUN, indirect=["driver"])
def test_case(case, driver, served, expanded) -> None:
    case.run(driver, served)
    assert len(expanded) == COMPRESSED.get(case.name, 0)
    end = time.monotonic() + 5
    while served.server.in_flight:  # a call that was cancelled ends here as well
        assert time.monotonic() < end, "a call goes on that nobody waits for"
        time.sleep(0.01)
