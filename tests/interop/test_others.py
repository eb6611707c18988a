"""Our own client with other people's servers.

docs/interop.md takes what it says of the tests beyond the cases from their docstrings.
"""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.interop.cases import (
    CANCELLED,
    CASES,
    GIVE,
    OK,
    UNARY,
    Case,
    is_large,
    simple,
    size_of,
    streamed,
    went_well,
)
from tests.interop.conftest import have_grpc_js
from tests.interop.drivers import End, Shape
from tests.interop.others import COMPRESS, INITIAL, OF_OURS, OTHERS, TRAILING, Other
from tests.interop.others import Node as NodeServer
from tests.interop.own import ABSENT_HERE, OWN, Own
from tests.unit.transport.support import CLI, DOMAIN, MovingSource
from ztserve.identity import Identity
from ztserve.testing import ThrowAwayAuthority

pytestmark = pytest.mark.slow
SERVED_TOO = [one for one in CASES if one.name not in (*ABSENT_HERE, *OF_OURS)]
STREAM = "StreamingOutputCallResponse"
ABORTED, UNAVAILABLE = 10, 14
PIECE_US = 60_000
LARGE = 4 << 20


def begun(name: str, authority: ThrowAwayAuthority, tmp_path_factory) -> Other:
    if name.startswith("grpc-js"):
        have_grpc_js()
    return OTHERS[name](authority, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module", params=OTHERS)
def other(request, authority, tmp_path_factory) -> Iterator[Other]:
    with closing(begun(request.param, authority, tmp_path_factory)) as one:
        yield one


@pytest.fixture(params=OTHERS)
def leaving(request, authority, tmp_path_factory) -> Iterator[Other]:
    """A server that the test may stop."""
    with closing(begun(request.param, authority, tmp_path_factory)) as one:
        yield one


@pytest.fixture(params=OWN)
def driver(request, other: Other) -> Iterator[Own]:
    with closing(OWN[request.param](other)) as one:
        yield one


@pytest.mark.parametrize("case", SERVED_TOO, ids=lambda case: case.name)
def test_case(case: Case, driver: Own, other: Other) -> None:
    case.run(driver, other)


def test_metadata_comes_back_and_does_no_harm(driver: Own, other: Other) -> None:
    """custom_metadata: what our client sends arrives; the echo before the answer and
    that after it are passed over"""
    value = f"test_initial_metadata_value of {type(driver).__name__}"
    metadata = ((INITIAL, value), (TRAILING, b"\xab\xab\xab"))
    other.told.said.clear()
    is_large(driver.call(Shape.UNARY, UNARY, simple(), metadata=metadata))
    call = driver.call(Shape.SERVER_STREAM, GIVE, streamed(9), metadata=metadata)
    assert size_of(call.receive(), STREAM) == 9
    went_well(call)
    assert other.told.has("initial", value)
    assert other.told.has("trailing", "ababab")


def test_large_messages_go_both_ways(driver: Own) -> None:
    """4 MiB there and back, beyond any window"""
    call = driver.call(Shape.UNARY, UNARY, simple(LARGE, LARGE))
    assert size_of(call.receive()) == LARGE
    went_well(call)
    call = driver.call(Shape.SERVER_STREAM, GIVE, streamed(LARGE, 1, LARGE))
    assert [size_of(call.receive(), STREAM) for _ in range(3)] == [LARGE, 1, LARGE]
    went_well(call)


def test_a_call_that_is_given_up_ends_at_the_server(driver: Own, other: Other) -> None:
    """a stream that our client cancels while it runs ends at the server"""
    other.told.said.clear()
    pieces = [9] * 200
    asked = streamed(*pieces, interval_us=PIECE_US)
    call = driver.call(Shape.SERVER_STREAM, GIVE, asked)
    assert size_of(call.receive(), STREAM) == 9
    assert ("ended", "") not in other.told.said
    call.cancel()
    while call.receive() is not None:
        pass
    assert call.end() == End(CANCELLED, "this client ended the call")
    assert other.told.has("ended", "")


def test_what_is_compressed_though_nobody_asked(driver: Own, other: Other) -> None:
    """grpcio's servers compress an answer if the handler says so, although our client
    announced nothing: the call ends in Interrupted, which says why, and the next goes
    well (grpc-js compresses no answers)"""
    metadata = ((COMPRESS, "yes"),)
    call = driver.call(Shape.UNARY, UNARY, simple(), metadata=metadata)
    if isinstance(other, NodeServer):
        is_large(call)
    else:
        assert call.receive() is None
        assert call.end().code == ABORTED  # as Interrupted is told
    is_large(driver.call(Shape.UNARY, UNARY, simple()))


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_a_server_that_stops_lets_what_runs_end(own, leaving: Other) -> None:
    """GOAWAY of a server that stops: the stream that runs ends well; the next call
    dials anew, and is told that nothing listens: it surely did not run"""
    with closing(own(leaving)) as driver:
        asked = streamed(9, 9, 9, 9, interval_us=PIECE_US)
        call = driver.call(Shape.SERVER_STREAM, GIVE, asked)
        assert size_of(call.receive(), STREAM) == 9
        leaving.stop()
        assert [size_of(call.receive(), STREAM) for _ in range(3)] == [9] * 3
        went_well(call)
        deadline = time.monotonic() + 5
        while (end := ended(driver)).code == OK:
            assert time.monotonic() < deadline, "it does not stop"
        assert end.code == UNAVAILABLE, end


def ended(driver: Own) -> End:
    return driver.call(Shape.UNARY, UNARY, simple(1, 1), timeout_s=5).end()


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_a_client_of_another_authority_is_told(own, other: Other, monkeypatch) -> None:
    """a client whose certificate the server does not trust is turned away in the
    handshake, and says so"""
    bundles = other.source.current().bundles
    stranger = ThrowAwayAuthority(DOMAIN).issue(CLI)
    monkeypatch.setattr(other, "source", MovingSource(Identity(stranger, bundles)))
    with closing(own(other)) as driver:
        end = ended(driver)
    assert end.code == UNAVAILABLE
    assert "refused this client" in end.details or "closed the conn" in end.details
