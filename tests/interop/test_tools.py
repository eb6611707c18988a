"""Other people's HTTP/2 tools, and grpc's own services, against our server.

docs/interop.md takes what it says of them from the docstrings here.
"""

import os
import re
import shutil
import subprocess
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from bench.generators import LoadError, build_shim
from tests.interop import service
from tests.interop.cases import GIVE, UNARY, simple, size_of, streamed
from tests.interop.drivers import Sync
from tests.unit.transport.support import SERVER, Echo
from ztserve.identity import dns_name
from ztserve.transport import inference_methods, messages

pytestmark = pytest.mark.slow
REQUESTS, CONNECTIONS, STREAMS = 500, 4, 8
HEADS = ("-H", "content-type: application/grpc", "-H", "te: trailers")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r"(send|recv) ([A-Z_]+) frame .*stream_id=(\d+)>")


def needs(tool: str):
    return pytest.mark.skipif(not shutil.which(tool), reason=f"{tool} is not installed")


@pytest.fixture
def body(tmp_path):
    path = tmp_path / "body"
    path.write_bytes(messages.framed(simple(1000, 1000)))
    return path


def curled(served, tmp_path, *arguments) -> tuple[list[str], bytes]:
    """Return what curl says of heads and trailers, and the body."""
    name = dns_name(SERVER)
    command = [
        *("curl", "--http2", "--silent", "--show-error", "--max-time", "10"),
        *("--cacert", served.bundle, "--resolve", f"{name}:{served.port}:127.0.0.1"),
        *("--dump-header", tmp_path / "head", "--output", tmp_path / "out"),
        *arguments,
        f"https://{name}:{served.port}{UNARY}",
    ]
    subprocess.run(command, check=True, timeout=20)
    head = (tmp_path / "head").read_text().splitlines()
    return head, (tmp_path / "out").read_bytes()


def certificate(served) -> list[object]:
    return ["--cert", served.certificate, "--key", served.key]


@needs("curl")
def test_curl_calls_a_method_and_sees_its_trailers(served, body, tmp_path) -> None:
    """`curl --http2` with a client certificate verifies the server's by the trust
    bundle and its DNS name, posts a message, and gets the answer and `grpc-status`"""
    arguments = [*HEADS, "--data-binary", f"@{body}", *certificate(served)]
    head, answer = curled(served, tmp_path, *arguments)
    assert head[0].split() == ["HTTP/2", "200"]
    assert head[-1].split(": ") == ["grpc-status", "0"]
    assert size_of(answer[messages.PREFIX_BYTES :]) == 1000


@needs("curl")
def test_curl_without_grpc_is_told_so(served, tmp_path) -> None:
    """a plain GET is answered by 415, and reaches no handler"""
    head, answer = curled(served, tmp_path, *certificate(served))
    assert (head[0].split(), answer) == (["HTTP/2", "415"], b"")
    assert not served.service.calls


@needs("curl")
def test_curl_without_a_certificate_gets_nothing(served, tmp_path) -> None:
    """without a client certificate the handshake fails"""
    with pytest.raises(subprocess.CalledProcessError):
        curled(served, tmp_path)


@needs("nghttp")
def test_nghttp_sees_the_frames_in_order(authority, tmp_path) -> None:
    """`nghttp -v` on a server that is stopped during the call sees SETTINGS, its
    acknowledgement, two GOAWAYs (the first of no stream, the second of its own), the
    answer, and its trailers"""
    request = tmp_path / "body"
    request.write_bytes(messages.framed(streamed(9, 9, interval_us=150_000)))
    with service.serving(authority, tmp_path) as served:
        command = [
            *("nghttp", "-v", "--no-dep", *certificate(served), *HEADS),
            f"--data={request}",
            f"https://{served.address}{GIVE}",
        ]
        program = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 5
        while not served.service.calls and time.monotonic() < end:
            time.sleep(0.01)
        served.server.stop(5)
        told = program.communicate(timeout=10)[0].decode(errors="replace")
    told = _COLOUR.sub("", told)
    received = [
        kind
        for way, kind, _ in _FRAME.findall(told)
        if way == "recv" and kind != "WINDOW_UPDATE"
    ]
    wanted = "SETTINGS SETTINGS GOAWAY GOAWAY HEADERS DATA DATA HEADERS"
    assert received == wanted.split()
    assert re.findall(r"last_stream_id=(\d+), error_code=(\w+)", told)[:2] == [
        ("2147483647", "NO_ERROR"),
        ("1", "NO_ERROR"),
    ]
    assert "grpc-status: 0" in told


@needs("h2load")
def test_load_by_h2load_loses_no_call(served, body) -> None:
    """`h2load` makes 500 calls on 4 connections, 8 at once on each, and all succeed
    (the client certificate is given to it by bench/tls_client_cert.c)"""
    try:
        shim = build_shim()
    except LoadError as error:
        pytest.skip(str(error))
    counts = [f"-n{REQUESTS}", f"-c{CONNECTIONS}", f"-m{STREAMS}"]
    env = {"PATH": os.environ["PATH"], "LD_PRELOAD": str(shim)}
    env |= {"CLIENT_CERT": str(served.certificate), "CLIENT_KEY": str(served.key)}
    done = subprocess.run(
        [
            "h2load",
            *counts,
            *HEADS,
            f"--data={body}",
            f"https://{served.address}{UNARY}",
        ],
        capture_output=True,
        check=True,
        timeout=30,
        env=env,
    )
    told = done.stdout.decode()
    assert f"{REQUESTS} succeeded, 0 failed, 0 errored, 0 timeout" in told
    assert f"status codes: {REQUESTS} 2xx" in told
    assert len(served.service.calls) == REQUESTS


@pytest.fixture
def channel(authority, tmp_path):
    """A channel to a server with all that a replica offers."""
    offered = inference_methods(Echo(), "echo", "3")
    with service.serving(authority, tmp_path, *offered) as served:
        driver = Sync(served)
        yield driver._plain
        driver.close()


def test_the_health_client_is_answered(channel) -> None:
    """grpcio-health-checking's client: `Check` says SERVING to whoever may ask for
    ServerReady, and NOT_FOUND of a service that is not served"""
    check = health_pb2_grpc.HealthStub(channel).Check
    for name in ("", "inference.GRPCInferenceService"):
        asked = health_pb2.HealthCheckRequest(service=name)
        answer = check(asked, timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        check(health_pb2.HealthCheckRequest(service="other"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_is_not_watched(channel) -> None:
    """not offered: `Health/Watch` is UNIMPLEMENTED, by which clients know not to ask
    again (docs/decisions/019)"""
    watch = health_pb2_grpc.HealthStub(channel).Watch
    with pytest.raises(grpc.RpcError) as caught:
        next(watch(health_pb2.HealthCheckRequest(), timeout=5))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_there_is_no_reflection(channel) -> None:
    """not offered: grpcio-reflection's client gets UNIMPLEMENTED; reflection tells the
    surface to whoever may connect (docs/decisions/019)"""
    with pytest.raises(grpc.RpcError) as caught:
        ProtoReflectionDescriptorDatabase(channel).get_services()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
