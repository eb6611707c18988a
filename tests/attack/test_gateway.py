"""What the outside can try at the gateway, and how far it gets."""

import contextlib
import re
import resource
import socket
import ssl
import threading
import time

import pytest
from cryptography import x509

from tests.unit.gateway.support import (
    CLI,
    DOMAIN,
    GATEWAY,
    SHOP,
    asked,
    running,
    tensor,
    text,
)
from tests.unit.gateway.test_gateway import MovingSource, post
from ztserve.gateway import Limits, head, tls
from ztserve.identity import Identity, dns_name
from ztserve.testing import ThrowAwayAuthority
from ztserve.types import Peer, now

ENDED = (ssl.SSLError, ConnectionError, TimeoutError)


@pytest.fixture(scope="module")
def authority():
    return ThrowAwayAuthority(DOMAIN)


@pytest.fixture
def edge(authority, tmp_path):
    with running(authority, tmp_path) as one:
        yield one


@pytest.fixture(scope="module")
def shared(authority, tmp_path_factory):
    """One gateway for all that must never reach a deployment."""
    with running(authority, tmp_path_factory.mktemp("shared")) as one:
        yield one


def statuses(answer: bytes) -> list[int]:
    return [int(one) for one in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answer)]


# --- identities that do not hold ------------------------------------------------------


def hostile(authority):
    foreign = ThrowAwayAuthority(DOMAIN)
    yield "another authority of the same name", foreign.forge(CLI)
    yield "expired", authority.forge(CLI, starts_s=-7200, ends_s=-3600)
    yield "not yet valid", authority.forge(CLI, starts_s=3600, ends_s=7200)
    yield "two names", authority.forge(CLI, uris=[CLI, GATEWAY])
    yield "no name", authority.forge(CLI, uris=[], dns=["gateway"])
    yield "an authority as a client", authority.forge(CLI, ca=True)
    yield "a server's certificate", authority.forge(CLI, extended=["server"])
    yield "an id of another domain", authority.forge("spiffe://b.example/ns/x/sa/y")
    workload = authority.intermediate(SHOP)
    yield "signed by a workload", workload.forge(CLI)


@pytest.mark.slow
def test_certificates_that_do_not_hold_open_nothing_and_are_told_so(edge):
    tried = list(hostile(edge.authority))
    for why, svid in tried:
        status, headers, told = edge.ask("POST", "/v1/predict", tensor(), svid=svid)
        assert (status, headers["connection"]) == (401, "close"), why
        assert told["error"] == "the peer's identity could not be verified", why
    assert edge.service.calls == []
    assert edge.counted() == {"client certificate refused": len(tried)}


def test_without_our_own_verification_any_certificate_would_get_in(edge, monkeypatch):
    def lenient(self, chain):
        leaf = x509.load_der_x509_certificate(chain[0])
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        (uri,) = names.value.get_values_for_type(x509.UniformResourceIdentifier)
        return Peer(uri, 1, now(), now(), "")

    monkeypatch.setattr(tls.Edge, "peer", lenient)
    forged = ThrowAwayAuthority(DOMAIN).forge(CLI)
    assert edge.ask("POST", "/v1/predict", tensor(), svid=forged)[0] == 200


def test_a_certificate_is_worth_nothing_without_its_key(edge):
    stolen, own = edge.authority.issue(CLI), edge.authority.issue(SHOP)
    context = edge.context(None)
    pem = edge.folder / "stolen.pem"
    pem.write_bytes(stolen.chain_pem() + own.key_pem())
    with pytest.raises(ssl.SSLError):
        context.load_cert_chain(pem)


@pytest.mark.slow
def test_an_svid_that_expires_during_a_stream_ends_it(authority, tmp_path):
    with running(authority, tmp_path) as edge:
        svid = authority.forge(CLI, ends_s=3)
        with edge.https(svid) as kept, edge.socket(svid) as streaming:
            assert asked(kept, "POST", "/v1/predict", tensor())[0] == 200
            streaming.sendall(post("/v1/stream", text("endless")))
            began = time.monotonic()
            with contextlib.suppress(*ENDED):
                while streaming.recv(65536):
                    assert time.monotonic() - began < 6
            assert time.monotonic() - began < 6
            assert asked(kept, "POST", "/v1/predict", tensor())[0] == 401


def test_another_server_cannot_pass_for_the_gateway(edge):
    context = edge.context(None)
    with (
        socket.create_connection(("127.0.0.1", edge.port), timeout=5) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(plain, server_hostname=dns_name(SHOP))


# --- before TLS -----------------------------------------------------------------------


@pytest.mark.slow
def test_plain_http_old_tls_and_noise_are_refused_and_counted(edge):
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"SSH-2.0-x\r\n"):
        with socket.create_connection(("127.0.0.1", edge.port), timeout=5) as plain:
            plain.sendall(noise)
            answer = plain.recv(100)
            assert answer[:1] in (b"", b"\x15")  # nothing, or a TLS alert
            assert b"HTTP" not in answer
    context = edge.context(None)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", edge.port), timeout=5) as plain,
        pytest.raises(ENDED),
    ):
        context.wrap_socket(plain, server_hostname=dns_name(GATEWAY))
    counted = edge.counted()
    assert counted.pop("unsupported protocol") == 1
    assert sum(counted.values()) == 3
    assert "http request" in counted


def test_only_tls_1_3_is_spoken_and_no_session_is_resumed(edge):
    context = edge.context(edge.authority.issue(CLI))
    sessions = []
    for session in (None, None, None):
        session = sessions[-1] if sessions else None
        plain = socket.create_connection(("127.0.0.1", edge.port), timeout=5)
        with context.wrap_socket(
            plain, server_hostname=dns_name(GATEWAY), session=session
        ) as one:
            one.sendall(post("/v1/predict", tensor(), "connection: close"))
            assert one.recv(65536).startswith(b"HTTP/1.1 200 ")
            assert one.version() == "TLSv1.3"
            assert not one.session_reused
            sessions.append(one.session)


@pytest.mark.slow
def test_a_handshake_that_never_ends_is_ended(authority, tmp_path):
    limits = Limits(handshake_s=0.5)
    with running(authority, tmp_path, limits=limits) as edge:
        idle = [
            socket.create_connection(("127.0.0.1", edge.port), timeout=5)
            for _ in range(20)
        ]
        began = time.monotonic()
        for one in idle:
            with contextlib.suppress(ConnectionError):
                assert one.recv(1) == b""
            one.close()
        assert time.monotonic() - began < 3
        assert edge.counted() == {"handshake took too long": 20}
        told = [r for r in edge.records() if r.get("status_code") == "handshake"]
        assert {record["src_endpoint"]["ip"] for record in told} == {"127.0.0.1"}
        assert edge.ask("POST", "/v1/predict", tensor())[0] == 200


@pytest.mark.slow
def test_connections_are_bounded_in_total_and_by_address(authority, tmp_path):
    limits = Limits(max_connections=8, max_connections_per_address=5)
    with running(authority, tmp_path, limits=limits) as edge:
        held = [edge.socket() for _ in range(5)]
        with pytest.raises(ENDED):
            edge.socket()
        other = [
            socket.create_connection(
                ("127.0.0.1", edge.port), timeout=5, source_address=("127.0.0.2", 0)
            )
            for _ in range(3)
        ]
        with (
            socket.create_connection(
                ("127.0.0.1", edge.port), timeout=5, source_address=("127.0.0.3", 0)
            ) as beyond,
            contextlib.suppress(ConnectionError),
        ):
            assert beyond.recv(1) == b""
        for one in (*held, *other):
            one.close()
        assert edge.counted()["too many connections"] == 2
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            with contextlib.suppress(*ENDED):
                assert edge.ask("POST", "/v1/predict", tensor())[0] == 200
                return
        raise AssertionError("the places were not given free")


# --- slow and large -------------------------------------------------------------------


@pytest.mark.slow
def test_a_header_or_body_that_trickles_is_ended(authority, tmp_path):
    limits = Limits(header_s=0.5, body_s=0.5, idle_s=0.5)
    with running(authority, tmp_path, limits=limits) as edge:
        whole = post("/v1/predict", tensor())
        began = time.monotonic()
        answer = edge.raw(whole[:20])
        assert statuses(answer) == [408]
        answer = edge.raw(whole[:-10])
        assert statuses(answer) == [408]
        assert b"the body took too long" in answer
        assert edge.raw(b"") == b"", "an idle connection is closed without a word"
        assert time.monotonic() - began < 6
        assert edge.service.calls == []


@pytest.mark.slow
def test_one_byte_now_and_then_does_not_keep_a_header_alive(authority, tmp_path):
    with (
        running(authority, tmp_path, limits=Limits(header_s=0.6)) as edge,
        edge.socket() as slow,
        contextlib.suppress(*ENDED),
    ):
        began = time.monotonic()
        for byte in b"GET /v2/health/ready HTTP/1.1\r\n" + b"x" * 100:
            slow.sendall(bytes([byte]))
            time.sleep(0.1)
            assert time.monotonic() - began < 4, "the header was never given up"


def test_a_header_without_end_is_refused(edge):
    endless = b"GET /v2/health/ready HTTP/1.1\r\nhost: g\r\nx: " + b"a" * 40_000
    answer = edge.raw(endless)
    assert statuses(answer) == [431]
    many = b"GET /v2/health/ready HTTP/1.1\r\nhost: g\r\n" + b"x: y\r\n" * 100
    assert statuses(edge.raw(many + b"\r\n")) == [431]


def test_a_body_that_is_too_large_is_refused_unread(edge):
    answer = edge.raw(
        post("/v1/predict", tensor()).replace(
            b"content-length: ", b"content-length: 99999999"
        )
    )
    assert statuses(answer) == [413]
    assert edge.service.calls == []


@pytest.mark.slow
def test_a_denied_giant_body_costs_no_memory(edge):
    shop = edge.authority.issue(SHOP)
    edge.ask("POST", "/v1/predict", tensor())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head_only = post("/v1/predict", tensor()).partition(b"\r\n\r\n")[0]
    head_only = re.sub(rb"length: [0-9]+", b"length: 8000000", head_only)
    piece = b"[" * 65536
    for _ in range(8):
        with edge.socket(shop) as one, contextlib.suppress(*ENDED):
            one.sendall(head_only + b"\r\n\r\n")
            for _ in range(120):
                one.sendall(piece)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 24 * 1024
    codes = {record["status_code"] for record in edge.records()}
    assert codes == {"", "Denied"}
    assert edge.ask("POST", "/v1/predict", tensor())[0] == 200


@pytest.mark.slow
def test_a_client_that_does_not_read_is_dropped(authority, tmp_path):
    with (
        running(authority, tmp_path, limits=Limits(write_s=0.3)) as edge,
        edge.socket() as one,
    ):
        one.sendall(post("/v1/stream", text("flood")))
        ends = time.monotonic() + 10
        while not edge.service.outcomes and time.monotonic() < ends:
            time.sleep(0.02)
        assert edge.service.outcomes, "the stream went on for a client that is stuck"
        assert edge.counted() == {"client does not read": 1}


def test_requests_at_once_are_bounded_by_peer_and_in_total(authority, tmp_path):
    limits = Limits(max_in_flight=3, max_in_flight_per_peer=2)
    with (
        running(authority, tmp_path, limits=limits) as edge,
        contextlib.ExitStack() as s,
    ):
        svid = authority.issue(CLI)
        for _ in range(2):
            one = s.enter_context(edge.socket(svid))
            one.sendall(post("/v1/predict", text("wait")))
        assert edge.service.running.wait(5)
        ends = time.monotonic() + 5
        while len(edge.service.calls) < 2 and time.monotonic() < ends:
            time.sleep(0.02)
        status, headers, told = edge.ask("POST", "/v1/predict", tensor(), svid=svid)
        assert (status, headers["retry-after"]) == (429, "1")
        assert told["error"].startswith("you have too many requests in flight")
        assert edge.records()[-1]["status_code"] == "Overloaded"
        edge.service.go.set()
        edge.service.go.clear()


@pytest.mark.slow
def test_bodies_at_once_are_bounded_in_bytes(authority, tmp_path):
    with running(authority, tmp_path, limits=Limits(max_bodies_bytes=2000)) as edge:
        half = post("/v1/predict", tensor(rows=100)).partition(b"\r\n\r\n")[0]
        with edge.socket() as one:
            one.sendall(half + b"\r\n\r\n")
            time.sleep(0.3)
            status, _, told = edge.ask("POST", "/v1/predict", tensor(rows=100))
            assert (status, told["error"][:34]) == (
                429,
                "this gateway has all the bodies th",
            )
        time.sleep(0.2)
        assert edge.ask("POST", "/v1/predict", tensor(rows=100))[0] == 200


# --- smuggling ------------------------------------------------------------------------

INNER = post("/v1/predict", tensor(rows=3))
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n"


def smuggled(*lines: bytes, body: bytes) -> bytes:
    start = (
        b"POST /v1/predict HTTP/1.1",
        b"host: g",
        b"content-type: application/json",
    )
    return b"\r\n".join((*start, *lines, b"", b"")) + body


SMUGGLED = {
    "CL.TE": smuggled(
        b"content-length: 5", b"transfer-encoding: chunked", body=b"0\r\n\r\n" + INNER
    ),
    "TE.CL": smuggled(
        b"transfer-encoding: chunked",
        b"content-length: 4",
        body=CHUNKED % (len(INNER), INNER),
    ),
    "TE hidden by a space": smuggled(
        b"content-length: 2", b"transfer-encoding : chunked", body=b"{}" + INNER
    ),
    "TE hidden by a tab": smuggled(
        b"content-length: 2", b"transfer-encoding:\tchunked", body=b"{}" + INNER
    ),
    "TE hidden by a bare line feed": smuggled(
        b"content-length: 2", b"x: y\ntransfer-encoding: chunked", body=b"{}" + INNER
    ),
    "TE hidden by folding": smuggled(
        b"content-length: 2", b"x: y\r\n transfer-encoding: chunked", body=b"{}" + INNER
    ),
    "TE of another case": smuggled(
        b"content-length: 2", b"Transfer-Encoding: ChUnKeD", body=b"{}" + INNER
    ),
    "two lengths": smuggled(
        b"content-length: 2", b"content-length: 0", body=b"{}" + INNER
    ),
    "one length twice": smuggled(b"content-length: 2, 2", body=b"{}" + INNER),
    "a signed length": smuggled(b"content-length: +2", body=b"{}" + INNER),
    "no length": smuggled(body=INNER),
    "chunks": smuggled(
        b"transfer-encoding: chunked", body=CHUNKED % (len(INNER), INNER)
    ),
    "a chunk bomb": smuggled(b"transfer-encoding: chunked", body=b"1\r\n{\r\n" * 9999),
    "HTTP/1.0 kept alive": b"GET /v2/health/live HTTP/1.0\r\n"
    b"connection: keep-alive\r\n\r\n" + INNER,
    "an empty line first": b"\r\n\r\n" + INNER,
    "a GET with a body": b"GET /v2/health/live HTTP/1.1\r\nhost: g\r\n"
    b"content-length: 4\r\n\r\n1234" + INNER,
    "a bare carriage return": b"GET /v2/health/live HTTP/1.1\rhost: g\r\n\r\n" + INNER,
    "two hosts": b"GET /v2/health/live HTTP/1.1\r\nhost: g\r\nhost: h\r\n\r\n" + INNER,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMUGGLED)
def test_what_two_parsers_could_read_differently_is_refused_and_nothing_after_it_runs(
    shared, name
):
    answer = shared.raw(SMUGGLED[name])
    (status,) = statuses(answer)
    assert status in (400, 411, 505)
    assert b"connection: close" in answer
    assert shared.service.calls == []


@pytest.mark.slow
def test_refused_requests_are_counted_by_status(edge):
    for name in ("CL.TE", "chunks", "HTTP/1.0 kept alive"):
        edge.raw(SMUGGLED[name])
    assert edge.counted() == {"HTTP 400": 1, "HTTP 411": 1, "HTTP 505": 1}


def test_a_parser_that_believes_content_length_alone_would_be_smuggled_through(
    edge, monkeypatch
):
    fields = head._fields

    def lenient(lines):
        found = fields(lines)
        found.pop("transfer-encoding", None)
        return found

    monkeypatch.setattr(head, "_fields", lenient)
    answer = edge.raw(
        SMUGGLED["CL.TE"] + post("/v1/predict", tensor(), "connection: close")
    )
    # A proxy in front saw one request that ends in INNER; we answered it as a second.
    assert statuses(answer) == [400, 200, 200]
    assert len(edge.service.calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "//v1/predict",
        "/v1//predict",
        "/v1/./predict",
        "/v1/x/../predict",
        "/v1/predict/",
        "/v1/predict?x=1",
        "/v1/predict;x=1",
        "/v1/predict%00",
        "/v1%2fpredict",
        "/%76%31/predict",
        "/v1\\predict",
        "https://gateway/v1/predict",
        "/v2/models/../health/live",
    ],
)
def test_a_path_has_one_spelling(shared, path):
    answer = shared.raw(post(path, tensor()))
    assert statuses(answer) == [400]
    assert shared.service.calls == []


# --- what a client says of itself -----------------------------------------------------

FORGED = {
    "zt-caller-bin": "eyJzdWIiOiAiYWRtaW4ifQ==",
    "x-forwarded-client-cert": f"URI={GATEWAY}",
    "x-forwarded-for": "10.0.0.1",
    "forwarded": "for=10.0.0.1",
    "x-real-ip": "10.0.0.1",
    "authorization": "Bearer x",
    "cookie": "session=admin",
    "x-http-method-override": "DELETE",
    "x-original-url": "/v2/health/live",
}
BY_HEADER = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: header, namespace: ml-api}
spec:
  rules:
  - when: [{key: "request.headers[x-forwarded-client-cert]", values: ["*"]}]
"""


def test_forged_headers_change_nothing_and_go_no_further(edge):
    shop = edge.authority.issue(SHOP)
    headers = {"content-type": "application/json", **FORGED}
    status = edge.ask("POST", "/v1/predict", tensor(), headers=headers, svid=shop)[0]
    assert status == 403
    assert edge.ask("POST", "/v1/predict", tensor(), headers=headers)[0] == 200
    (call,) = edge.service.calls
    assert call.caller.subject == CLI
    assert not {name.lower() for name in FORGED} & set(call.headers)
    notes = edge.records()[-1]["unmapped"]["notes"]
    assert notes == [f"dropped {', '.join(sorted(FORGED))}"]


def test_even_a_policy_that_believes_a_forgeable_header_never_sees_one(
    authority, tmp_path, monkeypatch
):
    with running(authority, tmp_path, policy=BY_HEADER) as edge:
        shop = authority.issue(SHOP)
        headers = {"content-type": "application/json", **FORGED}
        forged = ("POST", "/v1/predict", tensor())
        assert edge.ask(*forged, headers=headers, svid=shop)[0] == 403
        monkeypatch.setattr(head, "_FORGEABLE", re.compile("nothing"))
        assert edge.ask(*forged, headers=headers, svid=shop)[0] == 200


def test_a_page_in_a_browser_cannot_make_it_call(edge):
    # Forms and scripts of other sites can send these types without asking first.
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
    ):
        status, headers, _ = edge.ask(
            "POST", "/v1/predict", tensor(), headers={"content-type": kind}
        )
        assert status == 415
        assert "access-control-allow-origin" not in headers
    answer = edge.raw(b"OPTIONS /v1/predict HTTP/1.1\r\nhost: g\r\norigin: x\r\n\r\n")
    assert statuses(answer) == [405]


def test_a_body_cannot_break_out_of_its_event_or_its_response(edge):
    body = text("a\r\n\r\ndata: forged\n\nevent: error\u2028")
    status, _, events = edge.ask("POST", "/v1/stream", body)
    assert status == 200
    assert events.count(b"\n\n") == 3
    assert b"forged\n" not in events
    body = {**tensor(), "id": "x\r\nset-cookie: a=b"}
    status, headers, answer = edge.ask("POST", "/v1/predict", body)
    assert (status, answer["id"]) == (200, "x\r\nset-cookie: a=b")
    assert "set-cookie" not in headers


@pytest.mark.slow
def test_refusals_without_a_call_are_counted_and_cannot_fill_the_log(edge):
    before = len(edge.log.read_bytes())
    for _ in range(40):
        edge.ask("POST", "/v1/predict", tensor(), anonymous=True)
    counted = edge.counted()
    time.sleep(1.2)
    assert sum(edge.counted().values()) == 40
    assert set(counted) == {"no client certificate"}
    assert len(edge.log.read_bytes()) - before < 2000


@pytest.mark.slow
def test_a_flood_of_hostile_requests_leaves_others_served(edge):
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            with contextlib.suppress(*ENDED):
                edge.raw(SMUGGLED["a chunk bomb"])

    threads = [threading.Thread(target=flood) for _ in range(4)]
    [one.start() for one in threads]
    try:
        with edge.https() as connection:
            for _ in range(20):
                assert asked(connection, "POST", "/v1/predict", tensor())[0] == 200
    finally:
        stop.set()
        [one.join() for one in threads]


def test_a_source_that_loses_its_identity_stops_the_gateway_from_answering(
    authority, tmp_path
):
    source = MovingSource(Identity(authority.issue(GATEWAY), authority.bundles))
    with running(authority, tmp_path, source=source) as edge, edge.https() as kept:
        assert asked(kept, "POST", "/v1/predict", tensor())[0] == 200
        source.identity = None
        assert asked(kept, "POST", "/v1/predict", tensor())[0] == 503
