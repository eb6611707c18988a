"""Attacks on federation: somebody wants to say who another trust domain's members are.

`EVIL` has an authority of its own and any place on the network; it does not have the
keys of `THEIRS`. Each attack is shown to work where its control is left out.
"""

import base64
import http.client
import http.server
import json
import socket
import ssl
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.identity.federated import (
    DOOR,
    OURS,
    THEIRS,
    WORKLOAD,
    Endpoint,
    WebEndpoint,
    WebRoot,
    accepts,
    always,
    federated,
    redirect,
    refusal,
    saved,
    spiffe,
    throw_away,
    until,
)
from tests.unit.identity.federated import (
    http as answer,
)
from ztserve import types
from ztserve.errors import ConfigError, IdentityError, Unauthenticated
from ztserve.identity import verify_peer
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.federation import bundles as federation
from ztserve.identity.federation import endpoint as bundle_endpoint
from ztserve.identity.federation import fetch as bundle_fetch
from ztserve.identity.federation import relationship as relationship
from ztserve.identity.federation.bundles import Federation
from ztserve.identity.federation.relationship import Relationship

pytestmark = pytest.mark.slow

EVIL = throw_away("evil.example")
OUR_WORKLOAD = "spiffe://a.example/ns/x/sa/y"


@pytest.fixture
def theirs():
    return throw_away()


def forged_bundle(theirs) -> TrustBundle:
    """The attacker's root, given out as that of `THEIRS`."""
    held = theirs.trust_bundle()
    return replace(held, x509_authorities=EVIL.bundle, sequence=held.sequence + 1)


def attacker(theirs, svid, **more) -> Endpoint:
    made = Endpoint(EVIL, always(svid), **more)
    made.script = made.script or always(answer(forged_bundle(theirs).jwks()))
    return made


def believed(federation) -> bool:
    """Whether the attack succeeds: its own SVID passes for one of `THEIRS`."""
    return accepts(federation, EVIL.forge(WORKLOAD))


# --- who is at the endpoint? --------------------------------------------------------


@pytest.mark.parametrize(
    ("thief", "message"),
    [
        # A workload of theirs, stolen or bad: it is not the bundle's door.
        (
            lambda theirs: theirs.issue(WORKLOAD),
            f"endpoint is {WORKLOAD}, expected",
        ),
        (lambda _: EVIL.forge(DOOR), "the endpoint: no valid path"),
        (
            lambda _: EVIL.issue("spiffe://evil.example/x"),
            "no trust bundle for evil",
        ),
        (lambda theirs: theirs.forge(DOOR, ends_s=-1), "the endpoint: "),
        (lambda theirs: theirs.forge(DOOR, extended=["client"]), "lacks serverAuth"),
        (lambda theirs: theirs.forge(DOOR, uris=[DOOR, WORKLOAD]), "2 URI names"),
    ],
    ids=["another id", "foreign authority", "foreign id", "expired", "EKU", "two ids"],
)
def test_f4_an_endpoint_that_is_not_the_configured_one_is_not_asked(
    theirs, tmp_path, monkeypatch, thief, message
):
    with attacker(theirs, thief(theirs)) as endpoint:
        one = spiffe(endpoint, tmp_path, theirs)
        with federated(one) as ours:
            assert message in refusal(ours)
            assert not believed(ours)
            assert endpoint.asked == 0
        monkeypatch.setattr(bundle_fetch, "_check_endpoint", lambda *_: None)
        with federated(one) as naive:
            until(lambda: believed(naive))


def test_f4_a_root_that_was_withdrawn_no_longer_vouches_for_the_endpoint(
    theirs, tmp_path, monkeypatch
):
    stolen = theirs.issue(DOOR)  # by the old root, whose key the attacker has as well
    old = theirs.trust_bundle()
    new = throw_away()
    fresh = replace(new.trust_bundle(), sequence=old.sequence + 1)
    store = tmp_path / "store"
    store.mkdir()
    with Endpoint(theirs, answer=always(answer(fresh.jwks()))) as endpoint:
        one = spiffe(endpoint, tmp_path, theirs, bootstrap=saved(tmp_path, old))
        with federated(one, store=store) as ours:
            until(lambda: ours.bundles()[THEIRS] == fresh)
            endpoint._svid = always(stolen)
            assert "the endpoint: no valid path" in refusal(ours)
        later = replace(forged_bundle(theirs), sequence=fresh.sequence + 1)
        endpoint.script = always(answer(later.jwks()))
        with federated(one, store=store) as restarted:
            refusal(restarted)
            assert not believed(restarted)
        with federated(one) as forgetful:  # without a store the bootstrap counts again
            until(lambda: believed(forgetful))


def test_f3_another_hosts_web_certificate_is_refused(theirs, monkeypatch):
    web = WebRoot()
    forged = always(answer(forged_bundle(theirs).jwks()))
    with WebEndpoint(EVIL, web, "evil.example", answer=forged) as endpoint:
        one = Relationship(THEIRS, "https_web", endpoint.url)
        with federated(one, web_roots=web.pem) as ours:
            assert "IP address mismatch" in refusal(ours)
            assert not believed(ours)
            assert endpoint.asked == 0

        def unnamed(**given):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_verify_locations(**given)
            return context

        monkeypatch.setattr(ssl, "create_default_context", unnamed)
        with federated(one, web_roots=web.pem) as naive:
            until(lambda: believed(naive))


def test_f4_the_webs_authorities_do_not_vouch_for_an_https_spiffe_endpoint(
    theirs, tmp_path
):
    web = WebRoot()
    forged = always(answer(forged_bundle(theirs).jwks()))
    with WebEndpoint(EVIL, web, "127.0.0.1", answer=forged) as endpoint:
        with federated(spiffe(endpoint, tmp_path, theirs), web_roots=web.pem) as ours:
            assert "the endpoint: 0 URI names" in refusal(ours)
            assert not believed(ours)
        # With the other profile, such a certificate is all that is needed.
        web_one = Relationship(THEIRS, "https_web", endpoint.url)
        with federated(web_one, web_roots=web.pem) as naive:
            until(lambda: believed(naive))


# --- where does a redirect lead? ----------------------------------------------------


@contextmanager
def plain_http(body: bytes):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_f5_a_redirect_to_plain_http_is_not_followed(theirs, tmp_path):
    body = forged_bundle(theirs).jwks()
    with plain_http(body) as url, Endpoint(theirs) as endpoint:
        endpoint.script = always(redirect(url))
        with federated(spiffe(endpoint, tmp_path, theirs)) as ours:
            assert "the scheme must be https" in refusal(ours)
            assert not believed(ours)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with urllib.request.urlopen(endpoint.url, context=context) as naive:
            assert naive.read() == body  # as the standard library follows redirects


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://user@127.0.0.1/", "user information is not allowed"),
        ("file:///etc/passwd", "the scheme must be https"),
        ("//", "more than 3 redirects|expected https://host"),
        ("https://127.0.0.1:1/" + "x" * 3000, "printable ASCII"),
    ],
)
def test_f5_a_redirect_obeys_the_rules_of_the_url(theirs, tmp_path, url, message):
    with (
        Endpoint(theirs, answer=always(redirect(url))) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as ours,
    ):
        assert any(one in refusal(ours) for one in message.split("|"))


def test_f5_a_redirect_to_another_id_is_not_followed(theirs, tmp_path, monkeypatch):
    with (
        attacker(theirs, theirs.issue(WORKLOAD)) as evil,
        Endpoint(theirs, answer=always(redirect(evil.url))) as endpoint,
    ):
        one = spiffe(endpoint, tmp_path, theirs)
        with federated(one) as ours:
            assert f"the endpoint is {WORKLOAD}, expected {DOOR}" in refusal(ours)
            assert not believed(ours)
            assert evil.asked == 0
        check, seen = bundle_fetch._check_endpoint, []

        def first_only(*given):
            seen.append(given)
            if len(seen) == 1:
                check(*given)

        monkeypatch.setattr(bundle_fetch, "_check_endpoint", first_only)
        with federated(one) as naive:
            until(lambda: believed(naive))


# --- what is in the bundle? ---------------------------------------------------------


def test_f1_a_trust_domain_cannot_vouch_for_another_by_its_bundle(theirs, tmp_path):
    # It lists a root of its own under the name of the other one, beside the true one.
    posing = throw_away(THEIRS)
    evil = EVIL.trust_bundle()
    evil = replace(evil, x509_authorities=(*EVIL.bundle, *posing.bundle))
    with federated(
        Relationship("evil.example", "file", file=saved(tmp_path, evil)),
        Relationship(THEIRS, "file", file=saved(tmp_path, theirs.trust_bundle())),
    ) as ours:
        for forged in (posing.issue(WORKLOAD), EVIL.forge(WORKLOAD)):
            assert not accepts(ours, forged)
            merged = {
                THEIRS: [
                    root
                    for bundle in ours.bundles().values()
                    for root in bundle.x509_authorities
                ]
            }
            assert verify_peer(forged.chain_der, merged, now=types.now())


def test_f7_a_bundle_is_whose_we_say_and_not_whose_it_says(theirs, tmp_path):
    # The document claims another trust domain in every way that it can.
    document = json.loads(EVIL.trust_bundle().jwks())
    document |= {"trust_domain": THEIRS, "trust_domains": {THEIRS: {**document}}}
    path = saved(tmp_path, json.dumps(document).encode(), "evil.example")
    with federated(Relationship("evil.example", "file", file=path)) as ours:
        assert set(ours.bundles()) == {"evil.example"}
        assert not believed(ours)
        naive = {document["trust_domain"]: EVIL.bundle}
        assert verify_peer(EVIL.forge(WORKLOAD).chain_der, naive, now=types.now())


def test_f7_nobody_gives_us_the_bundle_of_our_own_trust_domain(tmp_path, monkeypatch):
    path = saved(tmp_path, EVIL.trust_bundle(), OURS)
    one = Relationship(OURS, "file", file=path)
    with pytest.raises(ConfigError, match="that is our own trust domain"):
        Federation([one], trust_domain=OURS)
    with Federation([one], trust_domain="somebody.else") as naive:
        assert accepts(naive, EVIL.forge(OUR_WORKLOAD))


def test_b6_an_old_bundle_cannot_be_played_back(tmp_path, monkeypatch):
    theirs = throw_away(overlap_s=0)
    stolen = theirs._roots.current  # the key of a root that they withdraw for that
    old = theirs.trust_bundle()
    theirs.roll()
    theirs.advance()
    last = theirs.trust_bundle()
    new = replace(last, x509_authorities=theirs.bundle[:1], sequence=last.sequence + 1)
    forged = throw_away()
    forged._roots._current.key = stolen
    with Endpoint(theirs, always(theirs.issue(DOOR))) as endpoint:
        endpoint.script = always(answer(new.jwks()))
        one = spiffe(endpoint, tmp_path, theirs)
        with federated(one) as ours:
            until(lambda: ours.bundles()[THEIRS] == new)
            endpoint.script = always(answer(old.jwks()))
            assert "an old bundle was played back" in refusal(ours)
            assert not accepts(ours, forged.issue(WORKLOAD))
            monkeypatch.setattr(federation, "newer", lambda _, fetched: fetched)
            until(lambda: accepts(ours, forged.issue(WORKLOAD)))


def test_b6_no_sequence_any_more_is_no_way_around(theirs, tmp_path, monkeypatch):
    bare = replace(forged_bundle(theirs), sequence=None)
    with (
        Endpoint(theirs, answer=always(answer(bare.jwks()))) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as ours,
    ):
        assert "sequence None after" in refusal(ours)
        assert not believed(ours)
        monkeypatch.setattr(federation, "newer", lambda _, fetched: fetched)
        until(lambda: believed(ours))


def test_x10_a_workloads_certificate_in_a_bundle_is_no_authority(theirs, tmp_path):
    leaf = theirs.issue(WORKLOAD)
    held = json.loads(theirs.trust_bundle().jwks())
    held["spiffe_sequence"] += 1
    held["keys"].append(
        {"kty": "EC", "use": "x509-svid"}
        | {"x5c": [base64.b64encode(leaf.chain_der[0]).decode()]}
    )
    with (
        Endpoint(theirs, answer=always(answer(json.dumps(held).encode()))) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as ours,
    ):
        assert "trust bundle of b.example: X.509 authority 1" in refusal(ours)


# --- how much, and how long? --------------------------------------------------------


def test_an_answer_without_end_is_cut_off(theirs, tmp_path, monkeypatch):
    padded = theirs.trust_bundle().jwks() + b" " * (8 << 20)
    taken = []
    read = bundle_fetch._read
    monkeypatch.setattr(
        bundle_fetch,
        "_read",
        lambda *given: taken.append(read(*given)) or taken[-1],
    )
    with Endpoint(theirs, answer=always(answer(padded))) as endpoint:
        one = spiffe(endpoint, tmp_path, theirs)
        with federated(one) as ours:
            assert "the bundle endpoint sends over 294912 bytes" in refusal(ours)
            assert not taken
        monkeypatch.setattr(bundle_fetch, "MAX_ANSWER_BYTES", 1 << 40)
        with federated(one) as naive:
            refusal(naive)
            assert len(taken[0]) > 8 << 20  # all of it was held in memory


class Dripping(Endpoint):
    """Sends an answer a byte at a time, and never lets it end."""

    def _answer(self, head):
        self.asked += 1
        return self

    def _visit(self, connection, end):
        with self._tls().wrap_socket(connection, server_side=True) as tls:
            tls.recv(4096)
            self.asked += 1
            tls.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                tls.sendall(b" ")
                time.sleep(0.05)


def test_an_answer_that_drips_is_given_up(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_fetch, "FETCH_S", 0.5)
    with Dripping(theirs) as endpoint:
        started = time.monotonic()
        with federated(spiffe(endpoint, tmp_path, theirs)) as ours:
            assert "no whole answer within 0.5 s" in refusal(ours)
            assert time.monotonic() - started < 1.5
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        host, port = endpoint.address
        # A timeout for each read, as the standard library has it, never ends this one.
        naive = http.client.HTTPSConnection(host, port, timeout=0.5, context=context)
        naive.request("GET", "/")
        response, until_ = naive.getresponse(), time.monotonic() + 1.5
        while time.monotonic() < until_:
            assert response.read(1) == b" "
        naive.close()


def test_a_slow_endpoint_holds_up_no_other(theirs, tmp_path):
    other = throw_away("c.example")
    path = saved(tmp_path, other.trust_bundle())
    with (
        Dripping(theirs) as endpoint,
        federated(
            spiffe(endpoint, tmp_path, theirs),
            Relationship("c.example", "file", file=path),
        ) as ours,
    ):
        until(lambda: endpoint.asked)
        other.roll()
        saved(tmp_path, other.trust_bundle())
        fresh = other.trust_bundle()
        assert until(lambda: ours.bundles()["c.example"] == fresh) < 1
        started = time.monotonic()
        ours.set_relationships([])
        assert time.monotonic() - started < 0.1


@pytest.mark.parametrize("control", [True, False])
def test_visitors_who_stay_keep_nobody_out(theirs, monkeypatch, control):
    if not control:
        monkeypatch.setattr(
            Endpoint, "_has_room", lambda self: self._free.acquire(blocking=False)
        )
    with Endpoint(theirs) as endpoint, ExitStack() as crowd:
        one = Relationship(THEIRS, "https_spiffe", endpoint.url, DOOR, Path("unused"))
        for _ in range(40):
            crowd.enter_context(socket.create_connection(endpoint.address))
        time.sleep(0.3)
        if control:
            for _ in range(5):
                bundle_fetch.Fetcher().fetch(one, theirs.bundle)
        else:
            with pytest.raises(IdentityError):
                bundle_fetch.Fetcher().fetch(one, theirs.bundle)


def test_a_visitor_is_sent_away_after_a_while(theirs, monkeypatch):
    monkeypatch.setattr(bundle_endpoint, "MAX_VISIT_S", 0.3)
    with Endpoint(theirs) as endpoint, ExitStack() as crowd:
        for _ in range(20):
            crowd.enter_context(socket.create_connection(endpoint.address))
        until(lambda: endpoint._free._value == 12)
        assert until(lambda: endpoint._free._value == 32) < 2


def test_a_thread_that_cannot_start_costs_one_visit_only(theirs, monkeypatch):
    with Endpoint(theirs) as endpoint:
        one = Relationship(THEIRS, "https_spiffe", endpoint.url, DOOR, Path("unused"))
        start = threading.Thread.start

        def fails(_):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", fails)
        socket.create_connection(endpoint.address).close()
        time.sleep(0.3)
        monkeypatch.setattr(threading.Thread, "start", start)
        bundle_fetch.Fetcher().fetch(one, theirs.bundle)
        until(lambda: endpoint._free._value == 32)


# --- files that are not ours alone --------------------------------------------------


def test_a_bootstrap_bundle_that_others_may_write_is_refused(
    theirs, tmp_path, monkeypatch
):
    path = saved(tmp_path, forged_bundle(theirs))
    path.chmod(0o666)
    one = Relationship(THEIRS, "https_spiffe", "https://127.0.0.1:1/", DOOR, path)
    with pytest.raises(IdentityError, match="others can change it"):
        Federation([one], trust_domain=OURS)
    monkeypatch.setattr(
        relationship, "read_guarded", lambda path, *_, **__: path.read_bytes()
    )
    with federated(one) as naive:
        assert believed(naive)


def test_a_dropped_bundle_vouches_for_nobody(theirs, tmp_path):
    path = saved(tmp_path, theirs.trust_bundle())
    svid = theirs.issue(WORKLOAD)
    with federated(Relationship(THEIRS, "file", file=path)) as ours:
        kept = {name: one.x509_authorities for name, one in ours.bundles().items()}
        ours.set_relationships([])
        assert not accepts(ours, svid)
        # Whoever goes on with what it once fetched still accepts it.
        assert verify_peer(svid.chain_der, kept, now=types.now())
        with pytest.raises(Unauthenticated, match="no trust bundle for b"):
            verify_peer(svid.chain_der, {}, now=types.now())
