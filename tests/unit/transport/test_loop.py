"""The server as its connections find it."""

import logging
import socket
import threading
import time
from itertools import pairwise

import grpc
import pytest

from tests.unit.transport import support
from tests.unit.transport.support import (
    CLI,
    GATEWAY,
    INFER,
    SERVER,
    STREAM,
    MovingSource,
    closes,
    connected,
    message,
    serving,
    until,
)
from ztserve.identity import Identity
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Limits, callers
from ztserve.transport.http2 import frames
from ztserve.transport.loop import carrier
from ztserve.transport.loop.wire import Wire
from ztserve.transport.refusals import MAX_KINDS, RefusedHandshakes

Code = grpc.StatusCode
pytestmark = pytest.mark.slow


@pytest.fixture
def told():
    return []


def test_each_refused_handshake_is_told_with_cause_and_address(authority, told):
    stranger = ThrowAwayAuthority(authority.trust_domain)
    with serving(
        authority, on_handshake_refused=lambda *what: told.append(what)
    ) as served:
        for _ in range(3):
            with socket.create_connection((served.host, served.port)) as raw:
                raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
                raw.recv(100)
        with pytest.raises(OSError), connected(served, stranger.issue(CLI)) as one:
            one.recv(1)
        socket.create_connection((served.host, served.port)).close()
        until(lambda: sum(count for _, count, _ in told) == 5)
    causes = {cause: count for cause, count, address in told}
    assert {address for *_, address in told} == {"127.0.0.1"}
    assert causes["not TLS"] == 3
    assert causes["connection closed in the handshake"] == 1
    assert any("trust" in c or "authority" in c for c in causes if "not trusted" in c)


def test_what_strangers_can_vary_is_counted_within_bounds(told):
    refusals = RefusedHandshakes(lambda *what: told.append(what))
    for number in range(1000):
        refusals.add(f"cause {number}", "10.0.0.1")
    refusals.tell()
    assert len(told) == MAX_KINDS + 1
    assert told[-1] == ("several causes", 1000 - MAX_KINDS, "")
    assert not refusals


def test_a_report_that_fails_keeps_none_back_and_is_made_again(told, caplog):
    def report(cause, count, address):
        told.append((cause, count))
        if told.count(("first", 1)) == 1 and cause == "first":
            raise ValueError("broken report")

    refusals = RefusedHandshakes(report)
    for cause in ("first", "second", "second"):
        refusals.add(cause, "10.0.0.1")
    refusals.tell()
    assert told == [("first", 1), ("second", 2)]
    assert "broken report" in caplog.text
    refusals.tell()
    refusals.tell()
    assert told == [("first", 1), ("second", 2), ("first", 1)]


def test_a_flood_of_refused_handshakes_is_one_report_a_second(authority, told):
    at = []

    def report(*what):
        told.append(what)
        at.append(time.monotonic())

    sent, end = 0, time.monotonic() + 2.2
    with serving(authority, on_handshake_refused=report) as served:
        while time.monotonic() < end:
            with socket.create_connection((served.host, served.port)) as raw:
                raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert raw.recv(1) == b""
            sent += 1
        assert 1 <= len(told) <= 3
        assert all(after - before > 0.9 for before, after in pairwise(at))
    assert {(cause, address) for cause, _, address in told} == {
        ("not TLS", "127.0.0.1")
    }
    assert sum(count for _, count, _ in told) == sent


class Together(support.Echo):
    """Answers the calls of one turn together."""

    takes_several = True

    def infer_all(self, calls):
        for at, (call, receive) in enumerate(calls):
            yield at, self.infer(call, receive)


@pytest.mark.parametrize("service", [support.Echo, Together])
@pytest.mark.parametrize("path", [INFER, STREAM])
def test_a_refusal_that_cannot_be_told_of_ends_its_call_at_once(
    authority, caplog, service, path
):
    """Refused all the same, and by name of nothing: there is no line in the audit."""

    def full(_refusal):
        raise OSError("no space left on the disk")

    nonsense = ((callers.HEADER, b"{}"),)
    with (
        serving(authority, service(), delegates=[CLI], on_refused=full) as served,
        served.channel() as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.stream_unary(path)(iter([message()]), 5, nonsense)
    assert caught.value.code() is Code.INTERNAL
    assert caught.value.details().startswith("internal error (call ")
    assert "no space left on the disk" in caplog.text
    assert served.service.calls == []


def test_a_handshake_that_takes_too_long_is_ended_and_told(authority, told):
    with (
        serving(
            authority,
            limits=Limits(handshake_s=0.5),
            on_handshake_refused=lambda *what: told.append(what),
        ) as served,
        socket.create_connection((served.host, served.port)) as raw,
    ):
        assert closes(raw)
        until(lambda: told)
    assert told == [("handshake took too long", 1, "127.0.0.1")]


def test_connections_are_bounded_in_total_and_give_their_places_back(authority, told):
    with serving(
        authority,
        limits=Limits(max_connections=3),
        on_handshake_refused=lambda *what: told.append(what),
    ) as served:
        held = [connected(served) for _ in range(3)]
        # Until then, the last of them is a stranger, and gives way.
        until(lambda: not served.server._house._strangers)
        with pytest.raises(OSError):
            connected(served)
        held.pop().close()
        until(lambda: len(served.server._house.wires) == 2)
        connected(served).close()
        until(lambda: ("too many connections", 1, "127.0.0.1") in told)
        for one in held:
            one.close()


def test_a_dropped_root_ends_idle_connections_within_seconds(authority):
    newer = ThrowAwayAuthority(authority.trust_domain)
    both = Identity(
        authority.issue(SERVER),
        {authority.trust_domain: (*authority.bundle, *newer.bundle)},
    )
    source = MovingSource(both)
    with serving(authority, source=source) as served:
        old = connected(served)
        new = connected(served, newer.issue(CLI))
        source.move(
            Identity(newer.issue(SERVER), {authority.trust_domain: newer.bundle})
        )
        assert closes(old)
        assert not closes(new, 0.5)
        old.close()
        new.close()


def test_an_svid_that_expires_ends_its_idle_connection(authority):
    with serving(authority) as served:
        one = connected(served, authority.issue(CLI, ttl_s=2))
        assert closes(one, 6)
        one.close()


def test_a_connection_that_is_old_is_drained_and_its_calls_end_well(authority):
    with (
        serving(authority, limits=Limits(max_connection_age_s=1.0)) as served,
        served.channel() as channel,
    ):
        held = channel.unary_unary(INFER).future(message(t="wait"), timeout=20)
        assert served.service.running.acquire(timeout=5)
        time.sleep(3.5)
        assert channel.unary_unary(INFER)(message(), timeout=5)  # on another one
        served.service.go.set()
        assert held.result(timeout=5)


def test_a_call_that_outlives_the_server_ends_without_a_fault(authority, caplog):
    service = support.Echo(pieces=3, pause_s=0.3)
    with serving(authority, service) as served, served.channel() as channel:
        next(channel.stream_stream(STREAM)(iter([message()]), timeout=5))
        served.server.stop(0)
        until(lambda: service.outcomes)
        time.sleep(0.1)
    assert [one for one in caplog.records if one.levelno >= logging.ERROR] == []


def test_what_was_refused_last_is_told_before_the_server_has_stopped(authority, told):
    with serving(
        authority, on_handshake_refused=lambda *what: told.append(what)
    ) as served:
        with socket.create_connection((served.host, served.port)) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert raw.recv(1) == b""
        served.server.stop(0)
        assert told == [("not TLS", 1, "127.0.0.1")]


def test_what_is_written_is_not_held_back_for_the_peer_to_acknowledge(authority):
    with serving(authority) as served:
        one = connected(served)
        until(lambda: served.server._house.wires)
        (wire,) = served.server._house.wires
        its = wire._transport._socket
        assert its.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        one.close()


def test_a_caller_that_takes_nothing_of_a_stream_holds_little(authority):
    with serving(authority, support.Echo(pieces=100_000)) as served:
        one = connected(served)
        one.sendall(
            frames.PREFACE
            + frames.settings({frames.INITIAL_WINDOW_SIZE: 0})
            + _call(STREAM)
        )
        until(lambda: served.server.in_flight == 1)
        time.sleep(0.5)
        (wire,) = served.server._house.wires
        (call,) = wire._calls.values()
        assert call._given - call._taken + wire._http2.unsent(1) < 1 << 20
        one.close()
        until(lambda: served.server.in_flight == 0)


def _call(path):
    from ztserve.transport.http2 import encode

    block = encode(
        (
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", path.encode()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
    )
    body = message()
    raw = b"\0" + len(body).to_bytes(4, "big") + body
    return frames.frame(frames.HEADERS, 4, 1, block) + frames.frame(
        frames.DATA, 1, 1, raw
    )


def test_calls_of_one_turn_are_answered_each_to_its_own_caller(authority):
    with serving(authority) as served:
        seen = []

        def ask(number):
            svid = authority.issue(CLI if number % 2 else GATEWAY)
            with served.channel(svid) as channel:
                for _ in range(20):
                    seen.append(len(channel.unary_unary(INFER)(message(), timeout=10)))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert len(seen) == 160
        peers = [call.peer.id for call in served.service.calls]
        assert peers.count(CLI) == peers.count(GATEWAY) == 80


@pytest.mark.parametrize(
    ("block", "status"),
    [
        ({b":method": b"GET"}, b"415"),
        ({b"content-type": b"text/plain"}, b"415"),
    ],
)
def test_what_is_no_call_of_grpc_is_told_so(authority, block, status):
    from hpack import Decoder

    from ztserve.transport.http2 import encode

    fields = {
        b":method": b"POST",
        b":scheme": b"https",
        b":path": INFER.encode(),
        b"content-type": b"application/grpc",
    } | block
    with serving(authority) as served, connected(served) as one:
        one.sendall(
            frames.PREFACE
            + frames.settings({})
            + frames.frame(frames.HEADERS, 5, 1, encode(fields.items()))
        )
        data = b""
        while (at := data.find(b"\x01\x05\0\0\0\x01")) < 0:
            data += one.recv(65536)
        length = int.from_bytes(data[at - 3 : at], "big")
        head = dict(Decoder().decode(data[at + 6 : at + 6 + length], raw=True))
        assert head[b":status"] == status


def test_a_peer_that_is_gone_without_a_word_is_asked_and_let_go(authority, monkeypatch):
    monkeypatch.setattr(carrier, "QUIET_S", 0.5)
    monkeypatch.setattr(carrier, "ANSWER_S", 1.0)
    with serving(authority) as served, served.channel() as channel:
        channel.unary_unary(INFER)(message(), timeout=5)
        silent = connected(served)  # which answers no ping
        silent.sendall(frames.PREFACE + frames.settings({}))
        until(lambda: len(served.server._house.wires) == 2)
        assert closes(silent, 6)
        silent.close()
        time.sleep(2)  # the stock client answers, and stays
        (left,) = served.server._house.wires
        channel.unary_unary(INFER)(message(), timeout=5)
        assert served.server._house.wires == {left}


def test_a_peer_that_takes_nothing_is_let_go(authority):
    with serving(
        authority, support.Echo(pieces=1), limits=Limits(stream_idle_s=1.0)
    ) as served:
        one = connected(served)
        wide = frames.settings({frames.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
        one.sendall(frames.PREFACE + wide + frames.window_update(0, 1 << 30))
        body = message(t="x" * (4 << 20))
        raw = b"\0" + len(body).to_bytes(4, "big") + body
        threading.Thread(target=_flood, args=(one, raw), daemon=True).start()
        until(lambda: served.service.outcomes, 10)
        until(lambda: not served.server._house.wires, 10)
        one.close()


def _flood(connection, raw):
    """Ask for much, and read nothing of it."""
    try:
        for stream in range(1, 41, 2):
            connection.sendall(_call(INFER)[: -len(_call_data())])
            for at in range(0, len(raw), 16_000):
                end = at + 16_000 >= len(raw)
                connection.sendall(
                    frames.frame(frames.DATA, int(end), stream, raw[at : at + 16_000])
                )
    except OSError:
        pass


def _call_data():
    body = message()
    raw = b"\0" + len(body).to_bytes(4, "big") + body
    return frames.frame(frames.DATA, 1, 1, raw)


def test_a_fault_in_looking_at_one_connection_is_no_fault_of_the_server(
    authority, monkeypatch, caplog
):
    def fault(*_):
        raise ValueError("a fault")

    monkeypatch.setattr(Wire, "look", fault)
    with serving(authority) as served, served.channel() as channel:
        channel.unary_unary(INFER)(message(), timeout=5)
        until(lambda: "could not be carried" in caplog.text)
        channel.unary_unary(INFER)(message(), timeout=5)
