"""Stock clients, sync and async, against our server."""

import asyncio
import shutil
import subprocess
import threading
import time

import grpc
import numpy as np
import pytest

from tests.unit.transport.support import (
    CLI,
    INFER,
    SERVER,
    STREAM,
    Echo,
    message,
    pem,
    serving,
)
from ztserve.identity import dns_name
from ztserve.transport import Limits
from ztserve.types import TensorSpec

Code = grpc.StatusCode
pytestmark = pytest.mark.slow


def answer_of(raw):
    from ztserve.transport.v1 import inference_pb2 as pb

    return pb.ModelInferResponse.FromString(raw)


@pytest.mark.parametrize("size", [0, 1, 1 << 10, 1 << 16, 1 << 20, 6 << 20])
def test_messages_of_any_size_come_back_whole(authority, size):
    value = np.arange(size // 4 or 1, dtype=np.float32).reshape(1, -1)
    service = Echo(spec=TensorSpec("x", "FP32", (-1, -1)))
    with (
        serving(authority, service) as served,
        served.channel(grpc__max_receive_message_length=-1) as channel,
    ):
        raw = channel.unary_unary(INFER)(message(x=value), timeout=30)
    assert answer_of(raw).raw_output_contents[0] == value.tobytes()


def test_compressed_messages_are_read(authority):
    text = "z" * 100_000
    with serving(authority) as served, served.channel() as channel:
        call = channel.unary_unary(INFER)
        call(message(t=text), timeout=10, compression=grpc.Compression.Gzip)
        with pytest.raises(grpc.RpcError) as caught:
            call(message(t=text), timeout=10, compression=grpc.Compression.Deflate)
    assert caught.value.code() is Code.UNIMPLEMENTED
    assert len(served.service.outcomes) == 1


def test_a_compressed_bomb_is_refused_by_its_size(authority):
    bomb = message(t="\0" * (8 << 20))
    with (
        serving(authority, limits=Limits(max_message_bytes=1 << 20)) as served,
        served.channel() as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary(INFER)(bomb, timeout=20, compression=grpc.Compression.Gzip)
    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert "expands to over 1048576 bytes" in caught.value.details()


def test_metadata_goes_there_and_trailers_come_back(authority):
    with serving(authority) as served, served.channel() as channel:
        given = (("x-team", "red"), ("x-team", "blue"), ("x-raw-bin", b"\0\xff"))
        channel.unary_unary(INFER)(message(), timeout=5, metadata=given)
        assert served.service.calls[0].headers["x-team"] == "red,blue"
        bad = message(t="raise InvalidInput")
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(INFER)(bad, timeout=5)
    trailers = dict(caught.value.trailing_metadata())
    assert trailers["zt-error"] == "InvalidInput"
    assert len(trailers["zt-call-id"]) == 32


def test_a_deadline_travels_and_ends_the_call(authority):
    with serving(authority) as served, served.channel() as channel:
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(INFER)(message(t="wait"), timeout=0.5)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert served.service.calls[0].deadline < began + 0.6
        until(lambda: served.server.in_flight == 0)


def test_a_cancelled_call_reaches_predict(authority):
    with serving(authority) as served, served.channel() as channel:
        held = channel.unary_unary(INFER).future(message(t="wait"), timeout=20)
        assert served.service.running.acquire(timeout=5)
        held.cancel()
        until(lambda: served.service.calls[0].cancelled())
        until(lambda: served.server.in_flight == 0)


def test_streams_both_ways_keep_their_order(authority):
    with serving(authority, Echo(pieces=2)) as served, served.channel() as channel:
        sent = [message(t=str(number)) for number in range(50)]
        back = list(channel.stream_stream(STREAM)(iter(sent), timeout=20))
    assert len(back) == 100


def test_a_stream_whose_reader_stops_ends(authority):
    service = Echo(pieces=100_000, pause_s=0.001)
    with serving(authority, service) as served, served.channel() as channel:
        stream = channel.stream_stream(STREAM)(iter([message()]), timeout=30)
        next(stream)
        stream.cancel()
        until(lambda: served.server.in_flight == 0)


def test_many_calls_of_an_async_client_on_one_connection(authority):
    svid = authority.issue(CLI)

    async def ask(address):
        credentials = grpc.ssl_channel_credentials(
            pem(authority.bundle), svid.key_pem(), svid.chain_pem()
        )
        options = [("grpc.ssl_target_name_override", dns_name(SERVER))]
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            infer = channel.unary_unary(INFER)
            calls = [infer(message(t=str(n)), timeout=20) for n in range(300)]
            found = await asyncio.gather(*calls)
            stream = channel.stream_stream(STREAM)(timeout=10)
            await stream.write(message())
            await stream.done_writing()
            pieces = [piece async for piece in stream]
            return found, pieces

    with serving(authority) as served:
        found, pieces = asyncio.run(ask(served.address))
    texts = [answer_of(raw).raw_output_contents[0][4:] for raw in found]
    assert texts == [str(n).encode() for n in range(300)]
    assert len(pieces) == 3


def test_sixteen_threads_of_clients_lose_nothing(authority):
    failed = []

    def ask():
        with served.channel() as channel:
            infer = channel.unary_unary(INFER)
            for number in range(50):
                raw = infer(message(t=str(number)), timeout=20)
                if answer_of(raw).raw_output_contents[0][4:] != str(number).encode():
                    failed.append(number)

    with serving(authority) as served:
        threads = [threading.Thread(target=ask) for _ in range(16)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert failed == []
    assert len(served.service.outcomes) == 800


def until(fact, seconds=5.0):
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_gets_an_answer(authority, tmp_path):
    svid = authority.issue(CLI)
    body = message()
    for name, content in (
        ("cert", svid.chain_pem()),
        ("key", svid.key_pem()),
        ("body", b"\0" + len(body).to_bytes(4, "big") + body),
    ):
        (tmp_path / name).write_bytes(content)
    with serving(authority) as served:
        done = subprocess.run(
            [
                *("curl", "--http2", "--insecure", "--silent", "--dump-header", "-"),
                *("--cert", tmp_path / "cert", "--key", tmp_path / "key"),
                *("-H", "content-type: application/grpc", "-H", "te: trailers"),
                *("--data-binary", f"@{tmp_path / 'body'}"),
                f"https://{served.address}{INFER}",
            ],
            capture_output=True,
            timeout=20,
            check=True,
        )
    assert done.stdout.startswith(b"HTTP/2 200")
    assert b"grpc-status: 0" in done.stdout
