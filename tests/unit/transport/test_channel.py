"""What the client's connections do, whatever the server is."""

import asyncio
import contextlib
import gc
import socket
import threading
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.unit.transport.scripted import Scripted, answers
from tests.unit.transport.support import (
    CLI,
    SERVER,
    Echo,
    MovingSource,
    serving,
)
from tests.unit.transport.test_quarantine import shut_out
from ztserve import errors
from ztserve.identity import Identity, Quarantine, SpiffeId
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import AsyncClient, Client, Limits, heads, messages, protocol
from ztserve.transport.http2 import Bounds, Code, encode, frames
from ztserve.transport.loop import carrier
from ztserve.transport.loop import channel as channels
from ztserve.transport.loop.call import AwaitedCall
from ztserve.transport.loop.channel import Channel, Expected
from ztserve.transport.loop.thread import LoopThread
from ztserve.transport.retry import Attempts, Budget
from ztserve.transport.tls import Ends
from ztserve.transport.v1 import inference_pb2 as pb

READY = pb.ServerReadyResponse(ready=True).SerializeToString()


@contextmanager
def scripted(authority, answer, **given):
    server = Scripted(authority.source(SERVER), answer, **given)
    try:
        with Client(
            server.address, source=authority.source(CLI), server_id=SERVER
        ) as client:
            yield server, client
    finally:
        server.close()


def until(fact, seconds=5.0):
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# --- whom it calls ------------------------------------------------------------------


def test_an_svid_without_any_dns_name_is_known_by_its_spiffe_id(authority) -> None:
    source = MovingSource(
        Identity(authority.forge(SERVER, dns=()), authority.bundles)
    )  # as SPIRE issues them
    with (
        serving(authority, source=source) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
    ):
        assert client.infer({"t": "hi"})["t"] == "hi"


def test_not_a_byte_goes_to_another_server(authority) -> None:
    other = authority.source(f"spiffe://{authority.trust_domain}/ns/a/sa/other")
    server = Scripted(other, answers(READY))
    try:
        with (
            Client(
                server.address, source=authority.source(CLI), server_id=SERVER
            ) as client,
            pytest.raises(
                errors.Unavailable, match="not for the expected SPIFFE ID"
            ) as caught,
        ):
            client.ready()
        assert "the server is spiffe://" in caught.value.reason
        assert server.connections > 0
        assert server.received == 0
    finally:
        server.close()


def test_a_server_that_is_no_grpc_server_is_told_as_such(authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    raw, _ = listener.accept()
                    raw.recv(10_000)
                    raw.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    raw.close()

        thread = threading.Thread(target=greet)
        thread.start()
        with (
            Client(
                f"127.0.0.1:{port}", source=authority.source(CLI), server_id=SERVER
            ) as client,
            pytest.raises(errors.Unavailable, match="does not speak TLS"),
        ):
            client.ready()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.slow
def test_a_server_that_never_speaks_is_not_waited_for(authority, monkeypatch) -> None:
    monkeypatch.setattr(channels, "DIAL_S", 0.3)
    with scripted(authority, answers(READY), silent=True) as (_, client):
        with pytest.raises(errors.Unavailable, match="did not answer in time"):
            client.ready()
        with pytest.raises(errors.Unavailable, match="did not answer in time"):
            client.ready()


# --- what it makes of answers -------------------------------------------------------


def test_an_answer_is_read(authority) -> None:
    with scripted(authority, answers(READY)) as (server, client):
        assert client.ready()
    fields = dict(server.heads[0].head.fields)
    assert fields[b"te"] == b"trailers"
    assert fields[b"content-type"] == b"application/grpc"
    assert fields[b"grpc-timeout"] == b"30000m"
    assert server.heads[0].head.authority == server.address.encode()


def head_only(*fields: tuple[bytes, bytes]):
    return lambda http2, n: http2.headers(n, encode(fields), end=True)


def reset(code: Code):
    return lambda http2, n: http2.reset(n, code)


def garbage(http2, stream_id) -> bytes:
    return frames.frame(frames.PUSH_PROMISE, 0, stream_id, b"\0\0\0\2")


def half(http2, stream_id) -> None:
    http2.headers(stream_id, heads.HEAD)
    http2.data(stream_id, b"\0\0\0\0\x09half")
    http2.headers(stream_id, heads.OK, end=True)


def without_trailers(http2, stream_id) -> None:
    http2.headers(stream_id, heads.HEAD)
    http2.data(stream_id, messages.framed(READY), end=True)


def compressed(http2, stream_id) -> None:
    gzip_head = encode((*(STATUS, GRPC), (b"grpc-encoding", b"gzip")))
    http2.headers(stream_id, gzip_head)
    body = zlib.compress(READY, wbits=31)
    http2.data(stream_id, b"\1" + len(body).to_bytes(4, "big") + body)
    http2.headers(stream_id, heads.OK, end=True)


def not_grpc(http2, stream_id) -> None:
    http2.headers(
        stream_id, encode(((b":status", b"200"), (b"content-type", b"text/html")))
    )


STATUS = (b":status", b"200")
GRPC = (b"content-type", b"application/grpc")


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (head_only((b":status", b"503")), errors.Interrupted, "HTTP status 503"),
        (head_only((b":status", b"404")), errors.NotFound, "HTTP status 404"),
        (not_grpc, errors.InferenceError, "the answer is not gRPC"),
        (head_only(STATUS, GRPC), errors.Interrupted, "without a grpc-status"),
        (
            head_only(STATUS, GRPC, (b"grpc-status", b"x")),
            errors.Interrupted,
            "without a grpc-status",
        ),
        (
            head_only(
                STATUS, GRPC, (b"grpc-status", b"7"), (b"grpc-message", b"n%C3%B6")
            ),
            errors.Denied,
            "nö",
        ),
        (head_only(STATUS, GRPC, (b"grpc-status", b"0")), errors.InferenceError, "0 m"),
        (answers(READY, READY), errors.InferenceError, "2 messages, not one"),
        (answers(), errors.InferenceError, "0 messages, not one"),
        (half, errors.Interrupted, "within a message"),
        (compressed, errors.Interrupted, "a compressed message"),
        (without_trailers, errors.Interrupted, "without a grpc-status"),
        (reset(Code.CANCEL), errors.Interrupted, "the server ended the call"),
        (reset(Code.ENHANCE_YOUR_CALM), errors.Interrupted, "may have run"),
        (garbage, errors.Interrupted, "PUSH_PROMISE"),
    ],
)
def test_an_answer_that_is_none_is_a_typed_error(
    authority, answer, error, words
) -> None:
    with (
        scripted(authority, answer) as (server, client),
        pytest.raises(error, match=words),
    ):
        client.ready()
    assert len(server.heads) == 1  # it may have run: not sent again


def test_a_refused_stream_did_not_run_and_is_sent_again(authority) -> None:
    seen: list[int] = []

    def third_time(http2, stream_id) -> None:
        seen.append(stream_id)
        (answers(READY) if len(seen) > 2 else reset(Code.REFUSED_STREAM))(
            http2, stream_id
        )

    with scripted(authority, third_time) as (_, client):
        assert client.ready()
    assert len(seen) == 3


def test_what_goaway_names_as_not_run_is_sent_again_elsewhere(authority) -> None:
    seen: list[int] = []

    def leaving(http2, stream_id) -> bytes | None:
        seen.append(stream_id)
        if len(seen) == 1:
            return frames.goaway(0, Code.NO_ERROR, b"")
        answers(READY)(http2, stream_id)
        return None

    with scripted(authority, leaving) as (server, client):
        assert client.ready()
    assert server.connections == 2


def test_an_answer_beyond_what_it_takes_ends_the_stream(authority, monkeypatch) -> None:
    monkeypatch.setattr("ztserve.transport.protocol.MAX_MESSAGE_BYTES", 100)

    def endless(http2, stream_id) -> None:
        http2.headers(stream_id, heads.HEAD)
        http2.data(stream_id, b"\0\x7f\xff\xff\xff" + bytes(1000))

    with scripted(authority, endless) as (server, client):
        with pytest.raises(errors.InvalidInput, match="larger than"):
            client.ready()
        until(lambda: [one.code for one in server.resets] == [Code.CANCEL])


# --- connections --------------------------------------------------------------------


@pytest.mark.slow
def test_more_calls_than_streams_wait_their_turn(authority) -> None:
    limits = Limits(max_streams_per_connection=2)
    with (
        serving(authority, limits=limits) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
        ThreadPoolExecutor(10) as pool,
    ):
        answers = list(pool.map(lambda n: client.infer({"t": str(n)}), range(50)))
    assert [one["t"] for one in answers] == [str(n) for n in range(50)]


def test_a_call_that_waits_its_turn_can_be_given_up(authority) -> None:
    with scripted(authority, lambda http2, n: None, bounds=Bounds(max_streams=1)) as (
        server,
        client,
    ):
        first = threading.Thread(target=lambda: quietly(client, 1.0))
        first.start()
        until(lambda: server.heads)
        with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.2 s"):
            client.ready(timeout_s=0.2)
        first.join()
        assert len(server.heads) == 1


def quietly(client: Client, timeout_s: float) -> None:
    with pytest.raises(errors.ZTServeError):
        client.ready(timeout_s=timeout_s)


def test_a_broken_connection_ends_its_calls_and_takes_no_more(authority) -> None:
    with scripted(authority, lambda http2, n: None) as (server, client):
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                client.ready()
            except errors.ZTServeError as error:
                failed.append(error)

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for one in threads:
            one.start()
        until(lambda: len(server.heads) == 5)
        server.close()
        for one in threads:
            one.join()
        assert [type(one) for one in failed] == [errors.Interrupted] * 5
        with pytest.raises(errors.Unavailable, match="nothing listens there"):
            client.ready()


@pytest.mark.slow
def test_a_server_that_is_gone_without_a_word_is_asked_and_let_go(
    authority, monkeypatch
) -> None:
    monkeypatch.setattr(carrier, "QUIET_S", 0.5)
    monkeypatch.setattr(carrier, "ANSWER_S", 1.0)
    deaf = threading.Event()

    def silent(http2, stream_id) -> None:
        deaf.set()
        time.sleep(4)  # no ping is answered meanwhile

    with scripted(authority, silent) as (_, client):
        began = time.monotonic()
        with pytest.raises(errors.Interrupted, match="connection broke"):
            client.ready()
        assert deaf.is_set()
        assert time.monotonic() - began < 4


@pytest.mark.slow
def test_small_answers_do_not_use_up_the_connections_window(authority) -> None:
    body = pb.ServerReadyResponse(ready=True)
    big = body.SerializeToString() + b"\x9a\x06" + b"\x80\x80\x02" + bytes(1 << 15)
    with scripted(authority, answers(big)) as (server, client):
        for _ in range(300):  # 9.6 MB, where the window has 8
            assert client.ready(timeout_s=5)
        assert server.connections == 1


@pytest.mark.slow
def test_connections_that_grow_old_cost_no_call(authority) -> None:
    with (
        serving(authority, limits=Limits(max_connection_age_s=0.5)) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
    ):
        end = time.monotonic() + 3.5
        while time.monotonic() < end:
            client.infer({"t": "hi"})
        ports = {call.source_port for call in served.service.calls}
    assert len(ports) >= 2


@pytest.mark.slow
def test_the_server_is_verified_anew_before_its_svid_expires(authority) -> None:
    source = MovingSource(Identity(authority.issue(SERVER, ttl_s=4), authority.bundles))
    with (
        serving(authority, source=source) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
    ):
        client.infer({"t": "hi"})
        source.move(Identity(authority.issue(SERVER), authority.bundles))
        end = time.monotonic() + 6
        while time.monotonic() < end:
            client.infer({"t": "hi"})
            time.sleep(0.02)
        assert len({call.source_port for call in served.service.calls}) == 2


@pytest.mark.slow
def test_a_stream_is_cut_when_the_servers_svid_expires(authority) -> None:
    svid = authority.issue(SERVER, ttl_s=2)
    source = MovingSource(Identity(svid, authority.bundles))
    with (
        serving(authority, Echo(pieces=10**6, pause_s=0.05), source=source) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
    ):
        pieces = client.stream({"t": "hi"})
        next(pieces)
        source.move(Identity(authority.issue(SERVER), authority.bundles))
        began = time.monotonic()
        with pytest.raises(errors.Interrupted, match="may not be believed"):  # noqa: PT012
            for _ in pieces:
                assert time.monotonic() - began < 6


def test_a_slow_reader_holds_up_the_server_and_no_memory(authority) -> None:
    pieces = 2000
    service = Echo(pieces=pieces)
    with (
        serving(authority, service) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
    ):
        stream = client.stream({"t": "x" * 4096})
        next(stream)
        time.sleep(0.5)
        assert service.outcomes == []  # the server waits
        (way,) = client._route.replicas
        (call,) = way._link._calls.values()
        held = sum(map(len, call._arrived))
        assert held < 2 << 20
        assert sum(1 for _ in stream) == pieces - 1


def test_a_client_that_is_closed_lets_what_runs_end(authority) -> None:
    with serving(authority) as served, ThreadPoolExecutor(1) as pool:
        client = Client(served.address, source=authority.source(CLI), server_id=SERVER)
        running = pool.submit(client.infer, {"t": "wait"})
        assert served.service.running.acquire(timeout=5)
        client.close()
        with pytest.raises(errors.Unavailable, match="closed"):
            client.infer({"t": "hi"})
        served.service.go.set()
        assert running.result(5)["t"] == "wait"
        until(lambda: not client._thread._thread.is_alive())


def test_a_client_leaves_no_thread_and_no_socket(authority) -> None:
    before = threading.active_count()
    with scripted(authority, answers(READY)) as (server, client):
        client.ready()
        client.close()
        until(lambda: not server._open)
    until(lambda: threading.active_count() <= before)


def test_a_waiting_call_is_told_what_is_wrong_and_the_next_one_at_once(
    authority,
) -> None:
    async def run() -> None:
        async with AsyncClient(
            "127.0.0.1:1", source=authority.source(CLI), server_id=SERVER
        ) as client:
            told = await asyncio.gather(
                *(client.ready(timeout_s=0.2) for _ in range(8)), return_exceptions=True
            )
            assert {type(one) for one in told} == {errors.Unavailable}
            assert len({id(one) for one in told}) == 8

    asyncio.run(run())


def test_another_authority_of_our_domain_is_not_believed(authority) -> None:
    stranger = ThrowAwayAuthority(authority.trust_domain)
    source = MovingSource(Identity(stranger.issue(SERVER), authority.bundles))
    server = Scripted(source, answers(READY))
    try:
        with (
            Client(
                server.address, source=authority.source(CLI), server_id=SERVER
            ) as client,
            pytest.raises(errors.Unavailable, match="not signed by the trust bundle"),
        ):
            client.ready()
        assert server.received == 0
    finally:
        server.close()


@pytest.mark.slow
def test_a_stolen_certificate_of_the_server_is_no_longer_believed(
    authority, tmp_path
) -> None:
    path = tmp_path / "quarantine.json"
    stolen, good = authority.issue(SERVER), authority.issue(SERVER)
    source = MovingSource(Identity(stolen, authority.bundles))
    with (
        Quarantine(path) as quarantine,
        serving(authority, Echo(pieces=10**6, pause_s=0.02), source=source) as served,
        Client(
            served.address,
            source=authority.source(CLI),
            server_id=SERVER,
            quarantine=quarantine,
        ) as client,
    ):
        pieces = client.stream({"t": "hi"})
        next(pieces)
        shut_out(path, f"{stolen.serial:x}")
        began = time.monotonic()
        with pytest.raises(errors.Interrupted, match="may not be believed"):  # noqa: PT012
            for _ in pieces:
                assert time.monotonic() - began < 3
        with pytest.raises(errors.Unavailable, match="is in quarantine since"):
            client.ready()
        source.move(Identity(good, authority.bundles))
        until(lambda: ready(client))


def ready(client: Client) -> bool:
    try:
        return client.ready()
    except errors.Unavailable:
        return False


# --- calls that end in another way than by an answer --------------------------------


def silent(http2, stream_id) -> None:
    """Answers nothing."""


def made(server: Scripted) -> Channel:
    """A channel of the running loop."""
    expected = Expected(Ends(server.source), SpiffeId.parse(SERVER), None)
    return Channel(server.address, expected)


def called(channel: Channel, timeout_s: float, body: bytes = b"") -> AwaitedCall:
    call = AwaitedCall(
        protocol.READY,
        body,
        attempts=Attempts(Budget(), timeout_s),
        server=SERVER,
        most=1 << 20,
    )
    channel.begin(call)
    return call


@contextmanager
def answering(authority, answer, **given):
    server = Scripted(authority.source(SERVER), answer, **given)
    server.source = authority.source(CLI)
    try:
        yield server
    finally:
        server.close()


async def happened(fact, seconds=5.0) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


@pytest.mark.slow
def test_a_reader_that_stays_slow_holds_no_more_than_a_window(authority) -> None:
    pieces = 2000
    with (
        serving(authority, Echo(pieces=pieces)) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
    ):
        stream = client.stream({"t": "x" * 4096})
        held = 0
        for _ in range(20):
            next(stream)
            time.sleep(0.02)
            (way,) = client._route.replicas
            (call,) = way._link._calls.values()
            held = max(held, sum(map(len, list(call._arrived))))
        assert held <= Bounds().stream_window
        assert sum(1 for _ in stream) == pieces - 20


def test_a_call_that_is_given_up_lets_the_next_have_its_turn(authority) -> None:
    def second(http2, stream_id) -> None:
        if stream_id > 1:
            answers(READY)(http2, stream_id)

    async def run(server) -> None:
        channel = made(server)
        first = called(channel, 5)
        await happened(lambda: server.heads)
        next_one = called(channel, 0.5)
        first.let_go()  # of which the server says nothing
        assert await next_one.result() == READY
        channel.leave()
        await happened(lambda: channel.is_closed)

    with answering(authority, second, bounds=Bounds(max_streams=1)) as server:
        asyncio.run(run(server))
    assert [one.code for one in server.resets] == [Code.CANCEL]


def test_what_waits_its_turn_and_is_given_up_is_not_kept(authority) -> None:
    async def run(server) -> None:
        channel = made(server)
        first = called(channel, 5)
        await happened(lambda: server.heads)
        waiting = [called(channel, 0.02, bytes(1 << 16)) for _ in range(10)]
        assert len(channel._link._queue) == 10
        for call in waiting:
            with pytest.raises(errors.DeadlineExceeded):
                await call.result()
        assert not channel._link._queue
        first.let_go()
        channel.leave()
        await happened(lambda: channel.is_closed)

    with answering(authority, silent, bounds=Bounds(max_streams=1)) as server:
        asyncio.run(run(server))
    assert len(server.heads) == 1


def test_what_waits_its_turn_goes_to_the_connection_that_comes_after(
    authority, monkeypatch
) -> None:
    monkeypatch.setattr(channels, "FIRST_PAUSE_S", 0.001)
    streams: list[int] = []

    def leaving(http2, stream_id) -> bytes | None:
        streams.append(stream_id)
        answers(READY)(http2, stream_id)
        return frames.goaway(1, Code.NO_ERROR, b"") if len(streams) == 1 else None

    async def run(server) -> None:
        channel = made(server)
        calls = [called(channel, 5) for _ in range(30)]
        # Each once: what was never sent is no attempt, and costs no retry.
        assert [await one.result() for one in calls] == [READY] * 30
        channel.leave()
        await happened(lambda: channel.is_closed)

    with answering(authority, leaving, bounds=Bounds(max_streams=1)) as server:
        asyncio.run(run(server))
    assert server.connections == 2


def test_a_renewed_connection_costs_no_call_that_waits_its_turn(authority) -> None:
    late = threading.Event()

    def once(http2, stream_id) -> None:
        if server.connections > 1 or late.wait(0.05):
            answers(READY)(http2, stream_id)

    async def run(server) -> None:
        channel = made(server)
        calls = [called(channel, 5) for _ in range(20)]
        await happened(lambda: server.heads)
        channel.renew()
        done = [await one.result() for one in calls[1:]]
        assert done == [READY] * 19
        calls[0].let_go()
        channel.leave()
        await happened(lambda: channel.is_closed)

    with answering(authority, once, bounds=Bounds(max_streams=1)) as server:
        asyncio.run(run(server))


def test_an_answer_before_the_whole_request_ends_the_stream(authority) -> None:
    """It would hold its place, and the connection would never be let go of."""

    fields = encode((STATUS, GRPC, (b"grpc-status", b"7"), (b"grpc-message", b"no")))
    flags = frames.END_HEADERS | frames.END_STREAM

    def denied(http2, stream_id) -> bytes:  # and no RST_STREAM after it
        return frames.frame(frames.HEADERS, flags, stream_id, fields)

    async def run(server) -> None:
        channel = made(server)
        call = called(channel, 5, bytes(1 << 20))  # its window has 512 KiB
        with pytest.raises(errors.Denied, match="no"):
            await call.result()
        await happened(lambda: server.resets)
        channel.leave()
        await happened(lambda: channel.is_closed)

    with answering(authority, silent, at_head=denied) as server:
        asyncio.run(run(server))


@pytest.mark.parametrize(("pause_s", "again"), [(30.0, False), (0.0, True)])
def test_a_connection_that_did_not_last_is_not_made_anew_at_once(
    authority, monkeypatch, pause_s, again
) -> None:
    """Else a server that lets go of each would be dialled in a storm."""
    monkeypatch.setattr(channels, "FIRST_PAUSE_S", pause_s)

    async def run(server) -> None:
        channel = made(server)
        channel.dial()
        await happened(lambda: channel._link is not None)
        first = channel._link
        server.cut()
        await happened(lambda: channel._link is not first)
        if again:
            await happened(lambda: server.connections == 2)
        else:
            await asyncio.sleep(0.03)
            assert server.connections == 1
        channel.leave()
        await happened(lambda: channel.is_closed)

    with answering(authority, silent) as server:
        asyncio.run(run(server))


@pytest.mark.parametrize("turns", range(6))
def test_a_channel_can_be_left_while_it_dials(authority, turns: int) -> None:
    async def run(server) -> None:
        channel = made(server)
        call = called(channel, 5)
        for _ in range(turns):
            await asyncio.sleep(0)
        channel.leave()
        with pytest.raises(errors.Unavailable, match="the replica is gone"):
            await call.result()
        await happened(lambda: channel.is_closed)

    with answering(authority, silent) as server:
        asyncio.run(run(server))


def test_an_address_that_cannot_be_one_is_told_at_once(authority) -> None:
    async def run(server) -> None:
        server.address = f"{'x' * 70}:1"  # no label of a name is so long
        with pytest.raises(errors.Unavailable, match="no connection to"):
            await called(made(server), 5).result()

    with answering(authority, silent) as server:
        asyncio.run(run(server))


def test_a_call_that_cannot_be_sent_ends_in_an_error(authority, monkeypatch) -> None:
    with scripted(authority, answers(READY)) as (_, client):
        assert client.ready(timeout_s=float("inf"))
        monkeypatch.setattr(heads, "request_head", None)
        with pytest.raises(errors.InferenceError, match="could not be sent"):
            client.ready()


def test_a_call_that_is_over_leaves_nothing_to_be_collected(authority) -> None:
    async def run(server) -> None:
        channel = made(server)
        seen = []
        gc.disable()
        try:
            for _ in range(3):
                call = called(channel, 5)
                assert await call.result() == READY
                seen.append(weakref.ref(call))
            call = None
            await asyncio.sleep(0)
            assert [one() for one in seen] == [None] * 3
        finally:
            gc.enable()
        channel.leave()
        await happened(lambda: channel.is_closed)

    with answering(authority, answers(READY)) as server:
        asyncio.run(run(server))


def test_who_waits_for_the_directory_is_told_of_the_close(authority) -> None:
    with ThreadPoolExecutor(1) as pool:
        client = Client(
            "ml-inference/echo",
            source=authority.source(CLI),
            directory="127.0.0.1:1",
        )
        asking = pool.submit(client.ready)
        time.sleep(0.05)
        client.close()
        with pytest.raises(errors.Unavailable):
            asking.result(3)


def test_nothing_is_given_to_a_loop_that_has_ended() -> None:
    async def last() -> None:
        pass

    async def waiting() -> None:
        await asyncio.Event().wait()

    thread = LoopThread("ends")
    left = thread.run(waiting())
    thread.close(last())
    thread.join(5)
    assert left.cancelled()
    with pytest.raises(errors.Unavailable, match="closed"):
        thread.post(print)
    with pytest.raises(errors.Unavailable, match="closed"):
        thread.run(last())


def test_a_client_can_be_closed_and_its_server_distrusted_while_it_dials(
    authority, monkeypatch
) -> None:
    async def never(*_, **__):
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", never)
    source = MovingSource(authority.source(CLI).current())
    client = Client("127.0.0.1:9", source=source, server_id=SERVER)
    with pytest.raises(errors.DeadlineExceeded):
        client.ready(timeout_s=0.05)
    (channel,) = client._route.replicas
    client._thread.run(_called(channel.distrust)).result(5)
    client.close()


async def _called(action) -> None:
    action()
