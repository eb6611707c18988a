"""Attacks on who pushes models: by the registry, and by what the layout holds."""

import json
import time

import pytest

from tests.unit.artifacts.servers import LayoutServer, answer, serving
from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts import Access, RegistryUrl, verify_model
from ztserve.artifacts.publish import push
from ztserve.errors import ConfigError, RegistryError, VerificationError

pytestmark = pytest.mark.slow


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


class Taker(LayoutServer):
    """A registry that takes whatever is pushed, and keeps nothing of it."""

    def __init__(self, root):
        super().__init__(root)
        self.place = "/v2/up"
        self.respond = self.take

    def take(self, target, headers):
        verb = self.requests[-1][0]
        if verb in {"GET", "HEAD"}:
            return answer(status=404) if verb == "GET" else self._absent()
        if verb == "POST":
            return answer(status=202, Location=self.place)
        return answer(status=201)

    @staticmethod
    def _absent():
        return b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
def taker(workshop):
    workshop.published()
    with serving(Taker(workshop.registry)) as taker:
        yield taker


def pushed(workshop, server, access=None, **more):
    url = RegistryUrl.parse(server.url)
    return push(workshop.registry, "digits:1", url, access or Access(), **more)


def test_files_are_not_uploaded_to_another_host(workshop, taker):
    pushed(workshop, taker)
    assert [verb for verb, _, _ in taker.requests].count("POST") == 4
    with serving(Taker(workshop.registry)) as thief:
        taker.place = f"http://{thief.authority}/v2/up"
        with pytest.raises(RegistryError, match="the upload at another host, 127"):
            pushed(workshop, taker, Access(token="may-push"))
        assert thief.requests == []
        taker.place = "file:///v2"
        with pytest.raises(RegistryError, match="wants the upload at 'file:///v2'"):
            pushed(workshop, taker)


def test_a_registry_that_does_not_answer_what_is_due_is_told_of(workshop, taker):
    taker.respond = lambda *_: answer(b"no room", status=507)
    with pytest.raises(RegistryError, match=r"answers 507 to GET .*expected 200: no r"):
        pushed(workshop, taker)
    taker.respond = lambda target, headers: (
        answer(b"\x1b[2J", status=500)
        if taker.requests[-1][0] == "PUT"
        else taker.take(target, headers)
    )
    with pytest.raises(RegistryError, match="answers 500 to PUT /v2/up"):
        pushed(workshop, taker)


def test_an_endless_answer_to_a_push_is_cut_off(workshop, taker):
    taker.respond = lambda *_: answer(b" " * (8 << 20), status=200)
    with pytest.raises(
        RegistryError, match=r"none of a model's: .* more than the limit"
    ):
        pushed(workshop, taker)


def test_a_registry_that_stalls_a_push_is_cut_off(workshop, taker, monkeypatch):
    monkeypatch.setattr("ztserve.artifacts.publish.distribution.STALL_S", 0.2)
    released = []
    taker.respond = lambda *_: released.append(1) or b""  # nothing, ever
    with pytest.raises(RegistryError, match=r"GET /v2/models/digits/.*1: timed out"):
        pushed(workshop, taker)
    assert released == [1]


@pytest.mark.parametrize("part", ["head", "body"])
@pytest.mark.parametrize("control", ["on", "off"])
def test_a_registry_that_drips_its_answer_to_a_push_is_cut_off(
    workshop, taker, monkeypatch, control, part
):
    """A byte in time, for ever: each wait is short, all of them have no end."""
    monkeypatch.setattr(
        "ztserve.artifacts.publish.distribution.TAKES_S", 0.3 if control == "on" else 9
    )

    def drip(*_):
        yield b"HTTP/1.1 507 X\r\n" + (b"" if part == "head" else b"\r\n")
        for _ in range(10):
            time.sleep(0.1)
            yield b"a"

    taker.respond = drip
    begun = time.monotonic()
    with pytest.raises(RegistryError) as caught:
        pushed(workshop, taker)
    spent = time.monotonic() - begun
    assert ("no whole answer within 0.3 s" in str(caught.value)) == (control == "on")
    assert (spent < 0.9) == (control == "on")


def test_an_answer_to_a_push_that_breaks_off_is_not_taken(workshop, taker):
    taker.respond = lambda *_: iter([answer(b"{}", length=100)])
    with pytest.raises(RegistryError, match=r"IncompleteRead\(2 bytes read, 98 more"):
        pushed(workshop, taker)


def test_an_image_that_is_not_what_the_index_says_is_not_pushed(workshop, taker):
    index = json.loads((workshop.registry / "index.json").read_bytes())
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    path = workshop.registry / "blobs/sha256" / digest
    path.chmod(0o600)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(RegistryError, match="is not what its name says"):
        pushed(workshop, taker)
    assert taker.requests == []


def test_a_pinned_push_of_another_model_is_refused(workshop, taker):
    url = RegistryUrl.parse(taker.url)
    with pytest.raises(VerificationError, match="not to its pinned digest"):
        push(workshop.registry, "digits:1@sha256:" + "0" * 64, url, Access())


@pytest.mark.parametrize("alias", ["UPPER", "a b", "1:2", "../x"])
def test_an_alias_that_is_none_is_refused_before_anything_is_sent(
    workshop, taker, alias
):
    with pytest.raises(ConfigError, match="model reference"):
        pushed(workshop, taker, aliases=[alias])
    assert taker.requests == []


def test_what_is_pushed_is_checked_by_who_reads_it(workshop, taker):
    # A pusher sends whatever lies under a digest: the registry and the loader check.
    image = json.loads(taker.blob(taker.image("digits", "1")))
    digest = image["layers"][1]["digest"].removeprefix("sha256:")
    weights = workshop.registry / "blobs/sha256" / digest
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(content)
    assert pushed(workshop, taker).version == "1"
    honest = LayoutServer(workshop.registry)
    with serving(honest), pytest.raises(VerificationError, match="changed after sign"):
        verify_model(honest.url, "digits:1", workshop.trust)
