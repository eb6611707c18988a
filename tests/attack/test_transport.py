"""Attacks on the wire: strangers, impostors, hogs and forgers at a real server.

Where a control of ours stands beside what grpcio does by itself, the same attack is
first shown to work on a plain server of grpcio's.
"""

import contextlib
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from tests.unit.transport.records import Hand
from tests.unit.transport.support import (
    CLI,
    DOMAIN,
    GATEWAY,
    INFER,
    SERVER,
    STREAM,
    Echo,
    MovingSource,
    Served,
    channel,
    message,
    pem,
    refused,
    serving,
)
from ztserve import types
from ztserve.errors import Unauthenticated, Unavailable
from ztserve.identity import Identity
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Client, Limits, callers, tls
from ztserve.types import Caller

ROOT = Path(__file__).parents[2]
Code = grpc.StatusCode
TLS_1_2 = ssl.TLSVersion.TLSv1_2


@pytest.fixture(scope="module")
def authority() -> ThrowAwayAuthority:
    return ThrowAwayAuthority(DOMAIN)


@pytest.fixture
def served(authority):
    with serving(authority) as one:
        yield one


@contextlib.contextmanager
def turning_away(authority, reason: str, **more):
    """Serve, and check that one peer was refused for `reason` in the handshake."""
    told: list[tuple[str, int, str]] = []
    more["on_handshake_refused"] = lambda *what: told.append(what)
    with serving(authority, **more) as served:
        yield served
    assert served.service.calls == served.refusals == []
    [(cause, _, address)] = told
    assert reason in cause
    assert address == "127.0.0.1"


def soon(fact, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not fact() and time.monotonic() < end:
        time.sleep(0.01)
    return fact()


def naive(authority, roots: bytes | None = None, handler=None):
    """A gRPC server with mutual TLS as its documentation shows it."""
    svid = authority.issue(SERVER)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    handler = handler or grpc.unary_unary_rpc_method_handler(lambda body, _: body)
    service, _, method = INFER.strip("/").partition("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    credentials = grpc.ssl_server_credentials(
        [(svid.key_pem(), svid.chain_pem())],
        roots or pem(authority.bundle),
        require_client_auth=True,
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return server, port


# --- a hand-made HTTP/2 client, which does what no decent one would ------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes((kind, flags))
        + struct.pack(">I", stream)
        + payload
    )


def length(n: int) -> bytes:
    if n < 127:
        return bytes((n,))
    out, n = b"\x7f", n - 127
    while n >= 128:
        out, n = out + bytes((n % 128 + 128,)), n // 128
    return out + bytes((n,))


def head(stream: int, path: str = INFER, **more: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "https",
        ":path": path,
        ":authority": "x",
        "content-type": "application/grpc",
        "te": "trailers",
        **more,
    }
    block = b"".join(
        b"\x00" + length(len(k)) + k.encode() + length(len(v)) + v.encode()
        for k, v in fields.items()
    )
    return frame(HEADERS, 4, stream, block)


def body(content: bytes, stream: int, *, last: bool = True) -> bytes:
    data = b"\0" + struct.pack(">I", len(content)) + content
    return frame(DATA, int(last), stream, data)


class Raw:
    """A TLS connection with a client certificate, on which anything can be sent."""

    def __init__(self, served: Served, folder: Path, svid=None, **options) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        if "maximum" in options:
            context.maximum_version = options["maximum"]
        self.context = options.get("context", context)
        if "context" not in options:
            svid = svid or served.authority.issue(CLI)
            (folder / "raw.pem").write_bytes(svid.chain_pem() + svid.key_pem())
            self.context.load_cert_chain(folder / "raw.pem")
        plain = socket.create_connection(("127.0.0.1", served.port), timeout=5)
        self.tls = self.context.wrap_socket(plain, session=options.get("session"))
        self.tls.sendall(PREFACE + frame(SETTINGS, 0, 0, options.get("settings", b"")))

    def send(self, *frames: bytes) -> None:
        self.tls.sendall(b"".join(frames))

    def closes(self, seconds: float = 5.0) -> bool:
        """Read until the server closes the connection."""
        self.tls.settimeout(seconds)
        try:
            while self.tls.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        self.tls.close()


@pytest.fixture
def attack(tmp_path: Path):
    """Opens raw connections, and closes them after the test."""
    opened: list[Raw] = []

    def connect(served: Served, **options) -> Raw:
        opened.append(Raw(served, tmp_path, **options))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


# --- strangers --------------------------------------------------------------


def test_plain_text_gets_nothing(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as raw:
        raw.sendall(PREFACE + frame(SETTINGS, 0, 0) + head(1) + body(message(), 1))
        assert raw.recv(1000) == b""
    assert served.service.calls == []
    assert served.refusals == []


def test_without_a_certificate_no_call_arrives(served: Served) -> None:
    credentials = grpc.ssl_channel_credentials(pem(served.authority.bundle))
    from ztserve.identity import dns_name

    with (
        grpc.secure_channel(
            served.address,
            credentials,
            options=[("grpc.ssl_target_name_override", dns_name(SERVER))],
        ) as stranger,
        pytest.raises(grpc.RpcError) as caught,
    ):
        stranger.unary_unary(INFER)(message(), timeout=5)
    assert caught.value.code() is Code.UNAVAILABLE
    assert served.service.calls == []
    assert served.refusals == []


def test_a_foreign_authority_gets_nothing(served: Served) -> None:
    stranger = ThrowAwayAuthority(DOMAIN).issue(CLI)
    with served.channel(stranger) as impostor, pytest.raises(grpc.RpcError) as caught:
        impostor.unary_unary(INFER)(message(), timeout=5)
    assert caught.value.code() is Code.UNAVAILABLE
    assert served.service.calls == []
    assert served.refusals == []


@pytest.mark.slow
def test_a_silent_connection_is_closed(authority) -> None:
    with (
        serving(authority, limits=Limits(handshake_s=0.5)) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=5) as raw,
    ):
        begun = time.monotonic()
        assert raw.recv(10) == b""
        assert time.monotonic() - begun < 3


@pytest.mark.slow
def test_connections_are_limited(authority) -> None:
    with serving(authority, limits=Limits(max_connections=5, handshake_s=30)) as served:
        opened = [
            socket.create_connection(("127.0.0.1", served.port), timeout=2)
            for _ in range(20)
        ]
        time.sleep(0.3)
        closed = 0
        for one in opened:
            one.settimeout(0.05)
            try:
                closed += one.recv(1) == b""
            except TimeoutError:
                pass
            except ConnectionResetError:
                closed += 1
        assert closed >= 14
        for one in opened:
            one.close()


# --- impostors --------------------------------------------------------------


def test_a_federated_authority_cannot_mint_our_ids() -> None:
    ours, partner = ThrowAwayAuthority(DOMAIN), ThrowAwayAuthority("partner.example")
    impostor = partner.forge(GATEWAY, dns=())
    server, port = naive(ours, pem(ours.bundle + partner.bundle))
    with channel(port, impostor, ours) as caller:
        assert caller.unary_unary(INFER)(b"let in", timeout=5) == b"let in"
    server.stop(0)
    source = ours.source(SERVER, federated=partner.bundles)
    with (
        turning_away(ours, "no valid path", source=source) as served,
        served.channel(impostor) as caller,
        pytest.raises(grpc.RpcError) as caught,
    ):
        caller.unary_unary(INFER)(message(), timeout=5)
    assert caught.value.code() is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("flaws", "reason"),
    [
        ({"ca": True}, "leaf is a CA"),
        ({"uris": (CLI, GATEWAY)}, "2 URI names"),
        ({"uris": ()}, "the certificate has no SPIFFE ID"),
        ({"key_usage": ("digital_signature", "key_cert_sign")}, "leaf has keyCertSign"),
    ],
)
def test_a_certificate_that_is_no_svid_is_refused(authority, flaws, reason) -> None:
    impostor = authority.forge(CLI, **flaws)
    server, port = naive(authority)
    with channel(port, impostor, authority) as caller:
        assert caller.unary_unary(INFER)(b"let in", timeout=5) == b"let in"
    server.stop(0)
    with (
        turning_away(authority, reason) as served,
        served.channel(impostor) as caller,
        pytest.raises(grpc.RpcError) as caught,
    ):
        caller.unary_unary(INFER)(message(), timeout=5)
    assert caught.value.code() is Code.UNAVAILABLE


@pytest.mark.slow
def test_a_server_with_another_identity_sees_no_call(authority) -> None:
    other = authority.source(f"spiffe://{DOMAIN}/ns/ml-inference/sa/other")
    with (
        serving(authority, source=other) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
        pytest.raises(Unavailable, match="not for the expected SPIFFE ID"),
    ):
        client.infer({"t": "secret"})
    assert served.service.calls == []
    assert served.refusals == []


@pytest.mark.slow
def test_a_federated_server_cannot_take_the_place_of_ours() -> None:
    ours, partner = ThrowAwayAuthority(DOMAIN), ThrowAwayAuthority("partner.example")
    from ztserve.identity import dns_name

    impostor = partner.forge(SERVER, dns=(dns_name(SERVER),))
    both = {**ours.bundles, **partner.bundles}
    with serving(ours, source=MovingSource(Identity(impostor, both))) as served:
        roots = pem(ours.bundle + partner.bundle)
        svid = ours.issue(CLI)
        with grpc.secure_channel(
            served.address,
            grpc.ssl_channel_credentials(roots, svid.key_pem(), svid.chain_pem()),
            options=[("grpc.ssl_target_name_override", dns_name(SERVER))],
        ) as fooled:
            assert fooled.unary_unary(INFER)(message(), timeout=5)
        source = ours.source(CLI, federated=partner.bundles)
        with (
            Client(served.address, source=source, server_id=SERVER) as client,
            pytest.raises(Unavailable, match="not signed by the trust bundle"),
        ):
            client.infer({"t": "secret"})
    assert len(served.service.calls) == 1


def test_tls_1_2_is_refused(authority, attack) -> None:
    server, port = naive(authority)
    old = attack(SimpleNamespace(port=port, authority=authority), maximum=TLS_1_2)
    assert old.tls.version() == "TLSv1.2"
    server.stop(0)
    with (
        turning_away(authority, "TLS older than 1.3") as served,
        pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
    ):
        attack(served, maximum=TLS_1_2)


def test_a_resumed_session_is_refused(served: Served, attack) -> None:
    server, port = naive(served.authority)
    plain = SimpleNamespace(port=port, authority=served.authority)
    assert resumes(plain, attack).tls.session_reused
    server.stop(0)
    again = resumes(served, attack)
    assert not again.tls.session_reused  # the peer was judged in full
    assert soon(lambda: len(served.service.calls) == 2)


def resumes(served, attack) -> "Raw":
    """Call, and call again over a connection that would take up the first session."""
    first = attack(served)
    first.send(head(1), body(message(), 1))
    assert first.tls.recv(65536)  # and with it, any ticket
    again = attack(served, context=first.context, session=first.tls.session)
    again.send(head(1), body(message(), 1))
    return again


@pytest.mark.slow
def test_an_identity_that_expires_is_refused_on_its_open_connection(authority) -> None:
    svid = authority.issue(CLI, ttl_s=1)
    server, port = naive(authority)
    with (
        serving(authority, Echo(pieces=10**9, pause_s=0.02)) as served,
        served.channel(svid) as ours,
        channel(port, svid, authority) as theirs,
    ):
        assert theirs.unary_unary(INFER)(b"in", timeout=5) == b"in"
        ours.unary_unary(INFER)(message(), timeout=5)
        stream = ours.stream_stream(STREAM)(iter([message()]))
        next(stream)
        while types.now() <= svid.not_after:
            time.sleep(0.02)
        expired = time.monotonic()
        assert theirs.unary_unary(INFER)(b"still in", timeout=5) == b"still in"
        with pytest.raises(grpc.RpcError) as caught:
            ours.unary_unary(INFER)(message(), timeout=5)
        with pytest.raises(grpc.RpcError):
            for _ in stream:
                pass
        assert time.monotonic() - expired < 1.5
    server.stop(0)
    assert caught.value.code() is Code.UNAUTHENTICATED
    assert "expired" in served.refusals[0].error.reason


def test_a_root_that_is_dropped_ends_what_it_vouched_for() -> None:
    old, new = ThrowAwayAuthority(DOMAIN), ThrowAwayAuthority(DOMAIN)
    own = new.issue(SERVER)
    source = MovingSource(Identity(own, {DOMAIN: old.bundle + new.bundle}))
    with (
        serving(new, source=source) as served,
        served.channel(old.issue(CLI)) as caller,
    ):
        caller.unary_unary(INFER)(message(), timeout=5)
        source.move(Identity(own, new.bundles))
        with pytest.raises(grpc.RpcError) as caught:
            caller.unary_unary(INFER)(message(), timeout=5)
        assert caught.value.code() is Code.UNAUTHENTICATED
        with (
            served.channel(old.issue(CLI)) as again,
            pytest.raises(grpc.RpcError) as caught,
        ):
            again.unary_unary(INFER)(message(), timeout=5)
        assert caught.value.code() is Code.UNAVAILABLE


def test_a_server_whose_identity_was_withdrawn_answers_nobody(authority) -> None:
    source = MovingSource(Identity(authority.issue(SERVER), authority.bundles))
    with serving(authority, source=source) as served, served.channel() as caller:
        caller.unary_unary(INFER)(message(), timeout=5)
        source.move(None)
        with pytest.raises(grpc.RpcError) as caught:
            caller.unary_unary(INFER)(message(), timeout=5)
    assert refused(caught.value) == (
        Code.UNAVAILABLE,
        "this server has no valid identity now",
        "Unavailable",
    )


@pytest.mark.slow
def test_a_client_ignores_proxies_of_the_environment(authority) -> None:
    proxy = socket.create_server(("127.0.0.1", 0))
    proxy.settimeout(0.1)
    where = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    code = """
import sys, grpc
from tests.unit.transport.support import *
from ztserve.transport import Client
authority = ThrowAwayAuthority(DOMAIN)
with serving(authority) as served:
    address = f"localhost:{served.port}"
    with Client(address, source=authority.source(CLI), server_id=SERVER) as client:
        assert client.infer({"t": "hi"}) == {"t": "hi"}
    if sys.argv[1:]:
        svid = authority.issue(CLI)
        with grpc.secure_channel(address, grpc.ssl_channel_credentials()) as stock:
            try:
                stock.unary_unary(INFER)(b"", timeout=1)
            except grpc.RpcError:
                pass
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "https_proxy": where}
    environment |= {"http_proxy": where, "no_proxy": ""}
    for arguments, visited in (["stock"], True), ([], False):
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        try:
            proxy.accept()[0].close()
            assert visited
        except TimeoutError:
            assert not visited
    proxy.close()


# --- hogs -------------------------------------------------------------------

RSS = """
import sys, time, resource, threading
from concurrent import futures
from tests.unit.transport.support import *
import grpc

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

authority = ThrowAwayAuthority(DOMAIN)
N = 60 << 20
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], rss()); time.sleep(0.002)

if sys.argv[1] == "ours":
    served = Server(
        inference_methods(Echo(denied=frozenset((CLI,))), "echo"),
        source=authority.source(SERVER), limits=Limits(max_message_bytes=64 << 20),
    )
    port = served.start("127.0.0.1")[1]
else:
    def deny(body, context):
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
    svid = authority.issue(SERVER)
    served = grpc.server(futures.ThreadPoolExecutor(16),
        options=[("grpc.max_receive_message_length", 64 << 20)])
    served.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
        "inference.GRPCInferenceService",
        {"ModelInfer": grpc.unary_unary_rpc_method_handler(deny)}),))
    port = served.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(
        [(svid.key_pem(), svid.chain_pem())], pem(authority.bundle), True))
    served.start()
svid = authority.issue(CLI)
sys.stdout.write(f"{port}\\n"); sys.stdout.flush()
sys.stdout.buffer.write(svid.chain_pem() + svid.key_pem() + pem(authority.bundle))
sys.stdout.write("\\nEND\\n"); sys.stdout.flush()
idle = rss()
threading.Thread(target=watch, daemon=True).start()
sys.stdin.readline()
print(peak[0] - idle, flush=True)
import os; os._exit(0)
"""


def growth(kind: str) -> int:
    """MiB by which a server grows under eight denied calls of 60 MiB each."""
    with subprocess.Popen(
        [sys.executable, "-c", RSS, kind],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        port = int(server.stdout.readline())
        text = ""
        while not text.endswith("END\n"):
            text += server.stdout.readline()
        cut = text.index("-----BEGIN PRIVATE")
        end = text.index("-----BEGIN CERTIFICATE", cut)
        chain, key, roots = text[:cut], text[cut:end], text[end : text.index("\nEND")]
        from ztserve.identity import dns_name

        credentials = grpc.ssl_channel_credentials(
            roots.encode(), key.encode(), chain.encode()
        )
        with grpc.secure_channel(
            f"127.0.0.1:{port}",
            credentials,
            options=[
                ("grpc.ssl_target_name_override", dns_name(SERVER)),
                ("grpc.max_send_message_length", 64 << 20),
            ],
        ) as caller:
            giant = bytes(60 << 20)
            calls = [
                caller.unary_unary(INFER).future(giant, timeout=60) for _ in range(8)
            ]
            codes = {one.exception(timeout=60).code() for one in calls}
        assert codes == {Code.PERMISSION_DENIED}
        server.stdin.write("\n")
        server.stdin.flush()
        return int(server.stdout.readline())


@pytest.mark.slow
def test_denied_giant_bodies_are_never_read() -> None:
    assert growth("naive") > 200
    assert growth("ours") < 64


KEPT = """
import sys, threading
from ztserve.transport.loop import allocator

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

if sys.argv[1:]:
    allocator._KEPT_BYTES = int(sys.argv[1])
allocator.keep_freed_memory()
before, meet = rss(), threading.Barrier(24)

def call():
    meet.wait()
    body = b"x" * (24 << 20)
    meet.wait()
    del body
    meet.wait()
    if threading.current_thread() is threads[0]:
        print(rss() - before)
    meet.wait()

threads = [threading.Thread(target=call) for _ in range(24)]
for one in threads: one.start()
for one in threads: one.join()
"""


def kept(*most: str) -> int:
    """MiB that 24 threads keep, each of which held 24 MiB."""
    run = subprocess.run(
        [sys.executable, "-c", KEPT, *most],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "100"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.slow
def test_large_bodies_leave_no_memory_behind_for_each_thread() -> None:
    """As on a machine of many cores, where each thread has an arena."""
    assert kept(str(128 << 20)) > 300
    assert kept() < 100


@pytest.mark.slow
def test_a_slow_body_holds_its_place_for_the_limit_only(authority, attack) -> None:
    for body_s, held in (30.0, True), (0.5, False):
        limits = Limits(body_s=body_s, max_in_flight_per_principal=2)
        with serving(authority, limits=limits) as served:
            raw = attack(served)
            first_half = frame(DATA, 0, 1, b"\0\0\0\0\x40" + bytes(32))
            raw.send(head(1), first_half, head(3))
            assert soon(lambda s=served: s.server.in_flight == 2)
            seconds = 2 if held else 15
            assert soon(lambda s=served: s.server.in_flight == 0, seconds) is not held


@pytest.mark.slow
def test_a_caller_that_takes_nothing_holds_its_place_for_the_limit_only(
    authority, attack
) -> None:
    no_window = struct.pack(">HI", 4, 0)
    for idle_s, held in (30.0, True), (0.5, False):
        with serving(
            authority, Echo(pieces=10**9), limits=Limits(stream_idle_s=idle_s)
        ) as served:
            raw = attack(served, settings=no_window)
            raw.send(head(1, STREAM), body(message(), 1))
            assert soon(lambda s=served: s.server.in_flight == 1)
            seconds = 2 if held else 15
            assert soon(lambda s=served: s.server.in_flight == 0, seconds) is not held


@pytest.mark.slow
def test_a_metadata_bomb_reaches_no_room(served: Served, attack) -> None:
    metadata = (("a", "x" * 10_000), ("b", "x" * 10_000))
    with served.channel() as caller, pytest.raises(grpc.RpcError) as caught:
        caller.unary_unary(INFER)(message(), timeout=5, metadata=metadata)
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    assert served.service.calls == []
    raw, field = attack(served), b"\x00\x01a" + length(15_000) + b"x" * 15_000
    raw.send(
        frame(HEADERS, 0, 1, head(1)[9:]),
        *(frame(CONTINUATION, 0, 1, field) for _ in range(20)),
        frame(CONTINUATION, 4, 1),
        body(message(), 1),
    )
    assert raw.closes()
    assert served.service.calls == served.refusals == []
    raw, rest = attack(served), b"\x00\x01b" + length(5_000) + b"x" * 5_000
    raw.send(  # a little too much: its own stream ends, and no other
        frame(HEADERS, 0, 1, head(1)[9:] + field),
        frame(CONTINUATION, 4, 1, rest),
        body(message(), 1),
        head(3) + body(message(), 3),
    )
    assert soon(lambda: served.service.outcomes)
    [call] = served.service.calls
    assert "a" not in call.headers


@pytest.mark.slow
def test_rapid_resets_do_not_stop_others(served: Served, attack) -> None:
    raw = attack(served)
    stop = threading.Event()

    def flood() -> None:
        stream = 1
        try:
            while not stop.is_set() and stream < 40_000:
                raw.send(
                    *(
                        head(s) + frame(RST, 0, s, struct.pack(">I", 8))
                        for s in range(stream, stream + 100, 2)
                    )
                )
                stream += 100
        except OSError:
            pass

    thread = threading.Thread(target=flood)
    thread.start()
    with served.channel(served.authority.issue(GATEWAY)) as honest:
        for _ in range(20):
            honest.unary_unary(INFER)(message(), timeout=10)
    stop.set()
    thread.join(timeout=10)
    assert soon(lambda: served.server.in_flight == 0)


def test_a_ping_flood_is_shown_the_door(served: Served, attack) -> None:
    raw = attack(served)
    with contextlib.suppress(OSError):
        raw.send(*(frame(PING, 0, 0, bytes(8)) for _ in range(50)))
    assert raw.closes()


@pytest.mark.parametrize("bounded", [True, False])
def test_updates_of_keys_without_end_are_shown_the_door(
    authority, monkeypatch, bounded
) -> None:
    """Each costs as much as a small call, and asks for an answer that is held."""
    if not bounded:
        monkeypatch.setattr(tls, "MAX_IDLE", 1 << 30)
    told: list[tuple[str, int, str]] = []
    with (
        serving(authority, on_handshake_refused=lambda *it: told.append(it)) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=5) as raw,
    ):
        hand = Hand(authority.source(CLI))
        raw.sendall(hand.session.begin())
        while not hand.session.established:
            hand.session.receive(raw.recv(65536))
            raw.sendall(hand.session.outgoing())
        with contextlib.suppress(OSError):
            raw.sendall(hand.record(PREFACE + frame(SETTINGS, 0, 0)))
            for _ in range(20):
                raw.sendall(b"".join(hand.update(asks=True) for _ in range(200)))
        if bounded:
            assert soon(lambda: told)
        else:
            time.sleep(0.5)
            raw.sendall(hand.record(head(1) + body(message(), 1)))
            assert soon(lambda: served.service.outcomes)
    causes = [cause for cause, _, _ in told]
    assert causes == ["TLS: too many records without data"] * bounded


@pytest.mark.slow
def test_whoever_keeps_a_call_does_not_keep_its_stream(authority) -> None:
    limits = Limits(max_streams_per_connection=8)
    with serving(authority, limits=limits) as served, served.channel() as caller:
        for number in range(40):
            wish = "raise Denied" if number % 2 else "fine"
            future = caller.unary_unary(INFER).future(message(t=wish), timeout=5)
            assert future.code() in (Code.OK, Code.PERMISSION_DENIED)
    assert len(served.service.calls) == len(served.service.outcomes) == 40


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (head(1, "/inference.GRPCInferenceService/Secret"), "method that is not here"),
        (head(1, **{"grpc-timeout": "soon"}), "not gRPC's"),
        (head(1, **{"grpc-encoding": "br"}), "not gRPC's"),
        (head(1, **{"x-bin": "!"}), "not gRPC's"),
        (head(1, **{"content-type": "text/html"}), "not gRPC's"),
    ],
)
def test_whoever_tries_doors_that_are_not_there_is_told_of(
    authority, attack, call, cause
) -> None:
    told: list[tuple[str, int, str]] = []
    with serving(authority, on_handshake_refused=lambda *it: told.append(it)) as served:
        attack(served).send(call, body(message(), 1))
        assert soon(lambda: told)
    assert served.service.calls == []
    [(said, count, address)] = told
    assert cause in said
    assert (count, address) == (1, "127.0.0.1")


# --- forgers of the end user ------------------------------------------------

ADA = Caller("https://issuer", "ada", {"role": "doctor"}, "x509-svid")


def attempt(served: Served, principal: str, *headers: bytes) -> grpc.RpcError | None:
    metadata = tuple((callers.HEADER, header) for header in headers)
    with served.channel(served.authority.issue(principal)) as caller:
        try:
            caller.unary_unary(INFER)(message(), timeout=5, metadata=metadata)
        except grpc.RpcError as error:
            return error
    return None


@pytest.fixture
def delegating(authority):
    with serving(authority, delegates=[GATEWAY]) as one:
        yield one


def test_a_forged_caller_of_a_peer_that_is_no_delegate_is_dropped(delegating) -> None:
    header = callers.written(ADA, audience=SERVER, request=message())
    assert attempt(delegating, GATEWAY, header) is None
    assert attempt(delegating, CLI, header) is None
    believed, dropped = delegating.service.calls
    assert believed.caller.subject == "ada"
    assert believed.notes == ()
    assert dropped.caller is None
    assert dropped.notes == ("caller header dropped",)
    assert "zt-caller-bin" not in dropped.headers


def test_a_caller_header_replayed_to_another_callee_is_refused(delegating) -> None:
    other = f"spiffe://{DOMAIN}/ns/ml-inference/sa/other"
    error = attempt(
        delegating, GATEWAY, callers.written(ADA, audience=other, request=message())
    )
    assert refused(error) == (
        Code.UNAUTHENTICATED,
        "the caller header does not hold",
        "Unauthenticated",
    )
    [refusal] = delegating.refusals
    assert refusal.peer.id == GATEWAY
    assert "not for" in refusal.error.reason
    assert delegating.service.calls == []


def test_a_caller_header_replayed_with_another_request_is_refused(
    delegating, monkeypatch
) -> None:
    header = callers.written(ADA, audience=SERVER, request=message(t="her own"))
    error = attempt(delegating, GATEWAY, header)
    assert refused(error)[:2] == (
        Code.UNAUTHENTICATED,
        "the caller header does not hold",
    )
    [outcome] = delegating.service.outcomes
    assert "it was made for another request" in outcome.reason
    monkeypatch.setattr(callers, "check_request", lambda *_: None)
    assert attempt(delegating, GATEWAY, header) is None
    assert delegating.service.calls[-1].caller.subject == "ada"


def test_an_old_caller_header_is_refused(delegating, monkeypatch) -> None:
    monkeypatch.setattr(callers, "LIFETIME_S", -1.0)
    stale = callers.written(ADA, audience=SERVER, request=message())
    monkeypatch.setattr(callers, "LIFETIME_S", 3600.0)
    lasting = callers.written(ADA, audience=SERVER, request=message())
    for header in stale, lasting:
        assert attempt(delegating, GATEWAY, header).code() is Code.UNAUTHENTICATED
    assert delegating.service.calls == []


def test_two_caller_headers_or_nonsense_are_refused(delegating) -> None:
    header = callers.written(ADA, audience=SERVER, request=message())
    for headers in (header, header), (b"{}",), (b"",), (b"\xff" * 5000,):
        assert attempt(delegating, GATEWAY, *headers).code() is Code.UNAUTHENTICATED
    assert delegating.service.calls == []
    assert all(isinstance(r.error, Unauthenticated) for r in delegating.refusals)
