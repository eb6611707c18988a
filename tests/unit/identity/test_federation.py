import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    http,
    redirect,
    refusal,
    refusals,
    saved,
    spiffe,
    throw_away,
    told,
    until,
)
from ztserve.errors import ConfigError, IdentityError
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.federation import fetch as bundle_fetch
from ztserve.identity.federation.bundles import BOUNDS_S, INTERVAL_S, Federation
from ztserve.identity.federation.fetch import read_answer
from ztserve.identity.federation.relationship import Relationship

pytestmark = pytest.mark.slow
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def theirs():
    return throw_away()


@pytest.fixture(scope="module")
def web():
    return WebRoot()


def polled(endpoint, times: int = 2) -> None:
    already = endpoint.asked
    until(lambda: endpoint.asked >= already + times)


WEB = {"trust_domain": THEIRS, "profile": "https_web", "url": "https://b.example/x"}


def test_our_own_trust_domain_is_nobody_elses_to_give(tmp_path):
    with pytest.raises(ConfigError, match="that is our own trust domain"):
        Federation([Relationship(**WEB)], trust_domain=THEIRS)


# --- https_spiffe -------------------------------------------------------------------


def test_f4_the_bundle_comes_from_the_endpoint_of_the_configured_id(theirs, tmp_path):
    with (
        Endpoint(theirs) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        assert federation.bundles()[THEIRS] == theirs.trust_bundle()  # bootstrap
        theirs.roll()
        until(lambda: federation.bundles()[THEIRS] == theirs.trust_bundle())
        assert len(federation.bundles()[THEIRS].x509_authorities) == 2
        assert federation.events[0][0] == "bundle-changed"


def test_f4_the_latest_bundle_verifies_the_endpoint(tmp_path):
    theirs = throw_away(overlap_s=0)
    with Endpoint(theirs) as endpoint:
        relationship = spiffe(endpoint, tmp_path, theirs)
        first = theirs.bundle[0]
        with federated(relationship) as federation:
            theirs.roll()
            until(lambda: len(federation.bundles()[THEIRS].x509_authorities) == 2)
            theirs.advance()
            endpoint._svid = always(theirs.issue(DOOR))  # of the new root
            bundle = theirs.trust_bundle()
            only = replace(
                bundle,
                x509_authorities=theirs.bundle[:1],
                sequence=bundle.sequence + 1,
            )
            endpoint.script = lambda _: http(only.jwks())
            until(lambda: federation.bundles()[THEIRS] == only)
            polled(endpoint)
            assert not refusals(federation)
            assert first not in federation.bundles()[THEIRS].x509_authorities
        with federated(relationship) as stranger:  # who has the bootstrap bundle only
            assert "the endpoint: no valid path" in refusal(stranger)


def test_f4_an_endpoint_may_be_of_another_trust_domain(theirs, tmp_path):
    host = throw_away("c.example")
    door = "spiffe://c.example/bundles"
    given = Relationship("c.example", "file", file=saved(tmp_path, host.trust_bundle()))
    with Endpoint(theirs, always(host.issue(door))) as endpoint:
        hosted = Relationship(THEIRS, "https_spiffe", endpoint.url, door)
        with federated(given, hosted) as federation:
            until(lambda: THEIRS in federation.bundles())
            assert accepts(federation, theirs.issue(WORKLOAD))
            given.file.unlink()  # and with its host's bundle gone, none can be fetched
            assert "no trust bundle for c.example" in refusal(federation)
            assert accepts(federation, theirs.issue(WORKLOAD))  # what is held stays


# --- https_web ----------------------------------------------------------------------


def web_relationship(endpoint, host: str = "127.0.0.1") -> Relationship:
    port = endpoint.address[1]
    return Relationship(THEIRS, "https_web", f"https://{host}:{port}/")


@pytest.mark.parametrize(
    ("names", "host"), [(("127.0.0.1",), "127.0.0.1"), (("localhost",), "localhost")]
)
def test_f3_https_web_takes_a_certificate_for_the_host(theirs, web, names, host):
    with WebEndpoint(theirs, web, *names) as endpoint:
        relationship = web_relationship(endpoint, host)
        with federated(relationship, web_roots=web.pem) as federation:
            until(lambda: THEIRS in federation.bundles())
            assert federation.bundles()[THEIRS] == theirs.trust_bundle()


@pytest.mark.parametrize(
    ("names", "common_name", "roots", "message"),
    [
        (("b.example",), "x", "web", "IP address mismatch"),
        ((), "127.0.0.1", "web", "IP address mismatch"),  # a common name proves nothing
        (("127.0.0.1",), "x", "other", "unable to get local issuer certificate"),
        (("127.0.0.1",), "x", None, "unable to get local issuer certificate"),
    ],
)
def test_f3_https_web_refuses_any_other_certificate(
    theirs, web, names, common_name, roots, message
):
    pem = {"web": web.pem, "other": WebRoot().pem, None: None}[roots]
    with (
        WebEndpoint(theirs, web, *names, common_name=common_name) as endpoint,
        federated(web_relationship(endpoint), web_roots=pem) as federation,
    ):
        assert message in refusal(federation)
        assert not federation.bundles()
        assert endpoint.asked == 0  # not a byte of a request left


# --- redirects ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_f5_a_redirect_to_the_same_id_is_followed(theirs, tmp_path, status):
    with Endpoint(theirs, path="/moved") as target, Endpoint(theirs) as endpoint:
        endpoint.script = lambda _: redirect(target.url, status)
        with federated(spiffe(endpoint, tmp_path, theirs)) as federation:
            theirs.roll()
            until(lambda: federation.bundles()[THEIRS] == theirs.trust_bundle())
            polled(endpoint)  # the configured address is asked each time


def test_f5_a_redirect_may_be_relative(theirs, tmp_path):
    def answer(head):
        moved = head.startswith(b"GET /there?x=1 ")
        return http(theirs.trust_bundle().jwks()) if moved else redirect("/there?x=1")

    with (
        Endpoint(theirs, answer=answer) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        theirs.roll()
        until(lambda: federation.bundles()[THEIRS] == theirs.trust_bundle())


def test_f5_redirects_without_end_are_refused(theirs, tmp_path):
    with (
        Endpoint(theirs, answer=lambda _: redirect("/")) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs), bounds_s=(60, 60)) as federation,
    ):
        assert "more than 3 redirects" in refusal(federation)
        assert endpoint.asked == 4


# --- polls that fail ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: http(b"{}", 503), "answers 503, expected 200"),
        (lambda: http(b"no JSON"), "trust bundle of b.example"),
        (lambda: http(b'{"keys": 7}'), "expected an object with an array `keys`"),
        (lambda: http(b'{"keys": []}')[:-4], "IncompleteRead"),
        (lambda: b"SSH-2.0-x\r\n", "not an HTTP answer: BadStatusLine('SSH-2.0-x"),
        (
            lambda: b"HTTP/1.1 200 X\r\nContent-Length: 9" + b"9" * 30 + b"\r\n\r\n",
            "Ove",
        ),
        (lambda: b"", "closed connection without response"),
        (
            lambda: b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "IncompleteRead",
        ),
    ],
)
def test_f8_an_answer_that_is_none_leaves_the_bundle_held(
    theirs, tmp_path, answer, message
):
    with (
        Endpoint(theirs, answer=lambda _: answer()) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        assert message in refusal(federation)
        polled(endpoint, 3)
        assert accepts(federation, theirs.issue(WORKLOAD))
        assert len(refusals(federation)) == 1  # told once for the one cause
        assert message in federation.status()[0]["problem"]
        endpoint.script = None
        theirs.roll()
        until(lambda: federation.bundles()[THEIRS] == theirs.trust_bundle())
        assert federation.status()[0]["problem"] == ""


def test_f8_a_failed_poll_waits_for_the_next_interval(theirs, tmp_path):
    with (
        Endpoint(theirs, answer=lambda _: http(b"", 500)) as endpoint,
        federated(
            spiffe(endpoint, tmp_path, theirs), bounds_s=(0.25, 0.25)
        ) as federation,
    ):
        refusal(federation)
        time.sleep(0.6)
        assert 2 <= endpoint.asked <= 4


def test_f8_an_endpoint_that_is_away_is_asked_again(theirs, tmp_path):
    with Endpoint(theirs) as gone:
        relationship = spiffe(gone, tmp_path, theirs)
    with federated(relationship) as federation:
        assert "Connection refused" in refusal(federation)
        with Endpoint(theirs, port=gone.address[1]):
            theirs.roll()
            until(lambda: federation.bundles()[THEIRS] == theirs.trust_bundle())


@pytest.mark.parametrize(
    ("hint", "pause_s"),
    [(None, INTERVAL_S), (60, 60), (1, BOUNDS_S[0]), (0, INTERVAL_S), (10**9, 3600.0)],
)
def test_b7_a_refresh_hint_counts_within_bounds(theirs, tmp_path, hint, pause_s):
    bundle = replace(theirs.trust_bundle(), refresh_hint_s=hint)
    path = saved(tmp_path, bundle)
    one = Relationship(THEIRS, "https_spiffe", "https://127.0.0.1:1/", DOOR, path)
    with Federation([one], trust_domain=OURS) as federation:
        assert federation._pause_s(federation._links[THEIRS]) == pause_s


def test_b6_a_sequence_never_goes_back(theirs, tmp_path):
    with (
        Endpoint(theirs) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        old = theirs.trust_bundle()
        theirs.roll()
        until(lambda: federation.bundles()[THEIRS] == theirs.trust_bundle())
        endpoint.script = lambda _: http(old.jwks())
        assert "an old bundle was played back" in refusal(federation)
        assert federation.bundles()[THEIRS] == theirs.trust_bundle()


def test_b1_a_bundle_without_keys_ends_all_trust(theirs, tmp_path):
    none = replace(
        theirs.trust_bundle(),
        x509_authorities=(),
        sequence=theirs.trust_bundle().sequence + 1,
    )
    with (
        Endpoint(theirs) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        svid = theirs.issue(WORKLOAD)
        assert accepts(federation, svid)
        endpoint.script = lambda _: http(none.jwks())
        until(lambda: not accepts(federation, svid))


def test_an_answer_in_chunks_is_read(theirs, tmp_path):
    def chunked(_):
        body = theirs.trust_bundle().jwks()
        half = len(body) // 2
        chunks = b"".join(
            b"%x\r\n%b\r\n" % (len(one), one) for one in (body[:half], body[half:], b"")
        )
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks

    with (
        Endpoint(theirs, answer=chunked) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        theirs.roll()
        until(lambda: federation.bundles()[THEIRS] == theirs.trust_bundle())


@settings(deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", HEAD, HEAD + CHUNKED]))
def test_any_bytes_are_an_answer_or_refused(data, before):
    try:
        answer = read_answer(before + data, "x")
    except IdentityError:
        return
    assert len(answer.body) <= len(data)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://a..b/", "label empty"),
        ("https://.b/", "https://.b/"),
        ("https://" + "x" * 99, "label too long"),
        ("https://[::1", "Invalid IPv6 URL"),
    ],
)
def test_f5_a_redirect_to_what_can_be_no_host_is_refused(
    theirs, tmp_path, url, message
):
    with (
        Endpoint(theirs, answer=always(redirect(url))) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        assert message in refusal(federation)
        polled(endpoint)  # and it goes on


def test_f5_a_redirect_on_the_web_needs_a_certificate_for_the_new_host(theirs, web):
    with (
        WebEndpoint(theirs, web, "localhost") as target,
        WebEndpoint(theirs, web, "127.0.0.1") as endpoint,
    ):
        good = target.url.replace("127.0.0.1", "localhost")
        endpoint.script = always(redirect(target.url))
        one = web_relationship(endpoint)
        with federated(one, web_roots=web.pem) as federation:
            assert "IP address mismatch" in refusal(federation)
            endpoint.script = always(redirect(good))
            until(lambda: THEIRS in federation.bundles())


def test_a_federation_that_is_closed_asks_nobody_and_keeps_what_it_has(
    theirs, tmp_path
):
    with Endpoint(theirs) as endpoint:
        with federated(spiffe(endpoint, tmp_path, theirs)) as federation:
            polled(endpoint)
        asked = endpoint.asked
        time.sleep(0.3)
        assert endpoint.asked <= asked + 1
        assert accepts(federation, theirs.issue(WORKLOAD))


def test_a_fetch_is_bounded_in_time_as_a_whole(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_fetch, "FETCH_S", 0.3)
    with (
        Endpoint(theirs, answer=lambda _: time.sleep(1) or b"") as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        assert "no whole answer within 0.3 s" in refusal(federation)


# --- a bundle in a file -------------------------------------------------------------


def test_a_file_is_followed(theirs, tmp_path):
    path = saved(tmp_path, theirs.trust_bundle())
    with federated(Relationship(THEIRS, "file", file=path)) as federation:
        assert accepts(federation, theirs.issue(WORKLOAD))
        changed = told(federation)
        theirs.roll()
        saved(tmp_path, theirs.trust_bundle())
        assert changed.wait(1)
        assert federation.bundles()[THEIRS] == theirs.trust_bundle()
        saved(tmp_path, b"{", THEIRS)
        assert "trust bundle of b.example" in refusal(federation)
        assert federation.bundles()[THEIRS] == theirs.trust_bundle()


def test_a_file_that_is_removed_takes_its_bundle_away_within_a_second(theirs, tmp_path):
    path = saved(tmp_path, theirs.trust_bundle())
    with federated(Relationship(THEIRS, "file", file=path)) as federation:
        changed = told(federation)
        path.unlink()
        assert changed.wait(1)
        assert not federation.bundles()
        assert federation.events[-1] == ("bundle-dropped", {"trust_domain": THEIRS})
        assert federation.status()[0]["problem"] == "the file is gone"
        changed.clear()
        saved(tmp_path, theirs.trust_bundle())
        assert changed.wait(1)
        assert accepts(federation, theirs.issue(WORKLOAD))


@pytest.mark.parametrize("kind", ["absent", "directory", "writable", "large", "link"])
def test_a_file_that_cannot_be_trusted_is_refused_at_the_start(theirs, tmp_path, kind):
    path = saved(tmp_path, theirs.trust_bundle())
    message = {
        "absent": "No such file",
        "directory": "is not a regular file",
        "writable": "others can change it",
        "large": "over 262144 bytes",
        "link": "only those of a Kubernetes volume",
    }[kind]
    if kind == "writable":
        path.chmod(0o620)
    elif kind == "large":
        path.write_bytes(b" " * (256 * 1024 + 1))
    else:
        path.unlink()
    if kind == "directory":
        path.mkdir()
    if kind == "link":
        path.symlink_to(tmp_path / "nothing")
    for one in (
        Relationship(THEIRS, "file", file=path),
        Relationship(THEIRS, "https_spiffe", "https://127.0.0.1:1", DOOR, path),
    ):
        with pytest.raises(IdentityError, match=message):
            Federation([one], trust_domain=OURS)


# --- relationships that come and go -------------------------------------------------


def test_a_relationship_that_is_dropped_takes_its_bundle_at_once(theirs, tmp_path):
    other = throw_away("c.example")
    keep = Relationship("c.example", "file", file=saved(tmp_path, other.trust_bundle()))
    with (
        Endpoint(theirs) as endpoint,
        federated(keep, spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        polled(endpoint)
        changed = told(federation)
        federation.set_relationships([keep])
        assert set(federation.bundles()) == {"c.example"}
        assert changed.is_set()
        assert ("bundle-dropped", {"trust_domain": THEIRS}) in federation.events
        asked = endpoint.asked
        time.sleep(0.3)
        assert endpoint.asked <= asked + 1  # one may have been under way
        assert set(federation.bundles()) == {"c.example"}


def test_a_fetch_under_way_brings_no_dropped_bundle_back(theirs, tmp_path):
    def slow(_):
        time.sleep(0.3)
        return http(theirs.trust_bundle().jwks())

    with (
        Endpoint(theirs, answer=slow) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        until(lambda: endpoint.asked)
        theirs.roll()
        federation.set_relationships([])
        time.sleep(0.5)
        assert not federation.bundles()
        assert federation.events == [("bundle-dropped", {"trust_domain": THEIRS})]


def test_an_unchanged_relationship_keeps_what_it_has(theirs, tmp_path):
    with Endpoint(theirs) as endpoint:
        relationship = spiffe(endpoint, tmp_path, theirs)
        with federated(relationship, bounds_s=(60, 60)) as federation:
            changed = told(federation)
            theirs.roll()
            until(lambda: endpoint.asked)
            until(lambda: changed.is_set() or federation.status()[0]["age_s"])
            held = federation.bundles()[THEIRS]
            federation.set_relationships([replace(relationship)])
            assert federation.bundles()[THEIRS] is held
            # Other parameters: the relationship begins anew, with its bootstrap bundle.
            federation.set_relationships(
                [replace(relationship, url=endpoint.url + "x")]
            )
            boot = TrustBundle.parse(relationship.bootstrap.read_bytes(), THEIRS)
            assert federation.bundles()[THEIRS] == boot


def test_a_change_that_is_refused_changes_nothing(theirs, tmp_path):
    path = saved(tmp_path, theirs.trust_bundle())
    one = Relationship(THEIRS, "file", file=path)
    with federated(one) as federation:
        with pytest.raises(IdentityError, match="No such file"):
            federation.set_relationships(
                [Relationship("c.example", "file", file=tmp_path / "nothing")]
            )
        with pytest.raises(ConfigError, match="our own trust domain"):
            federation.set_relationships([one, replace(one, trust_domain=OURS)])
        with pytest.raises(ConfigError, match="given twice"):
            federation.set_relationships([one, one])
        assert set(federation.bundles()) == {THEIRS}
        saved(tmp_path, replace(theirs.trust_bundle(), refresh_hint_s=77))
        until(lambda: federation.bundles()[THEIRS].refresh_hint_s == 77)


def test_f1_bundles_of_two_trust_domains_are_never_merged(theirs, tmp_path):
    other = throw_away("c.example")
    with federated(
        Relationship(THEIRS, "file", file=saved(tmp_path, theirs.trust_bundle())),
        Relationship("c.example", "file", file=saved(tmp_path, other.trust_bundle())),
    ) as federation:
        assert accepts(federation, theirs.issue(WORKLOAD))
        assert not accepts(federation, other.forge(WORKLOAD))
        for name, bundle in federation.bundles().items():
            assert bundle.trust_domain == name  # F2: each says whose it is


def test_f2_what_is_handed_out_cannot_be_changed(theirs, tmp_path):
    path = saved(tmp_path, theirs.trust_bundle())
    with (
        federated(Relationship(THEIRS, "file", file=path)) as federation,
        pytest.raises(TypeError, match="does not support item assignment"),
    ):
        federation.bundles()[OURS] = federation.bundles()[THEIRS]


def test_a_restart_goes_on_with_the_stored_bundle(theirs, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    with Endpoint(theirs) as endpoint:
        relationship = spiffe(endpoint, tmp_path, theirs)
        old = theirs.trust_bundle()
        theirs.roll()
        with federated(relationship, store=store) as federation:
            until(lambda: federation.bundles()[THEIRS] == theirs.trust_bundle())
            until((store / "b.example.jwks").exists)
    with federated(relationship, store=store) as federation:  # the endpoint is away
        assert federation.bundles()[THEIRS] == theirs.trust_bundle()
        federation.set_relationships([])
        assert not list(store.iterdir())
        federation.set_relationships([relationship])  # all begins again
        assert federation.bundles()[THEIRS] == old


def test_a_listener_that_fails_ends_nothing(theirs, tmp_path):
    def broken(*_):
        raise RuntimeError("a listener of the test's that fails")

    with (
        Endpoint(theirs) as endpoint,
        Federation(
            [spiffe(endpoint, tmp_path, theirs)],
            trust_domain=OURS,
            bounds_s=(0.05, 0.05),
            on_event=broken,
        ) as federation,
    ):
        for _ in range(2):
            theirs.roll()
            until(lambda: federation.bundles()[THEIRS] == theirs.trust_bundle())
            theirs._roots._next = None  # as if it were never begun


def test_the_status_tells_what_an_operator_wants_to_know(theirs, tmp_path):
    with (
        Endpoint(theirs) as endpoint,
        federated(spiffe(endpoint, tmp_path, theirs)) as federation,
    ):
        until(lambda: federation.status()[0]["age_s"] is not None)
        (status,) = federation.status()
        assert status.pop("age_s") < 5
        assert status == {
            "trust_domain": THEIRS,
            "profile": "https_spiffe",
            "sequence": theirs.trust_bundle().sequence,
            "problem": "",
        }
