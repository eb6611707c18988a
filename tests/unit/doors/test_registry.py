import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.artifacts.servers import LayoutServer, serving
from tests.unit.artifacts.workshop import Workshop
from tests.unit.doors.support import DIGITS, DOOR, STRANGER, opened, published
from ztserve.artifacts import Resolved, open_registry, verify_model
from ztserve.artifacts.publish import publish, set_alias, sign_model
from ztserve.artifacts.registry import layout
from ztserve.doors import registry as door_room
from ztserve.doors import wire
from ztserve.doors.v1 import registry_pb2 as pb
from ztserve.errors import (
    Denied,
    InvalidInput,
    NotFound,
    RegistryError,
    Unavailable,
    VerificationError,
)
from ztserve.transport import Client
from ztserve.types import ModelRef

WEIGHTS = "model.safetensors"


@pytest.fixture
def both(tmp_path):
    with published(tmp_path) as made:
        yield made


@pytest.fixture
def door(both):
    return both[1]


@pytest.fixture
def ask(door):
    """Ask one call of the door as any client could, also wrongly."""
    source = door.authority.source(DIGITS)
    with Client(door.address.target, source=source, server_id=DOOR) as client:

        def call(verb, request, *names, path=None):
            message = (
                request if isinstance(request, bytes) else request.SerializeToString()
            )
            return client.call(
                path or wire.SERVICE + verb,
                message,
                metadata=tuple((wire.HEADER, name) for name in names),
                timeout_s=5,
            )

        yield call


@pytest.fixture
def model(both):
    workshop, _ = both
    return open_registry(workshop.registry).resolve(ModelRef("digits"))


def read(model, name=WEIGHTS, offset=0, length=1):
    return pb.ReadRequest(
        model=wire.model_message(model), name=name, offset=offset, length=length
    )


def bias(model):
    return dict(model.tensors())["layer.bias"][0].item()


# --- what it serves -----------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_verified_through_the_door(both):
    workshop, door = both
    with door.registry() as registry:
        loaded = verify_model(registry, "digits", workshop.trust)
    direct = verify_model(workshop.registry, "digits", workshop.trust)
    assert (loaded.digest, loaded.names) == (direct.digest, direct.names)
    assert bias(loaded) == 1.0


def test_the_door_answers_as_the_registry_behind_it(both, model):
    workshop, door = both
    workshop.evaluate(workshop.path / "one", accuracy=0.9)
    publish(workshop.path / "one", workshop.registry, name="digits", version="1")
    set_alias(workshop.registry, name="digits", alias="best", version="1")
    behind = open_registry(workshop.registry)
    with door.registry() as registry:
        for ref in (
            "digits",
            "digits:1",
            "digits@best",
            f"digits:1@{model.digest}",
            f"digits@{model.digest}",
        ):
            assert registry.resolve(ModelRef(ref)) == behind.resolve(ModelRef(ref))
        assert registry.signature(model) == behind.signature(model)
        assert registry.release(model) == behind.release(model)
        assert registry.attestations(model) == behind.attestations(model) != {}
        assert registry.files(model) == behind.files(model)


@pytest.mark.slow
def test_a_signed_directory_can_be_behind_the_door(tmp_path):
    workshop = Workshop(tmp_path)
    root = workshop.signed()
    with opened(open_registry(root), tmp_path) as door, door.registry() as registry:
        assert bias(verify_model(registry, "digits:1", workshop.trust)) == 1.0


def test_each_access_is_recorded(both, model):
    workshop, door = both
    with door.registry() as registry:
        verify_model(registry, "digits", workshop.trust)
    told = [
        (r["api"]["operation"].rpartition("/")[2], r["unmapped"])
        for r in door.records()
    ]
    verbs = ["resolve", "signature", "release", "attestations", "files"]
    assert [verb for verb, _ in told][:5] == verbs
    assert {verb for verb, _ in told[5:]} == {"read"}
    assert all(r["actor"]["user"]["uid"] == DIGITS for r in door.records())
    assert told[0][1]["resource"] == "digits"
    assert {more["model"]["digest"] for _, more in told} == {model.digest}
    size = (workshop.path / "one" / WEIGHTS).stat().st_size
    reads = {more["resource"]: more["bytes_out"] for _, more in told[5:]}
    assert reads[f"{WEIGHTS}[0:+{size}]"] == size + len(wire.content_head(size))


@pytest.mark.parametrize("size", [0, 1, 127, 128, 5000, wire.MAX_READ_BYTES])
def test_content_is_what_protobuf_would_make_of_it(size):
    message = pb.Content(data=b"x" * size).SerializeToString()
    head = wire.content_head(size)
    if size:  # protobuf leaves out a field that is empty
        assert message == head + b"x" * size
        assert bytes(wire.content(message, size)) == b"x" * size
    with pytest.raises(InvalidInput, match="no Content of"):
        wire.content(message + b"!", size)


def test_a_list_is_counted_as_protobuf_counts_it():
    files = [pb.File(name="a" * n, size=n << 20) for n in (1, 100, 200, 20_000)]
    raw = pb.FileList(files=files).SerializeToString()
    wire.check_count(raw, 4)
    with pytest.raises(InvalidInput, match="a list of more than 3 entries"):
        wire.check_count(raw, 3)
    with pytest.raises(InvalidInput, match="a list with the tag 18"):
        wire.check_count(b"\x12\x00", 3)
    wire.check_count(b"", 0)


@pytest.mark.slow
def test_a_newer_model_is_found_at_once(both):
    workshop, door = both
    with door.registry() as registry:
        assert registry.resolve(ModelRef("digits")).version == "1"
        workshop.published("two", version="2", fill=2.0)
        assert registry.resolve(ModelRef("digits")).version == "2"
        assert bias(verify_model(registry, "digits", workshop.trust)) == 2.0


# --- what it refuses ----------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_is_not_there_is_a_registry_error(door):
    with (
        door.registry() as registry,
        pytest.raises(RegistryError, match="is away, or has no such digits"),
    ):
        registry.resolve(ModelRef("digits:9"))
    detail = [r for r in door.records() if r["status"] == "refused"][-1]
    assert "has no digits:9; it has digits:1" in detail["status_detail"]


@pytest.mark.slow
def test_storage_that_fails_is_told_to_the_audit_alone(both, model):
    workshop, door = both
    with door.registry() as registry:
        registry.files(model)
        shutil.rmtree(workshop.registry / "blobs")
        with pytest.raises(RegistryError, match="is away") as caught:
            registry.signature(model)
    assert str(workshop.path) not in str(caught.value)
    refused = [r for r in door.records() if r["status"] == "refused"]
    assert str(workshop.registry) in refused[-1]["status_detail"]


@pytest.mark.slow
def test_what_can_never_be_a_signed_model_is_a_verification_error(tmp_path):
    workshop = Workshop(tmp_path)
    root = workshop.signed()
    with opened(open_registry(root), tmp_path) as door, door.registry() as registry:
        found = registry.resolve(ModelRef("digits"))
        registry.files(found)
        (root / "release.sig").unlink()
        with pytest.raises(VerificationError, match="is not, or not whole"):
            registry.release(found)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "ztserve-model: '' is no bare|model reference ''"),
        (("digits", "other"), "digits,other"),
        (("digits:1",), "no bare model name"),
        (("digits@best",), "no bare model name"),
        (("../digits",), "expected name"),
        (("Digits",), "expected name"),
    ],
)
def test_metadata_that_name_no_one_model_are_refused(ask, door, names, message):
    with pytest.raises(InvalidInput, match=message):
        ask("Resolve", pb.ResolveRequest(reference="digits"), *names)
    assert door.records()[-1]["status_code"] == "InvalidInput"


@pytest.mark.parametrize(
    ("verb", "request_", "message"),
    [
        ("Resolve", b"\xff", "not a valid ResolveRequest"),
        ("Files", b"\xff", "not a valid ModelRequest"),
        ("Read", b"\xff", "not a valid ReadRequest"),
        ("Resolve", pb.ResolveRequest(reference="a b"), "model reference 'a b'"),
        ("Files", pb.ModelRequest(), "no model: name ''"),
        (
            "Files",
            pb.ModelRequest(model=pb.Model(name="digits", version="1")),
            "no model: name 'digits', version '1', digest ''",
        ),
    ],
)
def test_a_message_that_means_nothing_is_refused(ask, verb, request_, message):
    with pytest.raises(InvalidInput, match=message):
        ask(verb, request_, "digits")


@pytest.mark.slow
def test_a_digest_that_is_not_of_this_name_is_not_there(ask, model):
    other = Resolved("digits", "1", "sha256:" + "0" * 64)
    with pytest.raises(Unavailable, match="has no such digits"):
        ask("Files", pb.ModelRequest(model=wire.model_message(other)), "digits")


def test_a_directory_that_has_another_name_is_not_there(tmp_path):
    workshop = Workshop(tmp_path)
    root = workshop.signed(name="other")
    with (
        opened(open_registry(root), tmp_path) as door,
        door.registry() as registry,
        pytest.raises(VerificationError, match="there is no digits here, released"),
    ):
        registry.resolve(ModelRef("digits"))


def test_a_model_that_was_not_released_is_not_there(tmp_path):
    workshop = Workshop(tmp_path)
    root = workshop.model()
    sign_model(root, workshop.keys["trainer"])
    with (
        opened(open_registry(root), tmp_path) as door,
        door.registry() as registry,
        pytest.raises(VerificationError, match="released under this name"),
    ):
        registry.resolve(ModelRef("digits"))


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "length 0: expected 1 to 4194304"),
        (wire.MAX_READ_BYTES + 1, "expected 1 to 4194304"),
    ],
)
def test_a_read_has_a_length(ask, model, length, message):
    with pytest.raises(InvalidInput, match=message):
        ask("Read", read(model, length=length), "digits")


def test_a_request_that_is_too_large_is_refused(ask):
    with pytest.raises(InvalidInput, match=r"the limit is 65536"):
        ask("Resolve", b"x" * 70_000, "digits")


@pytest.mark.slow
def test_attestations_that_no_answer_holds_are_refused(both, model, monkeypatch):
    workshop, door = both
    workshop.evaluate(workshop.path / "one", accuracy=0.9)
    publish(workshop.path / "one", workshop.registry, name="digits", version="1")
    monkeypatch.setattr(wire, "MAX_STATEMENT_BYTES", 100)
    with door.registry() as registry, pytest.raises(RegistryError, match="is away"):
        registry.attestations(model)
    assert "attestations of" in json.dumps(door.records()[-1])


def test_a_stranger_is_denied_with_what_to_mend(door):
    with (
        door.registry(STRANGER) as registry,
        pytest.raises(RegistryError) as caught,
    ):
        registry.resolve(ModelRef("digits"))
    assert isinstance(caught.value.__cause__, Denied)
    mend = f"a policy of the door must let {STRANGER} GET /v1/registry/digits"
    assert str(caught.value).endswith(mend)


def test_a_call_of_another_method_is_not_there(ask):
    with pytest.raises(NotFound, match="no such method"):
        ask("", b"", "digits", path="/ztserve.v1.Registry/Write")


# --- what may be behind it ------------------------------------------------------------


@pytest.mark.slow
def test_an_oci_registry_can_be_behind_the_door(tmp_path):
    workshop = Workshop(tmp_path)
    content = b"0123456789" * 300_000
    workshop.published("one", version="1", files={"table.txt": content})
    with (
        serving(LayoutServer(workshop.registry)) as server,
        opened(open_registry(server.url), tmp_path) as door,
        door.registry() as registry,
    ):
        loaded = verify_model(registry, "digits@production", workshop.trust)
        assert loaded.read("table.txt") == content
        with pytest.raises(RegistryError, match="is away, or has no such digits"):
            registry.resolve(ModelRef("digits:9"))
        server.respond = lambda *_: b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n"
        with pytest.raises(RegistryError, match="is away, or has no such digits"):
            registry.resolve(ModelRef("digits:1"))


@pytest.mark.slow
def test_many_models_are_read_at_once_by_many_callers(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "MAX_REMEMBERED", 2)
    monkeypatch.setattr(door_room, "MAX_KNOWN", 2)
    workshop = Workshop(tmp_path)
    names = [f"m{n}" for n in range(6)]
    for n, name in enumerate(names):
        workshop.published(name, name, version="1", fill=float(n))
    rights = {"digits": ["/v1/registry/*"]}
    with opened(open_registry(workshop.registry), tmp_path, rights) as door:

        def load(n):
            with door.registry() as registry:
                return bias(verify_model(registry, f"m{n % 6}:1", workshop.trust))

        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(load, range(24)))
    assert found == [float(n % 6) for n in range(24)]
