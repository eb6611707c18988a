"""Attacks by verified peers, and by strangers, on the server and the client that ship.

Each is shown twice: it does no harm, and where its control is out, it does.
"""

import gzip
import socket
import ssl
import threading
import time
import zlib
from contextlib import ExitStack

import grpc
import pytest
from OpenSSL import SSL

from tests.unit.transport.http2.wire import OPEN, headers, opened
from tests.unit.transport.support import (
    DOMAIN,
    GATEWAY,
    INFER,
    Echo,
    closes,
    connected,
    message,
    serving,
    until,
)
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Limits, heads, messages, tls
from ztserve.transport.http2 import Bounds, Request, encode, frames
from ztserve.transport.http2 import fields as http2_fields
from ztserve.transport.http2.bounds import Allowance
from ztserve.transport.http2.outbox import Outbox
from ztserve.transport.loop import house
from ztserve.transport.loop import server as loop_server
from ztserve.transport.loop.exchange import Exchange
from ztserve.transport.loop.house import STEPS, House
from ztserve.transport.loop.wire import Wire
from ztserve.types import Reply, Tensor

OTHER = f"spiffe://{DOMAIN}/ns/ml-inference/sa/other"
HELLO = frames.PREFACE + frames.settings({})
TAKES_NOTHING = frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0})


def nothing(*_, **__):
    return None


@pytest.fixture(scope="module")
def authority() -> ThrowAwayAuthority:
    return ThrowAwayAuthority(DOMAIN)


def head(stream: int, *more: tuple[bytes, bytes], path: str = INFER, end=False):
    block = encode(
        (
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", path.encode()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            *more,
        )
    )
    return headers(stream, block=block, end=end)


def body(stream: int, data: bytes, *, end: bool = True) -> bytes:
    pieces = [data[at : at + 16384] for at in range(0, len(data), 16384)]
    return b"".join(frames.frame(frames.DATA, 0, stream, one) for one in pieces) + (
        frames.frame(frames.DATA, 1, stream) if end else b""
    )


def reading(connection: ssl.SSLSocket) -> None:
    """Take what comes, and forget it."""
    threading.Thread(target=closes, args=(connection, 60), daemon=True).start()


def calls_of(served) -> list:
    return [one for wire in served.server._house.wires for one in wire._calls.values()]


# --- memory of a server -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_messages_that_nobody_has_read_are_not_expanded(
    authority, monkeypatch, control
):
    if not control:
        eager = lambda data: zlib.decompress(data, 31)  # noqa: E731
        monkeypatch.setattr(messages, "Compressed", eager)
        monkeypatch.setattr(Exchange, "_expanded", lambda _, message: message)
    bomb = gzip.compress(bytes(4 << 20))
    with serving(authority) as served, connected(served) as one:
        one.sendall(HELLO + head(1, (b"grpc-encoding", b"gzip")))
        one.sendall(body(1, messages.framed(message(t="wait")), end=False))
        assert served.service.running.acquire(timeout=5)
        one.sendall(body(1, (b"\1" + messages.framed(bomb)[1:]) * 20))
        (call,) = calls_of(served)
        until(lambda: call._ended, 10)
        held = sum(len(item) for item in call._arrived if item)
        assert (held < 1 << 20) is control
        assert (held >= 80 << 20) is not control


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_answers_that_nobody_takes_are_bounded_by_the_calls_in_flight(
    authority, monkeypatch, control
):
    if not control:
        monkeypatch.setattr(Wire, "_settle", nothing)
    limits = Limits(max_in_flight_per_principal=4, stream_idle_s=3)
    raw = messages.framed(message(t="x" * 5000))
    with serving(authority, limits=limits) as served, connected(served) as one:
        one.sendall(TAKES_NOTHING)
        reading(one)
        for stream in range(1, 61, 2):
            one.sendall(head(stream) + body(stream, raw))
            time.sleep(0.02)
        (wire,) = served.server._house.wires
        until(lambda: not wire._calls)
        kept = sum(wire._http2.unsent(stream) > 0 for stream in range(1, 61, 2))
        if not control:
            assert kept > 20
            assert served.server.in_flight == 0
            return
        assert 0 < kept <= 12
        assert served.server.in_flight == kept
        with served.channel(authority.issue(GATEWAY)) as honest:
            assert honest.unary_unary(INFER)(message(), timeout=5)
        until(lambda: served.server.in_flight == 0, 10)  # and it ends
        assert not wire._http2.open_streams


class Big(Echo):
    """Answers with 4 MiB."""

    def _answer(self, call, receive):
        super()._answer(call, receive)
        return Reply((Tensor("y", "UINT8", (4 << 20,), bytes(4 << 20)),))


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_a_connection_that_takes_nothing_at_all_keeps_its_calls_in_flight(
    authority, monkeypatch, control
):
    if not control:
        monkeypatch.setattr(Wire, "_settle", nothing)
    wide = frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
    with serving(authority, Big()) as served, connected(served) as one:
        one.sendall(wide + frames.window_update(0, 1 << 30))
        for stream in range(1, 9, 2):
            one.sendall(head(stream) + body(stream, messages.framed(message())))
        (wire,) = served.server._house.wires
        until(lambda: len(served.service.outcomes) == 4, 20)
        until(lambda: not wire._calls and wire._stuck < time.monotonic())
        time.sleep(0.3)
        assert (served.server.in_flight > 0) is control


@pytest.mark.slow
@pytest.mark.parametrize("most", [100_000, Limits().max_requests_bytes])
def test_requests_on_their_way_are_bounded_in_all(authority, most):
    part = b"\0" + (100_000).to_bytes(4, "big") + bytes(40_000)
    with (
        serving(authority, limits=Limits(max_requests_bytes=most)) as served,
        connected(served) as one,
    ):
        one.sendall(HELLO + b"".join(head(n) for n in (1, 3, 5)))
        until(lambda: len(served.service.calls) == 3)
        one.sendall(b"".join(body(n, part, end=False) for n in (1, 3, 5)))
        house = served.server._house
        if most > 1 << 20:
            until(lambda: house._held == 3 * len(part))
            return
        until(lambda: served.service.outcomes)
        assert "the limit is 100000" in str(served.service.outcomes[0])
        assert house._held <= most
        one.close()
        until(lambda: house._held == 0)


@pytest.mark.slow
@pytest.mark.parametrize("reserve", [loop_server.RESERVE, 1000])
def test_calls_too_many_do_not_make_threads(authority, monkeypatch, reserve):
    monkeypatch.setattr(loop_server, "RESERVE", reserve)
    limits = Limits(max_in_flight=4)
    with serving(authority, limits=limits) as served, connected(served) as one:
        # Nobody who has been refused lets go of its thread.
        go = threading.Event()
        served.server._desk.admission.enter = lambda *_, **__: go.wait(10)
        one.sendall(HELLO + b"".join(head(n) for n in range(1, 101, 2)))
        most = min(4 + reserve, 50)
        workers = served.server._workers
        until(lambda: workers._started == most)
        until(lambda: len(workers._jobs) == 50 - most)
        go.set()


@pytest.mark.parametrize("most", [http2_fields.MAX_REMEMBERED_BYTES, 1 << 30])
def test_heads_that_are_remembered_are_bounded_in_bytes(monkeypatch, most):
    monkeypatch.setattr(http2_fields, "MAX_REMEMBERED_BYTES", most)
    server = opened()
    for number in range(20):
        long = encode(((b"x", b"%d" % number + b"y" * 12_000),))
        server.receive(headers(2 * number + 1, block=OPEN + long))
    assert (server._reader._heads.size > 64 << 10) is (most > 64 << 10)


# --- time of a server ---------------------------------------------------------------


@pytest.mark.parametrize("control", [True, False])
def test_an_update_of_a_window_looks_at_just_what_may_go_on(monkeypatch, control):
    if not control:
        widen = Outbox.widen
        monkeypatch.setattr(
            Outbox, "widen", lambda self, n: widen(self, n) or self.waiting()
        )
    server, looked = opened(), []
    server.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 0}))
    for stream in range(1, 201, 2):
        server.receive(headers(stream, block=OPEN, end=True))
        server.headers(stream, heads.HEAD)
        server.data(stream, b"answer", end=True)
    flush = Outbox._flush
    monkeypatch.setattr(
        Outbox, "_flush", lambda *given: looked.append(1) or flush(*given)
    )
    server.receive(frames.window_update(0, 1024) * 100)
    assert len(looked) == (0 if control else 100 * 100)


@pytest.mark.slow
@pytest.mark.parametrize("most", [heads.MAX_VALUES, 1 << 20])
def test_commas_are_not_values_without_end(monkeypatch, most):
    monkeypatch.setattr(heads, "MAX_VALUES", most)
    request = Request(b"POST", b"https", b"", b"/a", ((b"a-bin", b"," * 15_000),))
    if most > 64:
        assert len(heads.metadata(request.fields)) == 15_001
    else:
        with pytest.raises(messages.Unreadable, match="over 64 values"):
            heads.metadata(request.fields)


def streams(count: int) -> range:
    return range(1, 2 * count, 2)


FLOODS = {
    "rapid reset": (
        b"".join(head(n) + frames.rst_stream(n, 8) for n in streams(500)),
        "reset",
    ),
    "made you reset": (
        b"".join(head(n) + frames.frame(8, 0, n, bytes(4)) for n in streams(500)),
        "reset",
    ),
    "more than there may be": (b"".join(head(n) for n in streams(600)), "reset"),
    "SETTINGS": (frames.settings({}) * 50, "settings"),
    "PING": (frames.frame(frames.PING, 0, 0, bytes(8)) * 100, "ping"),
    "empty DATA": (head(1) + frames.frame(0, 0, 1) * 1500, "idle"),
    "WINDOW_UPDATE": (frames.window_update(0, 1) * 1500, "idle"),
    "PRIORITY": (frames.frame(frames.PRIORITY, 0, 1, bytes(5)) * 1500, "idle"),
    "unknown frames": (frames.frame(0xB, 0, 0) * 1500, "idle"),
}


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_ends_its_connection_and_no_other(
    authority, monkeypatch, flood, control
):
    raw, allowance = FLOODS[flood]
    if not control:
        monkeypatch.setattr(Allowance, allowance, nothing)
    with (
        serving(authority) as served,
        served.channel(authority.issue(GATEWAY)) as honest,
        connected(served) as one,
    ):
        assert honest.unary_unary(INFER)(message(), timeout=5)
        one.sendall(HELLO + raw)
        assert closes(one, 10 if control else 1) is control
        assert honest.unary_unary(INFER)(message(), timeout=10)
        one.close()
        until(lambda: served.server.in_flight == 0)


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("bomb", ["a header list", "CONTINUATION"])
def test_a_header_bomb_ends_its_connection(authority, bomb, control):
    if bomb == "CONTINUATION":
        more = [frames.frame(frames.CONTINUATION, 0, 1)] * 100
        raw = head(1)[:4] + b"\0" + head(1)[5:] + b"".join(more)
    else:  # one entry of the table, named a thousand times
        entry = b"\x40\x01x" + b"\x7f\xa1\x17" + b"y" * 3104
        raw = headers(1, block=head(1)[9:] + entry + b"\xbe" * 1000)
    with serving(authority) as served:
        if not control:
            bounds = Bounds(max_header_bytes=1 << 24, max_continuations=1000)
            served.server._house.bounds = bounds
        with connected(served) as one:
            one.sendall(HELLO + raw)
            assert closes(one, 10 if control else 1) is control


# --- strangers ----------------------------------------------------------------------


class NoBooks(dict):
    """Forgets who has not shown a certificate."""

    def __setitem__(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_strangers_that_say_nothing_keep_no_place_from_others(authority, control):
    told = []
    with serving(
        authority,
        limits=Limits(max_connections=8, handshake_s=60),
        on_handshake_refused=lambda *what: told.append(what[0]),
    ) as served:
        if not control:
            served.server._house._strangers = NoBooks()
        address = (served.host, served.port)
        idle = [socket.create_connection(address) for _ in range(8)]
        until(lambda: len(served.server._house.wires) == 8)
        with served.channel() as honest:
            call = honest.unary_unary(INFER)
            if control:
                assert call(message(), timeout=10)
                until(lambda: "too many handshakes at once" in told)
            else:
                with pytest.raises(grpc.RpcError):
                    call(message(), timeout=2)
        for one in idle:
            one.close()


@pytest.mark.slow
@pytest.mark.parametrize("most", [6, 8], ids=["bounded", "no bound"])
def test_idle_connections_of_one_principal_leave_places_to_others(
    authority, monkeypatch, most
):
    """A certificate is enough for them; no policy lets this one do anything."""
    monkeypatch.setattr(house, "MAX_OF_ONE_ADDRESS", 8)
    monkeypatch.setattr(house, "MAX_OF_ONE_PRINCIPAL", most)
    told = []
    with (
        ExitStack() as kept,
        serving(
            authority, on_handshake_refused=lambda *what: told.append(what[0])
        ) as served,
    ):
        stranger = authority.issue(f"spiffe://{DOMAIN}/ns/dev/sa/stranger")
        idle = [kept.enter_context(connected(served, stranger)) for _ in range(8)]
        assert [closes(one, 0.3) for one in idle] == [False] * most + [True] * (
            8 - most
        )
        until(lambda: len(served.server._house.wires) == most)
        with served.channel() as honest:
            call = honest.unary_unary(INFER)
            if most < 8:
                assert call(message(), timeout=10)
                assert "TLS: too many connections of one SPIFFE ID" in told
            else:
                with pytest.raises(grpc.RpcError):
                    call(message(), timeout=2)


@pytest.mark.parametrize("steps", [STEPS, 1 << 30])
def test_a_flood_of_handshakes_leaves_turns_to_others(monkeypatch, steps):
    monkeypatch.setattr("ztserve.transport.loop.house.STEPS", steps)
    house = House(
        limits=Limits(),
        ends=None,
        credentials=None,
        methods={},
        admission=None,
        answer=nothing,
        refused=nothing,
    )
    turns, done = [], []
    house.soon = turns.append
    house.later = lambda _, action: turns.append(action)

    class Stranger:
        step = staticmethod(done.append)

    for _ in range(100):
        house.take_turn(Stranger(), b"hello")
    assert len(turns) == 1
    turns.pop()()
    assert len(done) == min(steps, 100)
    while turns:
        turns.pop()()
    assert len(done) == 100


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_tls_1_2_is_not_spoken(authority, monkeypatch, control):
    if not control:
        monkeypatch.setattr(SSL, "TLS1_3_VERSION", SSL.TLS1_2_VERSION)
    with serving(authority) as served:
        old = ssl.TLSVersion.TLSv1_2
        if control:
            with pytest.raises(ssl.SSLError):
                connected(served, most=old)
            return
        with connected(served, most=old) as one:
            assert one.version() == "TLSv1.2"
            one.sendall(HELLO + head(1) + body(1, messages.framed(message())))
            until(lambda: served.service.outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_without_a_certificate_there_is_no_call(authority, monkeypatch, control):
    """Two controls stand here, of OpenSSL's and of ours; one is enough."""
    if not control:
        monkeypatch.setattr(SSL, "VERIFY_FAIL_IF_NO_PEER_CERT", 0)
    with serving(authority) as served:
        with connected(served, anonymous=True) as one:
            assert closes(one)
        assert served.service.calls == []
        if control:
            return

        def believed(session):
            session.peer = authority_peer
            session.established = True

        with connected(served) as one:
            until(lambda: served.server._house.wires)
            (wire,) = served.server._house.wires
            until(lambda: wire.visitor.peer)
            authority_peer, chain = wire.visitor.peer, wire.visitor.chain
        monkeypatch.setattr(tls.Session, "_shake_hands", _without_us(believed, chain))
        with connected(served, anonymous=True) as one:
            one.sendall(HELLO + head(1) + body(1, messages.framed(message())))
            until(lambda: served.service.outcomes)


def _without_us(believed, chain):
    def shake(session):
        try:
            session._tls.do_handshake()
        except SSL.WantReadError:
            return
        session.chain = chain
        believed(session)

    return shake


@pytest.mark.slow
@pytest.mark.parametrize("patience_s", [0.5, 60.0])
def test_a_handshake_that_trickles_is_ended(authority, patience_s):
    limits = Limits(handshake_s=patience_s)
    with (
        serving(authority, limits=limits) as served,
        socket.create_connection((served.host, served.port)) as one,
    ):
        one.sendall(b"\x16\x03\x01")
        assert closes(one, 3) is (patience_s < 1)


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_a_session_that_is_resumed_proves_nothing(authority, monkeypatch, control):
    """Two controls stand here: no ticket is taken, and who is not judged is nobody."""
    if not control:
        monkeypatch.setattr(SSL, "OP_NO_TICKET", 0)
        monkeypatch.setattr(SSL, "SESS_CACHE_OFF", SSL.SESS_CACHE_SERVER)
        made = tls._context

        def resuming(*given):
            context = made(*given)
            context.set_session_id(b"known")
            return context

        monkeypatch.setattr(tls, "_context", resuming)
    told = []
    with serving(
        authority, on_handshake_refused=lambda *what: told.append(what[0])
    ) as served:
        with connected(served) as first:
            first.sendall(HELLO)
            first.recv(1)
            session, context = first.session, first.context
        raw = socket.create_connection((served.host, served.port), timeout=5)
        with context.wrap_socket(raw, session=session) as again:
            assert again.session_reused is not control
            again.sendall(HELLO)
            assert closes(again, 2) is not control
        assert served.service.calls == []
