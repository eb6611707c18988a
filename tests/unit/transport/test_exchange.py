"""What one call owes its connection."""

import pytest

from ztserve.transport import messages
from ztserve.transport.http2 import Request
from ztserve.transport.loop.exchange import Exchange


class Wire:
    def __init__(self):
        self.paid = self.held = 0

    def hold(self, count):
        self.held += count

    def consumed(self, stream_id, count):
        self.paid += count


@pytest.mark.parametrize("ends", [Exchange.finish, Exchange.cut])
@pytest.mark.parametrize("body", [messages.framed(b"whole"), b"\0\0\0\0\5part"])
def test_a_call_that_ends_owes_its_connection_nothing(body, ends):
    """Else the window of the connection shrinks by each request, until it is closed."""
    wire, request = Wire(), Request(b"POST", b"https", b"a", b"/s/m", ())
    call = Exchange(wire, 1, request, 100)
    call.feed(body)
    ends(call)
    ends(call)
    assert wire.paid == len(body)
    assert wire.held == 0
