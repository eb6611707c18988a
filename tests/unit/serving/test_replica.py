"""What a replica writes of those who never got as far as a call."""

import socket
import ssl
import time

import pytest

from ztserve import TensorSpec, ZTDeployment
from ztserve.testing import ThrowAwayAuthority, serve

pytestmark = pytest.mark.slow


class Same(ZTDeployment):
    inputs = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)

    def predict(self, x):
        return x


@pytest.fixture(scope="module")
def served():
    with serve(Same) as running:
        yield running


def knock(served, context=None):
    """Connect, as nobody who is known here; in the clear without a `context`."""
    host, _, port = served.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as plain:
        if context is None:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert plain.recv(1) == b""
            return
        with pytest.raises(ssl.SSLError), context.wrap_socket(plain) as secure:
            secure.recv(1)


def stranger(svid=None, folder=None):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if svid is not None:
        file = folder / "stranger.pem"
        file.write_bytes(svid.chain_pem() + svid.key_pem())
        context.load_cert_chain(file)
    return context


def told(served, since, count):
    """Wait for `count` refused handshakes after record `since`; return the records."""
    until = time.monotonic() + 5
    while True:
        found = [r for r in served.records() if r["seq"] > since]
        found = [r for r in found if r.get("status_code") == "handshake"]
        if sum(r["count"] for r in found) >= count:
            return found
        assert time.monotonic() < until, found
        time.sleep(0.05)


def last(served):
    return served.records()[-1]["seq"]


def test_a_refused_handshake_is_one_record_with_cause_and_address(served, tmp_path):
    since = last(served)
    knock(served, stranger())
    [record] = told(served, since, 1)
    assert record["status_detail"] == "no client certificate"
    assert record["src_endpoint"] == {"ip": "127.0.0.1"}
    assert (record["status"], record["count"]) == ("refused", 1)

    since = last(served)
    authority = ThrowAwayAuthority(served.authority.trust_domain)
    knock(served, stranger(authority.issue(served.server_id), tmp_path))
    [record] = told(served, since, 1)
    assert record["status_detail"].startswith("certificate not trusted: no valid path")
    assert record["src_endpoint"] == {"ip": "127.0.0.1"}


def test_refused_handshakes_of_one_cause_and_address_are_counted(served):
    since = last(served)
    for _ in range(30):
        knock(served)
    found = told(served, since, 30)
    assert len(found) <= 2  # they may fall into two seconds
    assert sum(record["count"] for record in found) == 30
    assert {record["status_detail"] for record in found} == {"not TLS"}
    assert {record["src_endpoint"]["ip"] for record in found} == {"127.0.0.1"}
