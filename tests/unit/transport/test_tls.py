"""TLS in memory: both ends of ours, and those of others."""

import ssl
import tempfile

import pytest
from OpenSSL import SSL

from tests.unit.transport.records import ALERT, HANDSHAKE, Hand
from ztserve.errors import IdentityError, Unauthenticated, Unavailable
from ztserve.identity import FixedSource, Identity
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import tls

DOMAIN = "td.example"
SERVER = f"spiffe://{DOMAIN}/ns/ml/sa/server"
CLIENT = f"spiffe://{DOMAIN}/ns/ml/sa/client"
SIZES = (1, 16_383, 16_384, 16_385, 70_000, 3)
"""Of what is written at once: one record or several."""


@pytest.fixture(scope="module")
def authority():
    return ThrowAwayAuthority(DOMAIN)


def anybody(_peer):
    pass


def only(spiffe_id):
    def judge(peer):
        if peer.id != spiffe_id:
            raise Unavailable("not the server", f"{peer.id}, expected {spiffe_id}")

    return judge


def connected(server, client):
    """Carry bytes until nothing moves; return what each end raised."""
    raised = {}
    to_server, to_client = client.begin(), b""
    for _ in range(10):
        for end, name, data in (
            (server, "server", to_server),
            (client, "client", to_client),
        ):
            if data and name not in raised:
                try:
                    end.receive(data)
                    if end.established:
                        end.read()
                except tls.HandshakeRefused as error:
                    raised[name] = error.cause
        to_client, to_server = server.outgoing(), client.outgoing()
        if not to_client and not to_server:
            break
    return raised


def ends(authority, spiffe_id, **source):
    return tls.Ends(authority.source(spiffe_id, **source))


def met(authority):
    server = ends(authority, SERVER).accept(anybody)
    client = ends(authority, CLIENT).connect(only(SERVER))
    assert connected(server, client) == {}
    return server, client


def heard(end, wire, at_once):
    """Give what `wire` has to `end`, so many bytes at a time; return what it reads."""
    plain = b""
    for at in range(0, len(wire), at_once):
        end.receive(wire[at : at + at_once])
        plain += end.read() or b""
    return plain


def test_two_ends_know_each_other_before_a_byte_is_sent(authority):
    server = ends(authority, SERVER).accept(anybody)
    client = ends(authority, CLIENT).connect(only(SERVER))
    assert connected(server, client) == {}
    assert (server.peer.id, client.peer.id) == (CLIENT, SERVER)
    server.receive(client.write(b"question" * 10_000))
    assert server.read() == b"question" * 10_000
    client.receive(server.write(b"answer"))
    assert client.read() == b"answer"
    assert client.read() is None
    client.receive(server.close())
    assert client.read() == b""


@pytest.mark.parametrize("at_once", [1, 3, 4, 5, 6, 1000, 16_405, 16_406, 16_407])
def test_what_arrives_in_pieces_is_read_as_soon_as_a_record_is_whole(
    authority, at_once
):
    server, client = met(authority)
    wire = b"".join(client.write(bytes([n]) * size) for n, size in enumerate(SIZES))
    assert heard(server, wire, at_once) == b"".join(
        bytes([n]) * size for n, size in enumerate(SIZES)
    )


def test_a_record_is_read_once_it_is_whole_and_not_before(authority):
    server, client = met(authority)
    first, second = client.write(b"first"), client.write(b"second")
    server.receive(first + second[:-1])
    assert server.read() == b"first"
    assert server.read() is None
    server.receive(second[-1:])
    assert server.read() == b"second"


@pytest.mark.parametrize("junk", [b"\x17\x03\x03\xff\xff", b"\x17\x03\x03\x41\x01"])
def test_a_record_that_would_be_too_long_is_refused_by_its_head(authority, junk):
    server, _client = met(authority)
    server.receive(junk)
    with pytest.raises(tls.HandshakeRefused, match="length too long"):
        server.read()
    assert server.ended


@pytest.mark.parametrize(
    "head", [b"\x99\x03\x03\x40\x00", b"\x17\x02\x00\x40\x00", b"GET / HTTP/1.1\r\n"]
)
def test_what_begins_as_no_record_does_is_refused_by_its_head(authority, head):
    server, _client = met(authority)
    server.receive(head)
    with pytest.raises(tls.HandshakeRefused, match="not TLS"):
        server.read()


def by_hand(authority):
    """A server's end, and a client's whose records are made by hand."""
    server = ends(authority, SERVER).accept(anybody)
    hand = Hand(authority.source(CLIENT))
    assert connected(server, hand.session) == {}
    return server, hand


@pytest.mark.parametrize("at_once", [1, 7, 30, 1000])
def test_updates_of_keys_and_records_without_data_are_followed(authority, at_once):
    server, hand = by_hand(authority)
    wire = b"".join(
        (
            *(hand.update(), hand.record(b"1"), hand.update(asks=True), hand.update()),
            *(hand.record(b""), hand.record(b"2", padding=9), hand.record(b"3")),
            *(hand.record(b"", padding=300), hand.update(asks=True)),
        )
    )
    assert heard(server, wire, at_once) == b"123"
    hand.session.receive(server.write(b"answer"))  # in keys that were asked for
    assert hand.session.read() == b"answer"


@pytest.mark.parametrize("at_once", [27, 64 * 1024])
@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("between", [b"", b"data"])
def test_updates_of_keys_are_bounded(authority, at_once, asks, between):
    server, hand = by_hand(authority)
    wire = b""
    for _ in range(10 * tls.MAX_IDLE):
        wire += hand.update(asks=asks) + (hand.record(between) if between else b"")
    with pytest.raises(tls.HandshakeRefused, match="too many records without data"):
        heard(server, wire, at_once)
    assert server.ended
    assert len(server.outgoing()) < 64 * 1024


def test_an_alert_is_sent_also_after_data_that_was_good(authority):
    server, hand = by_hand(authority)
    server.receive(hand.record(b"good") + hand.record(b"")[:-1] + b"!")
    assert server.read() == b"good"
    assert server.ended
    hand.session.receive(server.close())
    with pytest.raises(tls.HandshakeRefused, match="bad record mac"):
        hand.session.read()


@pytest.mark.parametrize(
    ("kind", "content"), [(HANDSHAKE, b"\x14\0\0\0"), (0, b"x"), (ALERT, b"\1\x5a" * 9)]
)
def test_what_nobody_may_send_after_the_handshake_ends_it(authority, kind, content):
    server, hand = by_hand(authority)
    server.receive(hand.record(content, kind) + hand.record(b"data"))
    with pytest.raises(tls.HandshakeRefused):
        server.read()


def test_an_alert_ends_the_session_after_what_came_before_it(authority):
    server, client = met(authority)
    server.receive(client.write(b"last words") + client.close())
    assert server.read() == b"last words"
    assert server.ended
    assert server.read() == b""


def test_it_is_tls_1_3_with_the_group_that_is_safe_from_quantum_computers(authority):
    server = ends(authority, SERVER).accept(anybody)
    client = ends(authority, CLIENT).connect(anybody)
    connected(server, client)
    for end in (server, client):
        assert end._tls.get_protocol_version_name() == "TLSv1.3"
        assert end._tls.get_group_name() == "X25519MLKEM768"


def test_a_chain_with_an_intermediate_is_judged_whole():
    authority = ThrowAwayAuthority(DOMAIN, intermediate_ttl_s=7200.0)
    server = ends(authority, SERVER).accept(anybody)
    client = ends(authority, CLIENT).connect(only(SERVER))
    assert connected(server, client) == {}
    assert len(server.chain) == len(client.chain) == 2


def test_a_server_turns_a_stranger_away_inside_the_handshake(authority):
    stranger = ThrowAwayAuthority(DOMAIN)
    trusting = stranger.source(CLIENT)
    # It trusts the server; the server does not trust it.
    trusting = FixedSource(Identity(trusting.current().svid, authority.bundles))
    server = ends(authority, SERVER).accept(anybody)
    client = tls.Ends(trusting).connect(anybody)
    raised = connected(server, client)
    assert raised["server"].startswith("certificate not trusted: ")
    assert "alert" in raised["client"]
    assert not server.established


def test_a_client_shows_nothing_to_a_server_that_it_does_not_mean(authority):
    other = f"spiffe://{DOMAIN}/ns/ml/sa/other"
    server = ends(authority, other).accept(anybody)
    client = ends(authority, CLIENT).connect(only(SERVER))
    raised = connected(server, client)
    assert f"{other}, expected {SERVER}" in raised["client"]
    assert not client.established
    assert server.peer is None  # it never saw our certificate
    with pytest.raises(SSL.Error):
        client.write(b"a request")


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_federated_authority_vouches_for_its_own_domain_alone(authority, role):
    """B mints an ID of A's: in both directions, with B's roots among ours."""
    partner = ThrowAwayAuthority("b.example")
    both = authority.bundles | partner.bundles
    name = SERVER if role == "server" else CLIENT
    forged = FixedSource(Identity(partner.forge(name), both))
    other = CLIENT if role == "server" else SERVER
    honest = tls.Ends(FixedSource(Identity(authority.issue(other), both)))
    if role == "server":
        server, client = tls.Ends(forged).accept(anybody), honest.connect(anybody)
    else:
        server, client = honest.accept(anybody), tls.Ends(forged).connect(anybody)
    raised = connected(server, client)
    honest_end = "client" if role == "server" else "server"
    assert raised[honest_end].startswith("certificate not trusted: ")


@pytest.mark.parametrize(
    "flaws",
    [
        {"starts_s": -60, "ends_s": -10},
        {"starts_s": 600},
        {"ca": True},
        {"uris": [CLIENT, SERVER]},
        {"uris": []},
    ],
)
def test_what_identity_refuses_does_not_end_the_handshake(authority, flaws):
    source = authority.forged_source(CLIENT, **flaws)
    server = ends(authority, SERVER).accept(anybody)
    client = tls.Ends(source).connect(anybody)
    raised = connected(server, client)
    assert raised["server"].startswith("certificate not trusted: ")
    assert server.peer is None


def test_whoever_judges_may_refuse_a_verified_peer(authority):
    def quarantined(peer):
        raise Unauthenticated("no", f"{peer.id} is in quarantine")

    server = ends(authority, SERVER).accept(quarantined)
    client = ends(authority, CLIENT).connect(anybody)
    assert "is in quarantine" in connected(server, client)["server"]


def stock_context(authority, *, certificate=True, **how):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.set_alpn_protocols(how.get("alpn", ["h2"]))
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.maximum_version = how.get("most", ssl.TLSVersion.TLSv1_3)
    if certificate:
        svid = authority.issue(CLIENT)
        with tempfile.NamedTemporaryFile() as file:
            file.write(svid.chain_pem() + svid.key_pem())
            file.flush()
            made.load_cert_chain(file.name)
    return made


def stock(context, session=None):
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    return context.wrap_bio(into, out, session=session), into, out


def talk(server, visitor):
    """Carry a handshake with Python's own TLS; return what our end raised."""
    client, into, out = visitor
    for _ in range(10):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            return f"client: {error.reason}"
        data = out.read()
        try:
            if data:
                server.receive(data)
        except tls.HandshakeRefused as refused:
            return refused.cause
        back = server.outgoing()
        into.write(back)
        if not data and not back:
            return ""
    return ""


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ({}, ""),
        ({"most": ssl.TLSVersion.TLSv1_2}, "TLS older than 1.3"),
        ({"alpn": ["http/1.1"]}, "not HTTP/2"),
        ({"alpn": []}, "not HTTP/2"),
        ({"certificate": False}, "no client certificate"),
    ],
)
def test_another_implementation_gets_in_only_as_we_want(authority, how, cause):
    server = ends(authority, SERVER).accept(anybody)
    assert cause in talk(server, stock(stock_context(authority, **how)))
    assert server.established is not bool(cause)


def test_a_session_cannot_be_resumed(authority):
    end, context = ends(authority, SERVER), stock_context(authority)
    first, visitor = end.accept(anybody), stock(context)
    assert talk(first, visitor) == ""
    client, into, _ = visitor
    into.write(first.write(b"x"))
    assert client.read(1) == b"x"  # any ticket has been read by now
    second, again = end.accept(anybody), stock(context, client.session)
    assert talk(second, again) == ""
    assert not again[0].session_reused
    assert second.peer.id == CLIENT


def test_garbage_and_plain_http_are_refused_with_a_cause(authority):
    end = ends(authority, SERVER)
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", bytes(100)):
        server = end.accept(anybody)
        with pytest.raises(tls.HandshakeRefused) as caught:
            server.receive(junk)
        assert caught.value.cause


def test_a_change_of_identity_is_for_new_connections_and_judges_the_old(authority):
    class Source:
        identity = authority.source(SERVER).current()

        def current(self):
            if self.identity is None:
                raise IdentityError("withdrawn")
            return self.identity

        def subscribe(self, _callback):
            return lambda: None

    source = Source()
    end = tls.Ends(source)
    server, client = end.accept(anybody), ends(authority, CLIENT).connect(anybody)
    connected(server, client)
    assert end.judge(server.chain).id == CLIENT
    newer = ThrowAwayAuthority(DOMAIN)
    source.identity = newer.source(SERVER).current()
    with pytest.raises(Unauthenticated):
        end.judge(server.chain)  # its root is gone
    source.identity = None
    with pytest.raises(Unavailable, match="no identity: withdrawn"):
        end.accept(anybody)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (Unauthenticated("no", "the reason"), "certificate not trusted: the reason"),
        (Unavailable("no", "no usable list"), "no usable list"),
    ],
)
def test_a_refusal_of_ours_is_named(authority, error, cause):
    def refused(_peer):
        raise error

    server = ends(authority, SERVER).accept(refused)
    client = ends(authority, CLIENT).connect(anybody)
    assert connected(server, client)["server"] == cause
