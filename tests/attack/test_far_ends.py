"""Whom we believe, and what a hostile server can do to a client.

Each attack is shown twice: it does no harm, and where its control is out, it does.
"""

import socket
import time

import grpc
import pytest

from tests.unit.transport.http2.wire import headers
from tests.unit.transport.scripted import Scripted, answers
from tests.unit.transport.support import (
    CLI,
    DOMAIN,
    GATEWAY,
    INFER,
    SERVER,
    Echo,
    MovingSource,
    closes,
    message,
    serving,
)
from ztserve.errors import DeadlineExceeded, Denied, Interrupted, Unavailable
from ztserve.identity import Identity, dns_name
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Client, callers, tls
from ztserve.transport.http2 import Bounds, encode, frames
from ztserve.transport.http2.bounds import Allowance
from ztserve.transport.loop.channel import Channel, Expected
from ztserve.transport.loop.link import Link
from ztserve.types import Caller

OTHER = f"spiffe://{DOMAIN}/ns/ml-inference/sa/other"
HELLO = frames.PREFACE + frames.settings({})
TAKES_NOTHING = frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0})


def nothing(*_, **__):
    return None


@pytest.fixture(scope="module")
def authority() -> ThrowAwayAuthority:
    return ThrowAwayAuthority(DOMAIN)


# --- who is at the other end --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_a_wrong_server_gets_no_byte_of_a_request(authority, monkeypatch, control):
    if not control:
        monkeypatch.setattr(Expected, "check", nothing)
    source = authority.source(CLI)
    server = Scripted(authority.source(OTHER), answers(b""))
    with Client(server.address, source=source, server_id=SERVER) as client:
        if control:
            with pytest.raises(Unavailable, match="not for the expected"):
                client.ready(timeout_s=2)
        else:
            assert client.ready(timeout_s=5) is False
    server.close()
    assert (server.received > 0) is not control


@pytest.mark.slow
def test_a_name_in_dns_proves_nothing_to_us(authority):
    """Whom a stock client believes by it, ours does not."""
    impostor = authority.forge(OTHER, dns=(dns_name(SERVER),))
    source = MovingSource(Identity(impostor, authority.bundles))
    with serving(authority, source=source) as served:
        with served.channel() as fooled:
            assert fooled.unary_unary(INFER)(message(), timeout=5)
        mine = authority.source(CLI)
        with (
            Client(served.address, source=mine, server_id=SERVER) as client,
            pytest.raises(Unavailable, match="not for the expected"),
        ):
            client.infer({"t": "secret"}, timeout_s=2)
        assert len(served.service.calls) == 1


class Choosy(Echo):
    """B, which denies Eve whoever calls for her."""

    def _judge(self, call) -> None:
        super()._judge(call)
        if call.caller is not None and call.caller.subject == "eve":
            raise Denied("not for her", "eve is denied")


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_a_does_not_reach_b_for_a_caller_whom_b_denies(authority, control):
    eve = Caller("https://issuer", "eve", {}, "x509-svid")
    delegates = [GATEWAY] if control else []
    with (
        serving(authority, Choosy(), delegates=delegates) as served,
        Client(served.address, source=authority.source(GATEWAY), server_id=SERVER) as a,
    ):
        assert a.infer({"t": "as a itself"}, timeout_s=5)
        if control:
            with pytest.raises(Denied):
                a.infer({"t": "hi"}, caller=eve, timeout_s=5)
        else:
            assert a.infer({"t": "hi"}, caller=eve, timeout_s=5)


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_a_caller_header_for_another_callee_is_worth_nothing(
    authority, monkeypatch, control
):
    if not control:
        read = callers.read
        monkeypatch.setattr(
            callers,
            "read",
            lambda raw, audience, peer: read(raw, audience=OTHER, peer=peer),
        )
    ada = Caller("https://issuer", "ada", {}, "x509-svid")
    given = ((callers.HEADER, callers.written(ada, audience=OTHER, request=message())),)
    with (
        serving(authority, delegates=[GATEWAY]) as served,
        served.channel(authority.issue(GATEWAY)) as a,
    ):
        call = a.unary_unary(INFER)
        if control:
            with pytest.raises(grpc.RpcError):
                call(message(), timeout=5, metadata=given)
        else:
            assert call(message(), timeout=5, metadata=given)
            assert served.service.calls[-1].caller.subject == "ada"


# --- a hostile server ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_a_server_that_goes_away_at_once_is_not_dialled_without_pause(
    authority, monkeypatch, control
):
    if not control:
        monkeypatch.setattr(Channel, "_hold_off", nothing)
    silly = Scripted(authority.source(SERVER), nothing, silent=True)
    heard = Scripted._heard

    def leaving(self, http2, plain):
        yield from heard(self, http2, plain)
        http2.drain(final=True)
        http2.end()

    silly._silent = False
    monkeypatch.setattr(Scripted, "_heard", leaving)
    with Client(
        silly.address, source=authority.source(CLI), server_id=SERVER
    ) as client:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with pytest.raises((Unavailable, Interrupted, DeadlineExceeded)):
                client.ready(timeout_s=0.5)
    silly.close()
    assert (silly.connections <= 8) is control


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_calls_that_were_given_up_leave_the_queue(authority, monkeypatch, control):
    if not control:
        monkeypatch.setattr(Link, "cancel", nothing)
    none = Scripted(authority.source(SERVER), nothing, bounds=Bounds(max_streams=0))
    with Client(none.address, source=authority.source(CLI), server_id=SERVER) as client:
        for _ in range(4):
            with pytest.raises(DeadlineExceeded):
                client.ready(timeout_s=0.5)
        (channel,) = client._route.replicas
        (link,) = channel._links
        assert bool(link._queue) is not control
    none.close()


INTERIM = frames.frame(frames.HEADERS, 4, 1, encode(((b":status", b"103"),)))
ENDED = headers(1, block=encode(((b":status", b"500"),)), end=True)
STORMS = {
    "interim heads": (INTERIM * 1500, "idle"),
    "resets of what has ended": (ENDED + frames.rst_stream(1, 0) * 1500, "idle"),
    "resets by an error": (ENDED + frames.rst_stream(1, 2) * 500, "reset"),
    "GOAWAY": (frames.goaway(1, 0) * 1500, "idle"),
    "PING": (frames.frame(frames.PING, 0, 0, bytes(8)) * 100, "ping"),
    "SETTINGS": (frames.settings({}) * 50, "settings"),
}


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("storm", STORMS)
def test_a_server_that_storms_is_left(authority, monkeypatch, storm, control):
    raw, allowance = STORMS[storm]
    server = Scripted(authority.source(SERVER), lambda *_: raw)
    offences = []
    ended = Link._handle

    def handle(link, event):
        offences.extend([event.reason] if hasattr(event, "reason") else [])
        ended(link, event)

    monkeypatch.setattr(Link, "_handle", handle)
    if not control:
        monkeypatch.setattr(Allowance, allowance, nothing)
    with Client(
        server.address, source=authority.source(CLI), server_id=SERVER
    ) as client:
        with pytest.raises(Exception, match=r"\w"):
            client.ready(timeout_s=2)
        time.sleep(0.1)
    server.close()
    assert any("too many" in reason for reason in offences) is control


class Deaf:
    """An attribute that is never true."""

    def __get__(self, *_):
        return False

    def __set__(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_what_breaks_tls_behind_something_good_ends_the_connection(
    authority, monkeypatch, caplog, control
):
    """Else it would take calls that can neither be sent nor answered."""
    if not control:
        monkeypatch.setattr(tls.Session, "ended", Deaf())
    with serving(authority) as served:
        end = tls.Ends(authority.source(CLI)).connect(nothing)
        with socket.create_connection((served.host, served.port), timeout=5) as one:
            one.sendall(end.begin())
            while not end.established:
                end.receive(one.recv(65536))
                one.sendall(end.outgoing())
            one.sendall(end.write(frames.PREFACE + frames.settings({})))
            time.sleep(0.2)
            ping = end.write(frames.frame(frames.PING, 0, 0, bytes(8)))
            one.sendall(ping + b"\x17\x03\x03\x00\x20" + bytes(32))
            assert closes(one, 2) is control
    assert ("could not be carried" in caplog.text) is not control
