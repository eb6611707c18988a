"""How the pieces of streams leave: the first at once, those that follow together."""

import pytest

from ztserve.transport import heads, messages
from ztserve.transport.http2 import Request
from ztserve.transport.limits import Limits
from ztserve.transport.loop.exchange import Exchange
from ztserve.transport.loop.wire import LINGER_S, Wire


class Loop:
    """What a house does, by hand."""

    def __init__(self):
        self.posted, self.turns, self.timers = [], [], []
        self.limits, self.bounds = Limits(), None
        self.soon = self.turns.append
        self.hold = lambda count: None

    def post(self, action, *arguments):
        self.posted.append((action, arguments))

    def later(self, seconds, action):
        assert seconds == LINGER_S <= 0.001
        self.timers.append(action)

    def run_posted(self):
        posted, self.posted = self.posted, []
        for action, arguments in posted:
            action(*arguments)

    def run_timer(self):
        (action,), self.timers[:] = self.timers, []
        action()


class Http2:
    def __init__(self):
        self.sent = []

    def headers(self, stream_id, block, *, end=False):
        self.sent.append(block)

    def data(self, stream_id, data):
        self.sent.append(data)

    def unsent(self, stream_id):
        return 0

    def consumed(self, stream_id, count):
        pass


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def wire(loop):
    wire = Wire(loop)
    wire._http2 = Http2()
    return wire


@pytest.fixture
def call(wire):
    request = Request(b"POST", b"https", b"", b"/s/M", (), None)
    return Exchange(wire, 1, request, 1 << 20)


def test_the_first_piece_is_not_held(loop, wire, call):
    wire.piece(call, b"one")
    loop.run_posted()
    assert wire._http2.sent == [heads.HEAD, messages.framed(b"one")]
    assert loop.turns == [wire._write]


def test_what_follows_soon_leaves_together_and_wakes_nobody(loop, wire, call):
    wire.piece(call, b"0")
    loop.run_posted()
    for number in range(1, 100):
        wire.piece(call, b"%d" % number)
    assert not loop.posted
    assert len(wire._http2.sent) == 2
    loop.run_timer()
    rest = b"".join(messages.framed(b"%d" % number) for number in range(1, 100))
    assert wire._http2.sent[2:] == [rest]
    assert len(loop.turns) == 1


def test_a_connection_that_was_quiet_writes_at_once_again(loop, wire, call):
    wire.piece(call, b"one")
    loop.run_posted()
    loop.run_timer()
    assert not loop.timers
    wire.piece(call, b"two")
    loop.run_posted()
    assert wire._http2.sent[-1] == messages.framed(b"two")
    assert len(loop.timers) == 1


def test_pieces_of_several_calls_keep_their_order(loop, wire, call):
    request = Request(b"POST", b"https", b"", b"/s/M", (), None)
    other = Exchange(wire, 3, request, 1 << 20)
    for one, text in ((call, b"a"), (other, b"x"), (call, b"b"), (other, b"y")):
        wire.piece(one, text)
    assert len(loop.posted) == 1
    loop.run_posted()
    texts = [one for one in wire._http2.sent if one != heads.HEAD]
    assert texts == [
        messages.framed(b"a") + messages.framed(b"b"),
        messages.framed(b"x") + messages.framed(b"y"),
    ]


def test_the_end_of_a_call_takes_along_what_was_held(loop, wire, call):
    wire.piece(call, b"one")
    loop.run_posted()
    wire.piece(call, b"two")
    call.status = heads.GOOD
    wire.end(call)
    assert wire._http2.sent[2:] == [messages.framed(b"two"), heads.OK]
    loop.run_timer()
    assert not loop.timers


def test_an_abort_after_a_piece_sends_no_second_head(wire, call):
    call.status = heads.Status(8, "enough", ())
    wire.piece(call, b"one")
    wire.end(call)  # before the loop has looked at the piece
    assert wire._http2.sent == [
        heads.HEAD,
        messages.framed(b"one"),
        heads.trailers(call.status),
    ]


def test_a_thread_that_gave_too_much_waits_for_the_loop(loop, wire, call):
    assert call.reserve(1 << 20)
    wire.piece(call, b"x" * (1 << 20))
    assert not call._has_room()
    loop.run_posted()
    assert call.reserve(1)
