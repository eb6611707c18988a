"""TLS without sockets: both ends in this process."""

import contextlib

import pytest
from cryptography import x509
from OpenSSL import SSL

from tests.unit.gateway.support import CLI, GATEWAY
from ztserve.errors import Unauthenticated
from ztserve.gateway.tls import Edge, Session
from ztserve.transport.contexts import HandshakeRefused


def client(svid=None, **versions) -> SSL.Connection:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    if "highest" in versions:
        context.set_max_proto_version(versions["highest"])
    if svid is not None:
        leaf, *rest = map(x509.load_der_x509_certificate, svid.chain_der)
        context.use_certificate(leaf)
        for one in rest:
            context.add_extra_chain_cert(one)
        context.use_privatekey(svid.key)
    connection = SSL.Connection(context, None)
    connection.set_alpn_protos([b"h2", b"http/1.1"])
    connection.set_connect_state()
    return connection


def step(connection: SSL.Connection, session: Session) -> None:
    with contextlib.suppress(SSL.WantReadError):
        connection.do_handshake()
    with contextlib.suppress(SSL.WantReadError):
        while data := connection.bio_read(65536):
            session.receive(data)
    if sent := session.outgoing():
        connection.bio_write(sent)


def joined(edge: Edge, svid=None, **versions) -> tuple[SSL.Connection, Session]:
    connection, session = client(svid, **versions), edge.session()
    for _ in range(4):
        step(connection, session)
    return connection, session


@pytest.fixture
def edge(authority) -> Edge:
    return Edge(authority.source(GATEWAY))


def test_the_strongest_that_both_ends_know_is_agreed_on(edge):
    connection, session = joined(edge)
    assert session.established
    assert connection.get_protocol_version_name() == "TLSv1.3"
    assert connection.get_group_name() == "X25519MLKEM768"
    assert connection.get_alpn_proto_negotiated() == b"http/1.1"
    assert session.chain == ()


def test_bytes_arrive_whole_both_ways_and_the_end_is_told(edge):
    connection, session = joined(edge)
    connection.send(b"ask")
    session.receive(connection.bio_read(65536))
    assert session.read(100) == b"ask"
    assert session.read(100) is None
    answer = bytes(300_000)
    connection.bio_write(session.write(answer[:150_000]))
    connection.bio_write(session.write(answer[150_000:]))
    connection.bio_write(session.close())
    found = b""
    with contextlib.suppress(SSL.ZeroReturnError):
        while piece := connection.recv(65536):
            found += piece
    assert found == answer


def test_the_whole_chain_is_had_leaf_first(edge, authority):
    svid = authority.intermediate().forge(CLI)
    _, session = joined(edge, svid)
    assert session.chain == svid.chain_der
    assert edge.peer(session.chain).id == CLI


def test_a_chain_that_does_not_hold_is_established_and_then_refused(edge, authority):
    stranger = type(authority)("dev.ztserve.internal").issue(CLI)
    _, session = joined(edge, stranger)
    assert session.established
    with pytest.raises(Unauthenticated):
        edge.peer(session.chain)


def test_tls_1_2_is_refused_by_name(edge):
    with pytest.raises(HandshakeRefused, match="unsupported protocol"):
        joined(edge, highest=SSL.TLS1_2_VERSION)


def test_noise_is_refused_by_name(edge):
    with pytest.raises(HandshakeRefused, match="http request"):
        edge.session().receive(b"GET / HTTP/1.1\r\n\r\n")
