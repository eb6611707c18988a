import json
import socket
import ssl
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import Authority, verify_peer
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.federation import endpoint as bundle_endpoint
from ztserve.identity.federation.endpoint import BundleEndpoint, renewing
from ztserve.identity.federation.fetch import peer_chain

ME = "spiffe://b.example/ns/ztserve/sa/bundle"
GET = b"GET /bundle.json HTTP/1.1\r\nHost: b\r\n\r\n"


@pytest.fixture
def authority():
    return Authority("b.example")


@pytest.fixture
def endpoint(authority):
    made = BundleEndpoint(
        authority.trust_bundle, renewing(authority, ME), path="/bundle.json"
    )
    with made:
        made.address = made.start()
        yield made


def visit(address, **wanted) -> ssl.SSLSocket:
    """A client without a certificate, as any poller is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name, value in wanted.items():
        setattr(context, name, value)
    return context.wrap_socket(socket.create_connection(address, 5))


def ask(address, request: bytes) -> tuple[int, dict[str, str], bytes]:
    with visit(address) as tls:
        tls.sendall(request)
        raw = b""
        while piece := tls.recv(65536):
            raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    return int(line.split()[1]), dict(f.split(": ", 1) for f in fields), body


def test_f6_the_bundle_is_served_to_a_client_without_a_certificate(authority, endpoint):
    status, fields, body = ask(endpoint.address, GET)
    assert status == 200
    assert fields["Content-Type"] == "application/json"
    assert fields["Content-Length"] == str(len(body))
    assert fields["Cache-Control"] == "no-cache"
    assert fields["Connection"] == "close"
    assert TrustBundle.parse(body, "b.example") == authority.trust_bundle()


def test_f4_the_endpoint_shows_a_valid_svid_over_tls_1_3(authority, endpoint):
    with visit(endpoint.address) as tls:
        assert tls.version() == "TLSv1.3"
        peer = verify_peer(peer_chain(tls), authority.bundles, now=types.now())
        assert peer.id == ME
    with pytest.raises(ssl.SSLError, match="alert protocol version"):
        visit(endpoint.address, maximum_version=ssl.TLSVersion.TLSv1_2)


def test_f4_the_chain_of_an_intermediate_is_sent_whole():
    authority = Authority("b.example", intermediate_ttl_s=7200)
    svid = renewing(authority, ME)
    with (
        BundleEndpoint(authority.trust_bundle, svid) as endpoint,
        visit(endpoint.start()) as tls,
    ):
        chain = peer_chain(tls)
    assert len(chain) == 2
    assert verify_peer(chain, authority.bundles, now=types.now()).id == ME


def test_what_is_served_is_the_newest(authority, endpoint):
    before = json.loads(ask(endpoint.address, GET)[2])
    authority.roll()
    after = json.loads(ask(endpoint.address, GET)[2])
    assert len(after["keys"]) == len(before["keys"]) + 1
    assert after["spiffe_sequence"] > before["spiffe_sequence"]


def test_the_svid_is_renewed_at_half_of_its_life(authority, monkeypatch):
    current = renewing(authority, ME, ttl_s=60)
    first, now = current(), types.now()
    monkeypatch.setattr(types, "now", lambda: now + timedelta(seconds=29))
    assert current() is first
    monkeypatch.setattr(types, "now", lambda: now + timedelta(seconds=32))
    assert current() is not first


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /bundle.json HTTP/1.1\r\n\r\n", 405),
        (b"HEAD /bundle.json HTTP/1.1\r\n\r\n", 405),
        (b"GET /other HTTP/1.1\r\n\r\n", 404),
        (b"GET /bundle.json/ HTTP/1.1\r\n\r\n", 404),
        (b"GET /%62undle.json HTTP/1.1\r\n\r\n", 404),
        (b"GET /../bundle.json HTTP/1.1\r\n\r\n", 404),
        (b"GET /bundle.json HTTP/2.0\r\n\r\n", 400),
        (b"GET  /bundle.json HTTP/1.1\r\n\r\n", 400),
        (b"\0\r\n\r\n", 400),
        (b"GET /bundle.json HTTP/1.1\r\nX: " + b"x" * 9000, 431),
    ],
)
def test_only_a_get_of_the_one_path_is_answered(endpoint, request_, status):
    got, fields, body = ask(endpoint.address, request_)
    assert (got, body) == (status, b"{}")
    assert fields.get("Allow") == ("GET" if status == 405 else None)


def test_without_a_bundle_the_answer_is_503(authority):
    def none():
        raise IdentityError("no bundle, says the test")

    with BundleEndpoint(none, renewing(authority, ME)) as endpoint:
        address = endpoint.start()
        assert ask(address, b"GET / HTTP/1.1\r\n\r\n")[0] == 503


def test_what_cannot_be_served_is_refused_at_once(authority, endpoint):
    svid = renewing(authority, ME)
    with pytest.raises(IdentityError, match="is not a plain path"):
        BundleEndpoint(authority.trust_bundle, svid, path="bundle?x")
    busy = BundleEndpoint(authority.trust_bundle, svid)
    with pytest.raises(IdentityError, match=r"bundle endpoint .*in use"):
        busy.start(*endpoint.address)
    with pytest.raises(IdentityError, match="is not of b"):
        renewing(authority, "spiffe://a.example/x")


def test_a_closed_endpoint_takes_no_visit(endpoint):
    endpoint.close()
    endpoint.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(endpoint.address, 1)


def test_the_key_is_never_in_a_file_that_has_a_name(authority, monkeypatch):
    opened = []
    monkeypatch.setattr(
        ssl.SSLContext,
        "load_cert_chain",
        lambda _, path: opened.append((path, str(Path(path).readlink()))),
    )
    bundle_endpoint._server_context(authority.issue(ME))
    ((path, target),) = opened
    assert target == "/memfd:svid (deleted)"
    assert not Path(path).exists()  # closed again


@pytest.mark.slow
def test_a_visitor_that_dawdles_is_sent_away(endpoint, monkeypatch):
    monkeypatch.setattr(bundle_endpoint, "MAX_VISIT_S", 0.4)
    started = time.monotonic()
    with socket.create_connection(endpoint.address, 5) as silent:
        assert silent.recv(1) == b""  # it never began a handshake
    with visit(endpoint.address) as tls:
        assert dripped(tls) < 20
    assert time.monotonic() - started < 2
    monkeypatch.undo()
    assert ask(endpoint.address, GET)[0] == 200


def dripped(tls) -> int:
    """Send a head byte by byte; return how many were taken."""
    for count in range(100):
        try:
            tls.sendall(b"G")
        except OSError:
            return count
        time.sleep(0.05)
    return 100


@pytest.mark.slow
def test_one_visitor_too_many_takes_the_place_of_the_oldest(endpoint):
    crowd = [socket.create_connection(endpoint.address, 5) for _ in range(32)]
    until(lambda: endpoint._free._value == 0)
    assert ask(endpoint.address, GET)[0] == 200
    assert crowd[0].recv(1) == b""
    for one in crowd:
        one.close()
    until(lambda: endpoint._free._value == 32)
    assert ask(endpoint.address, GET)[0] == 200


def until(fact) -> None:
    end = time.monotonic() + 5
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_many_ask_at_once(endpoint):
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(endpoint.address, GET)[0]))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 16
