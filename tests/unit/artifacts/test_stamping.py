"""Signing with an SVID and asking for timestamps, in process and over HTTP."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.unit.artifacts.studio import TRAINER
from tests.unit.artifacts.workshop import signing_key
from ztserve import types
from ztserve.artifacts.publish import (
    SvidKey,
    TimestampedSigner,
    load_authority,
    new_authority,
    stamp_with,
)
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.timestamps import parse_timestamp
from ztserve.errors import ArtifactError, ConfigError, VerificationError
from ztserve.testing.authority import ThrowAwayAuthority

REPLY = "application/timestamp-reply"


@pytest.fixture
def clock(tmp_path):
    return load_authority(new_authority(tmp_path / "clock.pem", name="clock").private)


class Answering(BaseHTTPRequestHandler):
    """A timestamp authority over HTTP; the server's `reply` makes its answer."""

    def do_POST(self):
        assert self.headers["Content-Type"] == "application/timestamp-query"
        query = self.rfile.read(int(self.headers["Content-Length"]))
        status, kind, body = self.server.reply(query)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 302:
            self.send_header("Location", "/other")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        return


@contextmanager
def serving(reply):
    server = HTTPServer(("127.0.0.1", 0), Answering)
    server.reply = reply
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/tsa?a=b"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_signature_is_stamped_in_process(clock):
    signer = TimestampedSigner(signing_key(), stamp_with(clock))
    envelope = parse_envelope(signer.envelope(b"{}"), what="x.sig")
    (raw,) = envelope.timestamps
    assert abs(parse_timestamp(raw).time - types.now()) < timedelta(seconds=5)
    assert envelope.key_id == signer.id


def test_a_signature_is_stamped_over_http(clock):
    with serving(lambda query: (200, REPLY, clock.answer(query))) as url:
        raw = stamp_with(url)(b"signature")
    assert abs(parse_timestamp(raw).time - types.now()) < timedelta(seconds=5)


def test_an_svid_signs_with_its_chain(clock):
    spire = ThrowAwayAuthority("example.test")
    svid = spire.intermediate().forge(TRAINER)
    signer = TimestampedSigner(SvidKey(svid), stamp_with(clock))
    envelope = parse_envelope(signer.envelope(b"{}"), what="x.sig")
    assert envelope.chain == svid.chain_der
    assert len(envelope.chain) == 2
    assert envelope.key_id == signer.id
    assert "publicKey" not in json.loads(signer.envelope(b"{}"))["verificationMaterial"]


@pytest.mark.slow
def test_an_svid_with_an_rsa_key_does_not_sign():
    key = rsa.generate_private_key(65537, 2048)
    svid = ThrowAwayAuthority("example.test").forge(TRAINER, key=key)
    with pytest.raises(
        ConfigError, match=r"has an RSA key; .* set the issuer's key ty"
    ):
        SvidKey(svid)


def late(clock):
    return lambda query: clock.answer(query, now=types.now() - timedelta(minutes=5))


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (lambda c, q: (302, REPLY, b""), ArtifactError, "status 302 .* expected 200"),
        (lambda c, q: (200, "text/html", b"x"), ArtifactError, "with 'text/html'"),
        (lambda c, q: (200, REPLY, b"x"), VerificationError, "timestamp: cut short"),
        (
            lambda c, q: (200, REPLY, b"\x30" * 70_000),
            ArtifactError,
            "more than 65536 bytes",
        ),
        (
            lambda c, q: (200, REPLY, late(c)(q)),
            VerificationError,
            "its clock says .*, ours .*: set the one that is wrong",
        ),
        (
            lambda c, q: (200, REPLY, c.answer(q[:-4] + bytes([q[-4] ^ 1]) + q[-3:])),
            VerificationError,
            "answer is to another query",
        ),
        (
            lambda c, q: (200, REPLY, c.answer(q.replace(q[24:56], b"x" * 32))),
            VerificationError,
            "is that of another signature",
        ),
    ],
    ids=["redirect", "page", "noise", "long", "clock", "nonce", "other"],
)
def test_an_answer_that_is_none_is_not_taken(clock, reply, error, message):
    with (
        serving(lambda query: reply(clock, query)) as url,
        pytest.raises(error, match=message),
    ):
        stamp_with(url)(b"signature")


def test_an_authority_that_is_away_is_told():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(ArtifactError, match=r"refused.*; try again, or another"):
            stamp_with(url)(b"signature")


@contextmanager
def dripping(head):
    """Answer with `head`, and then a byte each 20 ms for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def drip():
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(head)
                while not done.wait(0.02):
                    try:
                        peer.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        finally:
            done.set()
            thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/timestamp-reply\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/timestamp-reply\r\n"
        b"Content-Length: 60000\r\n\r\n",
    ],
    ids=["headers", "endless", "long"],
)
def test_an_authority_that_drips_is_left(head):
    start = time.monotonic()
    with (
        dripping(head) as url,
        pytest.raises(ArtifactError, match=r"took longer than 0\.3 s"),
    ):
        stamp_with(url, timeout_s=0.3)(b"signature")
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "url",
    ["", "clock.pem", "ftp://host/", "https:///x", "http://a:b@host/", "http://h:x"],
)
def test_what_is_no_url_of_an_authority_is_refused(url):
    with pytest.raises(ConfigError, match=r"timestamp authority '.*': "):
        stamp_with(url)


def test_https_judges_the_server(clock):
    with (
        serving(lambda query: (200, REPLY, clock.answer(query))) as url,
        pytest.raises(ArtifactError, match="SSL"),
    ):
        stamp_with(url.replace("http:", "https:"))(b"signature")
