"""What one call owes its connection."""

import pytest

from ztserve.errors import InvalidInput
from ztserve.transport import messages
from ztserve.transport.http2 import Request
from ztserve.transport.loop.exchange import Cut, Exchange
from ztserve.transport.status import Code


class Wire:
    def __init__(self):
        self.paid = self.held = 0

    def hold(self, count):
        self.held += count

    def consumed(self, stream_id, count):
        self.paid += count


def call(wire=None, most=100):
    request = Request(b"POST", b"https", b"a", b"/s/m", ())
    return Exchange(wire or Wire(), 1, request, most)


def test_what_comes_last_is_told_again_to_who_asks_again():
    whole = call()
    whole.feed(messages.framed(b"one"))
    whole.end()
    assert [whole.receive() for _ in range(3)] == [b"one", None, None]
    large = call(most=2)
    large.feed(messages.framed(b"one"))
    for _ in range(2):
        with pytest.raises(InvalidInput, match="the limit is 2"):
            large.receive()


def test_a_call_that_is_cut_gives_nothing_of_what_arrived():
    gone = call()
    gone.feed(messages.framed(b"one"))
    gone.cut()
    with pytest.raises(Cut):
        gone.receive()


def test_a_call_that_nobody_says_how_to_end_ends_as_a_fault_of_ours():
    assert call().status.code == Code.INTERNAL


@pytest.mark.parametrize("ends", [Exchange.finish, Exchange.cut])
@pytest.mark.parametrize("body", [messages.framed(b"whole"), b"\0\0\0\0\5part"])
def test_a_call_that_ends_owes_its_connection_nothing(body, ends):
    """Else the window of the connection shrinks by each request, until it is closed."""
    wire = Wire()
    one = call(wire)
    one.feed(body)
    ends(one)
    ends(one)
    assert wire.paid == len(body)
    assert wire.held == 0
