"""Messages out of pieces of a body, and what waiting pieces cost."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve.errors import InvalidInput
from ztserve.transport import messages
from ztserve.transport.http2.outbox import Outgoing
from ztserve.transport.messages import Reassembly

MOST = 1 << 20


def fed(body: bytes, sizes: list[int]) -> list[bytes]:
    """The messages of `body`, fed in pieces of these sizes, then whole."""
    reassembly, found, at = Reassembly(MOST), [], 0
    for size in [*sizes, len(body)]:
        found += reassembly.feed(body[at : at + size])
        at += size
    assert reassembly.held == 0
    return found


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 5, 4095, 4096, 20_000])),
    st.lists(st.sampled_from([1, 4, 5, 6, 4095, 4096, 4097, 9000])),
)
def test_messages_come_out_as_they_went_in_whatever_the_pieces(sent, sizes) -> None:
    given_ = [bytes([at % 256]) * size for at, size in enumerate(sent)]
    assert fed(b"".join(map(messages.framed, given_)), sizes) == given_


def test_a_large_message_is_sent_in_pieces_that_are_its_body() -> None:
    for size in (0, 10, (1 << 16) - 1, 1 << 16, 1 << 20):
        body = b"".join(messages.body(bytes(size)))
        assert body == messages.framed(bytes(size))


def test_one_that_is_larger_than_allowed_is_refused_by_its_prefix() -> None:
    reassembly = Reassembly(100)
    with pytest.raises(InvalidInput, match="the message has 101 bytes, the limit is"):
        list(reassembly.feed(b"\0\0\0\0\x65"))


def test_a_body_in_single_bytes_costs_little_more_than_its_bytes() -> None:
    reassembly, size = Reassembly(MOST), 20_000
    tracemalloc.start()
    try:
        list(reassembly.feed(messages.framed(bytes(MOST))[:5]))
        for _ in range(size):
            list(reassembly.feed(b"x"))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reassembly.held == size + 5
    assert held < 2 * size  # an object for each would be forty times as much


def test_small_pieces_that_wait_cost_little_more_than_their_bytes() -> None:
    half, size = Outgoing(1, 0), 20_000
    tracemalloc.start()
    try:
        for _ in range(size):
            half.keep(b"x")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert half.pending == size
    assert held < 2 * size
    assert b"".join(half.take(15_000)) == b"x" * 15_000
    assert half.pending == 5_000
