"""Attacks by registry servers: each is refused, and works where its control is off."""

import json
import socket
import ssl
import threading
import time
import urllib.request

import pytest

from tests.unit.artifacts.servers import (
    HttpServer,
    LayoutServer,
    answer,
    certificate,
    ranged,
    serving,
)
from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts import Access, RegistryUrl, open_registry, verify_model
from ztserve.artifacts.loading import judging, loader
from ztserve.artifacts.registry import distribution, http, ranges
from ztserve.artifacts.registry import mlflow as mlflow_registry
from ztserve.artifacts.registry.connection import Connection
from ztserve.artifacts.registry.http import HttpReader
from ztserve.errors import ConfigError, RegistryError, VerificationError
from ztserve.types import ModelRef

pytestmark = pytest.mark.slow

ENDLESS = 64 << 20
"""As endless as a test needs."""


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


@pytest.fixture
def server(workshop):
    workshop.published("one", version="1", fill=1.0)
    with serving(LayoutServer(workshop.registry)) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(http, "ANSWER_S", 0.3)
    monkeypatch.setattr(ranges, "ANSWER_S", 0.3)


def without(monkeypatch, module, name, stand_in=lambda *_, **__: None):
    monkeypatch.setattr(module, name, stand_in)


def refused(server, workshop, message, ref="digits", error=RegistryError):
    with pytest.raises(error, match=message):
        verify_model(server.url, ref, workshop.trust)


def bent(server, part, respond):
    """Answer with `respond` where the target holds `part`, honestly elsewhere."""
    server.respond = lambda target, headers: (
        respond(target, headers) if part in target else server.honest(target, headers)
    )


def weights(server, version="1"):
    """Return the digest of a version's weights."""
    layers = json.loads(server.blob(server.image("digits", version)))["layers"]
    return layers[1]["digest"]


def bias(model):
    return dict(model.tensors())["layer.bias"][0].item()


# --- too much, too slow ------------------------------


def test_an_endless_answer_is_cut_off(server, workshop, monkeypatch):
    piece = b"10000\r\n" + b" " * (1 << 16) + b"\r\n"
    head = b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n"
    sent = []

    def endless(*_):
        yield head
        for _ in range(ENDLESS // (1 << 16)):
            sent.append(1)
            yield piece
        yield b"0\r\n\r\n"

    bent(server, "/manifests/", endless)
    refused(server, workshop, "sends more than the 4194304 bytes allowed")
    assert len(sent) << 16 < ENDLESS
    without(monkeypatch, http, "_whole", lambda body, _: body.response.read())
    reader = HttpReader(RegistryUrl.parse(server.url).origin, Access())
    assert len(reader.read("/v2/models/digits/manifests/1", limit=100)) == ENDLESS


def test_an_endless_file_gives_no_more_than_was_listed(server, workshop):
    digest, sent = weights(server), []

    def endless(_, headers):
        content = server.blob(digest)
        yield b"HTTP/1.1 206 X\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes "
        yield b"0-%d/%d\r\n\r\n" % (len(content) - 1, len(content))
        for _ in range(1000):
            sent.append(1)
            yield b"%x\r\n" % len(content) + content + b"\r\n"
            time.sleep(0.001)

    bent(server, digest, endless)
    assert bias(verify_model(server.url, "digits", workshop.trust)) == 1.0
    assert len(sent) < 1000


def test_an_answer_that_promises_too_much_is_refused_before_it_is_read(
    server, workshop
):
    bent(server, "/manifests/", lambda *_: answer(b"{}", length=1 << 60))
    refused(server, workshop, r"has 1152921504606846976 bytes, more than the 4194304")


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_slow_drip_is_cut_off(server, workshop, impatient, monkeypatch, where):
    def drip(target, headers):
        whole = server.honest(target, headers)
        cut = 12 if where == "head" else len(whole) - 12
        for at in range(cut, cut + 12):
            yield whole[at : at + 1] if at > cut else whole[: cut + 1]
            time.sleep(0.08)  # each wait is short: only their sum is too long
        yield whole[cut + 12 :]

    bent(server, "/manifests/", drip)
    refused(server, workshop, "no whole answer in time")
    without(monkeypatch, Connection, "left", lambda _: 5.0)
    assert verify_model(server.url, "digits", workshop.trust)


def test_a_file_that_drips_is_cut_off(server, workshop, impatient, monkeypatch):
    digest = weights(server)

    def drip(target, headers):
        whole = server.honest(target, headers)
        yield whole[:-12]
        for at in range(12, 0, -1):
            time.sleep(0.08)
            yield whole[len(whole) - at : len(whole) - at + 1]

    bent(server, digest, drip)
    refused(server, workshop, f"{digest}: no whole answer in time")
    without(monkeypatch, Connection, "left", lambda _: 5.0)
    assert bias(verify_model(server.url, "digits", workshop.trust)) == 1.0


def test_silence_is_cut_off(server, workshop, impatient):
    silent = threading.Event()
    bent(server, "/manifests/", lambda *_: silent.wait(10) and None)
    began = time.monotonic()
    refused(server, workshop, "no whole answer in time")
    assert time.monotonic() - began < 2
    silent.set()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"X: y\r\n" * 101, "more than 100 headers"),
        (b"X: " + b"y" * (1 << 17) + b"\r\n", "header line"),
        (b"Content-Encoding: gzip\r\n", "is sent as 'gzip', unasked"),
    ],
    ids=["many lines", "a long line", "compressed"],
)
def test_heads_that_are_out_of_bounds_are_refused(server, workshop, head, message):
    bent(server, "/manifests/", lambda *_: b"HTTP/1.1 200 X\r\n" + head + b"\r\n{}")
    refused(server, workshop, message)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 40,
        b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 999999 X\r\n\r\n",
    ],
    ids=repr,
)
def test_what_is_no_http_is_a_registry_error(server, workshop, raw):
    bent(server, "/manifests/", lambda *_: [raw])
    refused(server, workshop, "manifests/_latest: ")


# --- lies ------------------------------


def test_a_truncated_file_is_refused(server, workshop):
    digest = weights(server)

    def cut(target, headers):
        return [server.honest(target, headers)[:-7]]

    bent(server, digest, cut)
    refused(server, workshop, "breaks off 7 bytes too early")


def test_another_range_than_was_asked_for_is_refused(server, workshop, monkeypatch):
    digest = weights(server)

    def shifted(_, headers):
        content = server.blob(digest)
        moved = content[1:] + b"\0"
        first, last = headers["range"].removeprefix("bytes=").split("-")
        said = f"bytes {int(first) + 1}-{last}/{len(content)}"
        return answer(moved[: int(last) + 1], 206, Content_Range=said)

    bent(server, digest, shifted)
    refused(server, workshop, r"answers range 'bytes 1-\d+/\d+', asked for 0 to")
    without(monkeypatch, ranges, "_check_range", lambda _, __, end, ___: end)
    changed = "'model.safetensors' was changed after signing"
    refused(server, workshop, changed, error=VerificationError)
    without(monkeypatch, loader, "check_digests")
    with pytest.raises(VerificationError, match="header"):  # wrong bytes were loaded
        verify_model(server.url, "digits", workshop.trust)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_file_that_has_another_size_now_is_refused(server, workshop, by):
    digest = weights(server)

    def resized(_, headers):
        content = server.blob(digest)
        said = headers["range"].replace("=", " ") + f"/{len(content) + by}"
        return answer(content, 206, Content_Range=said)

    bent(server, digest, resized)
    refused(server, workshop, r"has \d+ bytes, and was listed with \d+")


def test_more_bytes_than_were_asked_for_are_refused(server, workshop):
    digest = weights(server)
    content = server.blob(digest)
    bent(server, digest, lambda *_: answer(content + b"more"))
    refused(server, workshop, r"sends \d+ bytes where \d+ are due")


def test_a_server_without_ranges_is_told_from_one_that_lies(server, workshop):
    digest = weights(server)
    bent(server, digest, lambda *_: answer(server.blob(digest)))
    assert verify_model(server.url, "digits", workshop.trust)  # from the start: whole
    registry = open_registry(server.url)
    model = registry.resolve(ModelRef("digits"))
    with (
        registry.open(model, "model.safetensors") as reader,
        pytest.raises(RegistryError, match="does not answer ranges"),
    ):
        reader.read_into(memoryview(bytearray(8)), 8)


def test_another_blob_under_the_digest_of_the_weights_is_refused(
    server, workshop, monkeypatch
):
    workshop.published("two", version="2", fill=2.0)
    first, second = weights(server), weights(server, "2")
    bent(server, first, lambda _, headers: ranged(server.blob(second), headers))
    changed = "'model.safetensors' was changed after signing"
    refused(server, workshop, changed, "digits:1", VerificationError)
    without(monkeypatch, loader, "check_digests")
    assert bias(verify_model(server.url, "digits:1", workshop.trust)) == 2.0


def test_another_signature_under_its_digest_is_refused(server, workshop, monkeypatch):
    workshop.published("two", version="2", fill=2.0)

    def signature(version):
        layers = json.loads(server.blob(server.image("digits", version)))["layers"]
        return layers[2]["digest"]

    first, second = signature("1"), signature("2")
    bent(server, first, lambda *_: answer(server.blob(second)))
    refused(server, workshop, f"asked for {first}, and was sent {second}", "digits:1")
    without(monkeypatch, distribution, "_checked", lambda raw, *_: raw)
    refused(server, workshop, "the registry promised", "digits:1", VerificationError)


def test_a_tag_that_flips_between_two_reads_changes_nothing_of_one_model(
    server, workshop, monkeypatch
):
    workshop.published("two", version="2", fill=2.0)
    turns = []

    def flip(*_):
        turns.append(1)
        version = "2" if len(turns) % 2 == 0 else "1"
        return answer(server.blob(server.image("digits", version)))

    bent(server, "/manifests/_production", flip)
    model = verify_model(server.url, "digits@production", workshop.trust)
    assert (model.version, bias(model), len(turns)) == ("1", 1.0, 1)
    # A registry that asked anew at each verb would mix two models, each well signed.
    forgetful = open_registry(server.url)
    asked = ModelRef("digits@production")
    monkeypatch.setattr(
        type(forgetful),
        "_of",
        lambda self, _: self._images[self.resolve(asked)],
    )
    with pytest.raises(VerificationError):
        verify_model(forgetful, "digits@production", workshop.trust)


def test_a_tag_that_flips_between_two_replicas_meets_a_pinned_digest(
    server, workshop, monkeypatch
):
    pinned = open_registry(server.url).resolve(ModelRef("digits@production")).ref
    workshop.published("two", version="2", fill=2.0)
    image = server.image("digits", "2")
    bent(server, "/manifests/_sha256-", lambda *_: answer(server.blob(image)))
    lies = "not to its pinned digest"
    refused(server, workshop, lies, pinned, VerificationError)
    without(monkeypatch, ModelRef, "pinned", lambda self, _: self)
    refused(server, workshop, "signed as version '2'", pinned, VerificationError)
    without(monkeypatch, judging, "check_release")
    assert bias(verify_model(server.url, pinned, workshop.trust)) == 2.0


def test_an_older_release_under_the_newest_name_is_the_trust_policys_to_refuse(
    server, workshop
):
    # What a registry can do at most: answer an unpinned name with an older release.
    workshop.published("two", version="2", fill=2.0)
    image = server.image("digits", "1")
    bent(server, "/manifests/_latest", lambda *_: answer(server.blob(image)))
    assert verify_model(server.url, "digits", workshop.trust).version == "1"
    told = "signed as version '1'"
    bent(server, "/manifests/2", lambda *_: answer(server.blob(image)))
    refused(server, workshop, told, "digits:2", VerificationError)


# --- elsewhere ------------------------------


def redirect(place, status=307):
    return lambda target, _: answer(status=status, Location=place + target)


def test_a_redirect_to_another_host_is_not_followed(server, workshop, monkeypatch):
    digest = weights(server)
    with serving(LayoutServer(workshop.registry)) as other:
        bent(server, digest, redirect(f"http://{other.authority}"))
        refused(server, workshop, f"redirects to {other.authority}, which is not the")
        assert other.requests == []
        allowed = Access(hosts=frozenset({other.authority}))
        assert verify_model(
            open_registry(server.url, allowed), "digits", workshop.trust
        )
        asked = len(other.requests)
        without(monkeypatch, HttpReader, "_check_host")
        assert verify_model(server.url, "digits", workshop.trust)
        assert len(other.requests) > asked > 0


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("http://metadata.example", "plain http leaves this machine"),
        ("file:///etc/passwd?", "names no host|neither https nor http"),
        ("http://user:pass@127.0.0.1", "holds credentials"),
        ("//[::1", "redirects to"),
        ("http://127.0.0.1:99999", "redirects to"),
    ],
)
def test_a_redirect_to_nowhere_good_is_refused(server, workshop, place, message):
    bent(server, "/manifests/", redirect(place))
    refused(server, workshop, message)


def test_no_message_repeats_what_signs_a_redirect(server, workshop):
    with serving(HttpServer(lambda *_: answer(status=403))) as other:
        place = f"http://{other.authority}/x?Signature=secret"
        bent(server, "/manifests/", lambda *_: answer(status=307, Location=place))
        access = Access(hosts=frozenset({other.authority}))
        with pytest.raises(RegistryError, match="/x: answers 403") as caught:
            open_registry(server.url, access).resolve(ModelRef("digits"))
        assert other.requests[0][1] == "/x?Signature=secret"
        refused(server, workshop, "which is not the registry")
    assert "secret" not in str(caught.value)


def test_a_redirect_of_any_length_is_refused(server, workshop):
    bent(server, "/manifests/", redirect("/" * 9000))
    refused(server, workshop, "is longer than 8192 characters")


@pytest.mark.parametrize("addresses", [1, 8])
def test_a_host_of_many_silent_addresses_is_given_one_time(
    impatient, monkeypatch, addresses
):
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    fillers = []
    for _ in range(4):  # until nobody is let in any more
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(full.getsockname())
        fillers.append(one)
    found = socket.getaddrinfo(*full.getsockname(), type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found * addresses)
    url = f"oci+http://127.0.0.1:{full.getsockname()[1]}/models"
    began = time.monotonic()
    with pytest.raises(RegistryError, match="no whole answer in time"):
        open_registry(url).resolve(ModelRef("digits"))
    assert time.monotonic() - began < 1
    began = time.monotonic()
    with pytest.raises(TimeoutError):  # the standard library's way: a time for each
        socket.create_connection(full.getsockname(), 0.3)
    assert time.monotonic() - began > 0.25 * addresses
    for one in (*fillers, full):
        one.close()


def test_redirects_in_a_circle_are_cut_off(server, workshop, monkeypatch):
    bent(server, "/manifests/", redirect(""))
    refused(server, workshop, "answers 307: more than 3 redirects")
    assert len(server.requests) == 4
    monkeypatch.setattr(http, "MAX_REDIRECTS", 30)
    refused(server, workshop, "more than 30 redirects")
    assert len(server.requests) == 4 + 31


def test_credentials_are_not_sent_to_where_a_redirect_leads(server, workshop):
    with serving(LayoutServer(workshop.registry)) as other:
        place = f"http://{other.authority}"
        bent(server, "/manifests/", redirect(place))
        access = Access(token="of-the-registry", hosts=frozenset({other.authority}))
        open_registry(server.url, access).resolve(ModelRef("digits"))
        assert server.requests[0][2]["authorization"] == "Bearer of-the-registry"
        assert "authorization" not in other.requests[0][2]
        # The standard library's own client sends them on.
        stock = urllib.request.Request(
            f"http://{server.authority}/v2/models/digits/manifests/1"
        )
        stock.add_header("Authorization", "Bearer of-the-registry")
        bent(server, "/manifests/", redirect(place, 302))
        urllib.request.urlopen(stock, timeout=5).close()
        assert other.requests[-1][2]["authorization"] == "Bearer of-the-registry"


def challenge(realm):
    said = f'Bearer realm="{realm}",service="models",scope="repository:*:*"'
    return lambda *_: answer(status=401, WWW_Authenticate=said)


def test_a_password_is_not_sent_to_a_realm_elsewhere(server, workshop, monkeypatch):
    access = Access(username="reader", password="secret")
    with serving(HttpServer(lambda *_: answer(b'{"token": "t"}'))) as thief:
        server.respond = challenge(f"http://{thief.authority}/token")
        registry = open_registry(server.url, access)
        with pytest.raises(RegistryError, match="sends us for a token to 127"):
            registry.resolve(ModelRef("digits"))
        assert thief.requests == []
        without(monkeypatch, HttpReader, "_check_host")
        with pytest.raises(RegistryError, match="the credentials do not count"):
            registry.resolve(ModelRef("digits"))
        assert thief.requests[0][2]["authorization"].startswith("Basic ")


def test_no_token_is_asked_for_that_could_write(server, workshop):
    def respond(target, headers):
        if target.startswith("/token"):
            return answer(b'{"token": "for-pulling"}')
        if headers.get("authorization") == "Bearer for-pulling":
            return server.honest(target, headers)
        return challenge(f"http://{server.authority}/token")()

    server.respond = respond
    assert verify_model(server.url, "digits", workshop.trust)
    asked = [t for _, t, _ in server.requests if t.startswith("/token")]
    assert asked == ["/token?service=models&scope=repository%3Amodels%2Fdigits%3Apull"]


# --- who answers ------------------------------


@pytest.mark.parametrize("name", ["127.0.0.1", "127.0.0.2"])
def test_a_server_must_have_a_certificate_for_its_name(workshop, monkeypatch, name):
    workshop.published("one", version="1")
    chain, pem = certificate(workshop.path, name)
    with serving(LayoutServer(workshop.registry, tls=chain)) as server:
        assert server.url.startswith("oci+https://")
        refused(server, workshop, "self-signed certificate")
        registry = open_registry(server.url, Access(roots=pem))
        if name == "127.0.0.1":
            assert verify_model(registry, "digits", workshop.trust)
            return
        with pytest.raises(RegistryError, match="IP address mismatch"):
            registry.resolve(ModelRef("digits"))
        context = ssl._create_unverified_context()
        without(monkeypatch, http, "client_context", lambda _: context)
        assert verify_model(server.url, "digits", workshop.trust)


def test_a_redirect_from_https_to_http_is_refused(workshop):
    workshop.published("one", version="1")
    chain, pem = certificate(workshop.path, "127.0.0.1")
    with (
        serving(LayoutServer(workshop.registry)) as plain,
        serving(LayoutServer(workshop.registry, tls=chain)) as server,
    ):
        bent(server, "/manifests/", redirect(f"http://{plain.authority}"))
        access = Access(roots=pem, hosts=frozenset({plain.authority}))
        with pytest.raises(RegistryError, match="redirects to plain http"):
            open_registry(server.url, access).resolve(ModelRef("digits"))
        assert plain.requests == []


def test_roots_that_are_no_certificates_are_refused():
    url = RegistryUrl.parse("oci+https://registry.example")
    with pytest.raises(ConfigError, match="roots are no certificates"):
        HttpReader(url.origin, Access(roots="none"))


# --- MLflow ------------------------------


class MlflowServer(HttpServer):
    """A tracking server of one model version, over a signed folder; can be bent."""

    def __init__(self, root):
        super().__init__(self.honest)
        self.root, self.url = root, f"mlflow+http://{self.authority}"
        self.uri = "mlflow-artifacts:/1/a/model"

    def honest(self, target, headers):
        base, _, tail = target.partition("/api/2.0/mlflow-artifacts/artifacts")
        if not tail:
            assert "get-download-uri" in base
            return answer(json.dumps({"artifact_uri": self.uri}).encode())
        if tail.startswith("/"):
            name = tail.removeprefix("/1/a/model/").removeprefix("/9/evil/model/")
            return ranged((self.root / name).read_bytes(), headers)
        files = [
            {"path": path.name, "is_dir": False, "file_size": path.stat().st_size}
            for path in self.root.iterdir()
        ]
        return answer(json.dumps({"files": files}).encode())


@pytest.fixture
def mlflow(workshop):
    with serving(MlflowServer(workshop.signed())) as server:
        yield server


def test_mlflow_is_asked_by_get_only(mlflow, workshop):
    assert verify_model(mlflow.url, "digits:1", workshop.trust)
    assert {verb for verb, _, _ in mlflow.requests} == {"GET"}


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "not checked"])
def test_a_folder_that_claims_to_be_another_model_does_not_take_its_place(
    mlflow, monkeypatch, checked
):
    registry = open_registry(mlflow.url)
    digits = registry.resolve(ModelRef("digits:1"))
    before = registry._folders[digits]
    mlflow.uri = "mlflow-artifacts:/9/evil/model"  # where anybody may put a copy
    if not checked:
        monkeypatch.setattr(mlflow_registry, "check_answered", lambda *_: None)
        registry.resolve(ModelRef("evil:1"))
        assert registry._folders[digits].path == "9/evil/model"
        return
    with pytest.raises(VerificationError, match="as evil:1 claims to be digits:1@sha"):
        registry.resolve(ModelRef("evil:1"))
    assert registry._folders[digits] is before


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket/elsewhere", "lies at 's3://bucket/elsewhere': only what the"),
        ("file:///etc", "only what the tracking server hands on"),
        ("mlflow-artifacts://other.example/1/a", "only what the tracking server"),
        ("mlflow-artifacts:/1/../../etc", "is no path of a folder"),
        ("mlflow-artifacts:/", "is no path of a folder"),
    ],
)
def test_artifacts_that_lie_elsewhere_are_not_read(mlflow, workshop, uri, message):
    mlflow.uri = uri
    refused(mlflow, workshop, message, "digits:1")
    assert len(mlflow.requests) == 1


def listing(*files):
    return answer(json.dumps({"files": files}).encode())


def test_folders_without_end_are_cut_off(mlflow, workshop):
    deeper = {"path": "deeper", "is_dir": True}
    bent(mlflow, "artifacts?path=", lambda *_: listing(deeper))
    refused(mlflow, workshop, "more than 256 folders, or they lie deeper", "digits:1")
    assert len(mlflow.requests) < 30
    many = [{"path": f"f{n}", "is_dir": True} for n in range(300)]
    bent(
        mlflow,
        "artifacts?path=",
        lambda target, _: listing(*many) if target.endswith("model") else listing(),
    )
    refused(mlflow, workshop, "more than 256 folders", "digits:1")


@pytest.mark.parametrize("control", ["on", "off"])
def test_folders_that_come_slowly_share_one_time(
    mlflow, workshop, monkeypatch, control
):
    """Each within its time, together three quarters of an hour."""
    if control == "on":
        monkeypatch.setattr(mlflow_registry, "LIST_S", 0.3)
    many = [{"path": f"f{n}", "is_dir": True} for n in range(10)]

    def slow(target, _):
        time.sleep(0.1)
        return listing(*many) if target.endswith("model") else listing()

    bent(mlflow, "artifacts?path=", slow)
    message = "no whole answer in time" if control == "on" else "is not signed"
    error = RegistryError if control == "on" else VerificationError
    refused(mlflow, workshop, message, "digits:1", error)
    asked = [target for _, target, _ in mlflow.requests if "artifacts?path" in target]
    assert len(asked) < 6 if control == "on" else len(asked) == 11


@pytest.mark.parametrize("control", ["on", "off"])
def test_referrers_that_come_slowly_share_one_time(workshop, monkeypatch, control):
    if control == "on":
        monkeypatch.setattr(distribution, "LIST_S", 0.3)
    workshop.published()
    with serving(LayoutServer(workshop.registry)) as server:
        image = server.image("digits", "1")
        for number in range(10):
            server.refer(image, f"attestations/{number}.sig", b"%d" % number)
        slowly = {node["digest"] for node in server.referrers[image]}

        def slow(target, headers):
            time.sleep(0.1 if target.rpartition("/")[2] in slowly else 0)
            return server.honest(target, headers)

        server.respond = slow
        if control == "on":
            refused(server, workshop, "no whole answer in time", "digits:1")
        else:
            assert verify_model(server.url, "digits:1", workshop.trust)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "", "a/b", "x" * 300])
def test_names_that_lead_elsewhere_are_refused(mlflow, workshop, name):
    entry = {"path": name, "is_dir": False, "file_size": 1}
    bent(mlflow, "artifacts?path=", lambda *_: listing(entry))
    refused(mlflow, workshop, "is no name of a file in a folder", "digits:1")


def test_more_files_than_a_model_can_have_are_refused(mlflow, workshop):
    many = [{"path": f"f{n}", "is_dir": False} for n in range(10_001)]
    bent(mlflow, "artifacts?path=", lambda *_: listing(*many))
    refused(mlflow, workshop, "has 10001 entries, the limit is 10000", "digits:1")


def test_a_lying_size_is_refused(mlflow, workshop):
    def lie(target, headers):
        body = mlflow.honest(target, headers).partition(b"\r\n\r\n")[2]
        return answer(body.replace(b'"file_size": ', b'"file_size": 1'))

    bent(mlflow, "artifacts?path=", lie)
    refused(mlflow, workshop, "bytes, and was listed with|answers range", "digits:1")
