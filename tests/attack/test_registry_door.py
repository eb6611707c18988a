"""Attacks on the registry door, and by one: refused, and at work without a control."""

import hashlib
import json
import random
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from tests.unit.artifacts.servers import LayoutServer, ranged
from tests.unit.artifacts.servers import serving as held
from tests.unit.artifacts.workshop import Workshop
from tests.unit.doors.support import (
    DIGITS,
    DOMAIN,
    DOOR,
    POLICY,
    STRANGER,
    opened,
    policies,
    published,
    serving,
)
from ztserve import audit, config
from ztserve.artifacts import Resolved, open_registry, verify_model
from ztserve.artifacts.loading import loader
from ztserve.artifacts.publish import sign_model
from ztserve.artifacts.registry import distribution, layout
from ztserve.authorization import Decision, PolicySet
from ztserve.doors import (
    DoorAddress,
    DoorRegistry,
    RegistryDoor,
    reading,
    registry_methods,
    wire,
)
from ztserve.doors import registry as door_room
from ztserve.doors.v1 import registry_pb2 as pb
from ztserve.errors import (
    ArtifactError,
    CallError,
    Denied,
    InferenceError,
    InvalidInput,
    NotFound,
    Overloaded,
    RegistryError,
    Unavailable,
    VerificationError,
    ZTServeError,
)
from ztserve.identity.quarantine import file as quarantine_file
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Client, Limits
from ztserve.types import ModelRef

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"
FREE = "spiffe://dev.ztserve.internal/ns/ml-inference/sa/free"


@pytest.fixture
def two(tmp_path):
    """A door to digits:1 and secret:1; one principal may read the first alone."""
    workshop = Workshop(tmp_path)
    workshop.published("one", "digits", version="1", fill=1.0)
    workshop.published("two", "secret", version="1", fill=7.0)
    with opened(open_registry(workshop.registry), tmp_path) as door:
        yield workshop, door


@contextmanager
def asking(door, who=DIGITS):
    """Ask the door anything, as a client that follows no rules."""
    source = door.authority.source(who)
    with Client(door.address.target, source=source, server_id=DOOR) as client:

        def ask(verb, request, name="digits", path=None):
            return client.call(
                path or wire.SERVICE + verb,
                request.SerializeToString(),
                metadata=((wire.HEADER, name),),
                timeout_s=5,
            )

        yield ask


def about(workshop, verb, name, file=WEIGHTS, offset=0, length=64):
    """Return the request of `verb` for a model of the workshop's registry."""
    if verb == "Resolve":
        return pb.ResolveRequest(reference=name)
    found = open_registry(workshop.registry).resolve(ModelRef(name))
    model = wire.model_message(found)
    if verb == "Read":
        return pb.ReadRequest(model=model, name=file, offset=offset, length=length)
    return pb.ModelRequest(model=model)


# --- who may read what ----------------------------------------------------------------


@pytest.mark.parametrize("verb", wire.VERBS)
def test_a_principal_without_a_right_to_the_model_reads_nothing_of_it(
    two, monkeypatch, verb
):
    workshop, door = two
    for who, name in ((STRANGER, "digits"), (DIGITS, "secret")):
        with asking(door, who) as ask:
            with pytest.raises(Denied, match="this identity may not do this"):
                ask(verb, about(workshop, verb, name), name)
            assert door.records()[-1]["status_code"] == "Denied"
    allow = Decision(allowed=True, rule="none", action="ALLOW")
    monkeypatch.setattr(PolicySet, "authorize", lambda *_: allow)
    with asking(door, STRANGER) as ask:
        assert ask(verb, about(workshop, verb, "secret"), "secret") is not None


@pytest.mark.parametrize("verb", wire.VERBS)
def test_a_right_to_one_model_is_none_to_another_in_the_message(two, monkeypatch, verb):
    workshop, door = two
    with asking(door) as ask:
        with pytest.raises(InvalidInput, match=r"names the model 'secret', and the"):
            ask(verb, about(workshop, verb, "secret"), "digits")
        refused = door.records()[-1]
        assert (refused["status"], refused["unmapped"]["bytes_out"]) == ("refused", 0)
        monkeypatch.setattr(door_room, "check_named", lambda *_: None)
        monkeypatch.setattr(door_room, "check_same", lambda *_: None)
        assert ask(verb, about(workshop, verb, "secret"), "digits") is not None


def test_a_directory_does_not_answer_to_a_name_that_is_not_its_own(
    tmp_path, monkeypatch
):
    workshop = Workshop(tmp_path)
    root = workshop.signed("secret", name="secret", fill=7.0)
    with opened(open_registry(root), tmp_path) as door, door.registry() as replica:
        with pytest.raises(VerificationError, match="there is no digits here, rel"):
            replica.resolve(ModelRef("digits"))
        digest = open_registry(root).resolve(ModelRef("secret")).digest
        renamed = Resolved("digits", "1", digest)
        with pytest.raises(VerificationError, match="there is no digits:1@sha256"):
            replica.files(renamed)
        monkeypatch.setattr(door_room, "check_same", lambda *_: None)
        reader = replica.open(renamed, WEIGHTS)
        assert reader.read_into(memoryview(bytearray(64)), 0) == 64


def test_a_directory_that_was_not_released_has_no_name_at_all(tmp_path, monkeypatch):
    workshop = Workshop(tmp_path)
    root = workshop.model("secret")
    sign_model(root, workshop.keys["trainer"])
    with opened(open_registry(root), tmp_path) as door, door.registry() as replica:
        with pytest.raises(VerificationError, match="released under this name"):
            replica.resolve(ModelRef("digits"))
        monkeypatch.setattr(door_room, "check_same", lambda *_: None)
        assert replica.files(replica.resolve(ModelRef("digits")))


def test_what_the_registry_does_not_have_any_more_is_not_read_on(two, monkeypatch):
    workshop, door = two
    with asking(door) as ask:
        request = about(workshop, "Read", "digits")
        assert ask("Read", request)
        (workshop.registry / "index.json").unlink()
        assert ask("Read", request)  # within the time that it is remembered
        now = time.monotonic()
        monkeypatch.setattr(
            door_room.time, "monotonic", lambda: now + 2 * door_room.KNOWN_S
        )
        with pytest.raises(CallError, match="is away, or has no such digits"):
            ask("Read", request)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "not checked"])
def test_an_image_that_claims_to_be_another_model_does_not_take_its_place(
    tmp_path, monkeypatch, checked
):
    """By who may write to its own repository, and read it through the door."""
    workshop = Workshop(tmp_path)
    content = {"a.txt": b"good"}
    model = workshop.published("one", "digits", version="1", files=content)
    server = LayoutServer(workshop.registry)
    entry = server.image("digits", "1")
    image = json.loads(server.blob(entry))
    for layer in image["layers"]:
        if layer["annotations"][layout.TITLE] == "a.txt":
            layer["digest"] = server.put(b"evil")
    claim = json.dumps(image).encode()

    def respond(target, headers):
        return (
            ranged(claim, headers)
            if target.startswith("/v2/models/evil/manifests")
            else server.honest(target, headers)
        )

    server.respond = respond
    rights = {"digits": ["/v1/registry/digits"], "free": ["/v1/registry/evil"]}
    if not checked:
        monkeypatch.setattr(distribution, "check_answered", lambda *_: None)
    with (
        held(server),
        opened(open_registry(server.url), tmp_path, rights) as door,
        asking(door, FREE) as attacker,
        door.registry() as replica,
    ):
        replica.files(model)
        with pytest.raises(NotFound):
            attacker("Resolve", pb.ResolveRequest(reference="evil"), "evil")
        found = memoryview(bytearray(4))
        replica.open(model, "a.txt").read_into(found, 0)
        assert found == (b"good" if checked else b"evil")
        if checked:
            assert verify_model(replica, "digits:1", workshop.trust)
        refused = [r for r in door.records() if r["status"] == "refused"][-1]
        assert "digits:1" in refused["status_detail"]


def test_an_access_that_cannot_be_recorded_is_not_answered(two, monkeypatch):
    workshop, door = two
    with asking(door) as ask:
        request = about(workshop, "Signature", "digits")
        monkeypatch.setattr(audit.Log, "_write", _full)
        with pytest.raises(InferenceError, match="internal error"):
            ask("Signature", request)
        monkeypatch.setattr(audit.Log, "_write", lambda *_: None)
        assert ask("Signature", request)


def _full(*_):
    from ztserve.errors import AuditError

    raise AuditError("the disk is full")


@pytest.mark.parametrize("followed", [True, False], ids=["followed", "no list"])
def test_a_principal_in_quarantine_reads_nothing(tmp_path, followed):
    workshop = Workshop(tmp_path)
    workshop.published("one", version="1")
    policy = tmp_path / "policy.yaml"
    paths = '["/v1/registry/digits"]'
    policy.write_text(POLICY.format(name="p", who="digits", paths=paths))
    toml = tmp_path / config.FILE
    toml.write_text('authorization.policies = ["policy.yaml"]')
    for file in (policy, toml):
        file.chmod(0o600)
    settings = config.load(toml)
    shut = settings.identity.quarantine
    shut.parent.mkdir(mode=0o700)
    quarantine_file.add(shut, DIGITS, reason="t", by="me", on_event=lambda *_: None)
    authority = ThrowAwayAuthority(DOMAIN)
    source = authority.source(settings.registry_id)
    with (
        config.open_quarantine(settings) as quarantine,
        config.open_log(settings, "registry", "1", source) as log,
    ):
        server = config.registry_door(
            settings,
            open_registry(workshop.registry),
            source=source,
            log=log,
            quarantine=quarantine if followed else None,
        )
        host, port = server.start("127.0.0.1")
        address = DoorAddress(f"{host}:{port}")
        who = authority.source(DIGITS)
        with DoorRegistry(address, source=who, door_id=DOOR) as registry:
            if followed:
                with pytest.raises(
                    RegistryError, match="the server refused this client"
                ):
                    registry.resolve(ModelRef("digits"))
            else:
                assert registry.resolve(ModelRef("digits")).version == "1"
        server.stop(0)


class Slow:
    """A registry whose files take as long as the test says."""

    def __init__(self, registry):
        self._registry = registry
        self.go = threading.Event()

    def __getattr__(self, name):
        return getattr(self._registry, name)

    def open(self, model, name):
        self.go.wait(10)
        return self._registry.open(model, name)


@pytest.mark.parametrize("each", [2, 4], ids=["bounded", "no bound"])
def test_one_principals_reads_leave_room_for_others(tmp_path, each):
    workshop = Workshop(tmp_path)
    workshop.published("one", version="1")
    slow = Slow(open_registry(workshop.registry))
    limits = Limits(max_in_flight=4, max_in_flight_per_principal=each)
    rights = {name: ["/v1/registry/digits"] for name in ("digits", "free")}
    request = about(workshop, "Read", "digits")
    outcomes = []

    def read(ask):
        try:
            outcomes.append(len(ask("Read", request)))
        except CallError as error:
            outcomes.append(type(error))

    with (
        opened(slow, tmp_path, rights, limits=limits) as door,
        asking(door) as hog,
        asking(door, FREE) as other,
    ):
        hogs = [threading.Thread(target=read, args=(hog,)) for _ in range(8)]
        for one in hogs:
            one.start()
        until = time.monotonic() + 5
        while door.server.in_flight < each and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.5)  # those that wait have tried again by now
        try:
            if each == 2:
                assert other("Files", about(workshop, "Files", "digits"))
            else:  # all places are the hog's
                with pytest.raises(Overloaded):
                    other("Files", about(workshop, "Files", "digits"))
        finally:
            slow.go.set()
            for one in hogs:
                one.join()
    assert outcomes.count(Overloaded) == 8 - each


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "parsed anew"])
def test_one_principal_cannot_have_the_index_parsed_again_and_again(
    tmp_path, monkeypatch, kept
):
    """With thousands of models it takes most of a second, and all others wait."""
    parsed = []
    parse = layout.parse_index
    monkeypatch.setattr(layout, "parse_index", lambda *a: parsed.append(1) or parse(*a))
    if not kept:
        monkeypatch.setattr(layout.LayoutRegistry, "_index", parsed_anew)
    with published(tmp_path) as (workshop, door), asking(door) as ask:
        model = about(workshop, "Attestations", "digits")
        parsed.clear()
        for _ in range(10):
            ask("Resolve", about(workshop, "Resolve", "digits"))
            ask("Attestations", model)
            with pytest.raises(CallError, match="has no such digits"):
                ask("Resolve", pb.ResolveRequest(reference="digits:9"))
        assert (len(parsed) == 1) if kept else (len(parsed) >= 30)


def parsed_anew(self):
    raw = layout.read_file(self._root, "index.json", limit=1 << 20)
    return layout.parse_index(raw, "")


# --- what there is to read ------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "sub/../../secret.txt", "model.sig", "", ".", "/etc/hostname"],
)
def test_a_name_that_is_not_listed_is_no_way_out_of_the_model(
    tmp_path, monkeypatch, name
):
    workshop = Workshop(tmp_path)
    root = workshop.signed(files={"sub/a.txt": b"a"})
    (tmp_path / "secret.txt").write_bytes(b"the key to all")
    with opened(open_registry(root), tmp_path) as door, asking(door) as ask:
        found = open_registry(root).resolve(ModelRef("digits"))
        request = pb.ReadRequest(
            model=wire.model_message(found), name=name, offset=0, length=14
        )
        with pytest.raises(NotFound, match="the model has no file"):
            ask("Read", request)
        assert door.records()[-1]["unmapped"]["bytes_out"] == 0
        if name.endswith("secret.txt"):
            monkeypatch.setattr(door_room, "listed_size", lambda *_: 14)
            assert ask("Read", request).endswith(b"the key to all")


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [
        (0, wire.MAX_READ_BYTES + 1, "expected 1 to 4194304 bytes in one read"),
        (0, (1 << 32) - 1, "expected 1 to 4194304 bytes in one read"),
        (0, 0, "length 0"),
        (5 << 20, 2 << 20, r"bytes 5242880 to 7340032 of a file that has 6291456"),
        ((1 << 64) - 1, 1, "of a file that has 6291456"),
    ],
)
def test_a_range_beyond_the_file_or_the_limit_is_refused(
    tmp_path, monkeypatch, offset, length, message
):
    workshop = Workshop(tmp_path)
    content = b"x" * (6 << 20)
    workshop.published("one", files={"table.txt": content})
    registry = open_registry(workshop.registry)
    with opened(registry, tmp_path) as door, asking(door) as ask:

        def read(offset, length):
            request = about(workshop, "Read", "digits", "table.txt", offset, length)
            return ask("Read", request)

        with pytest.raises(InvalidInput, match=message):
            read(offset, length)
        monkeypatch.setattr(door_room, "check_range", lambda *_: None)
        # Without, memory is taken for whatever a caller says.
        assert len(read(0, 6 << 20)) > wire.MAX_READ_BYTES


@pytest.mark.parametrize(
    "path",
    [
        "/ztserve.v1.Registry/Write",
        "/ztserve.v1.Registry/Publish",
        "/ztserve.v1.Registry/Read/../Write",
        "/ztserve.v1.Registry/read",
        "/ztserve.v1.Registry/",
        "/v1/registry/digits",
        "/inference.GRPCInferenceService/ModelInfer",
    ],
)
def test_there_is_no_way_to_write_through_the_door(two, path):
    workshop, door = two

    def tree():
        return {
            str(p): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in workshop.registry.rglob("*")
            if p.is_file()
        }

    before = tree()
    with asking(door) as ask, pytest.raises(NotFound, match="no such method"):
        ask("", about(workshop, "Read", "digits"), path=path)
    assert tree() == before
    verbs = [one.path for one in registry_methods(RegistryDoor(None, None, None))]
    assert verbs == [wire.SERVICE + verb for verb in wire.VERBS]


def bent_bytes(rng, raw):
    """Return a message with a few of its bytes changed, cut off or added."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(4):
            case 0 | 1 if raw:
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            case 2:
                del raw[rng.randrange(len(raw) + 1) :]
            case _:
                raw += rng.randbytes(rng.randint(1, 9))
    return bytes(raw)


class Raw:
    """Bytes that pass for a message."""

    def __init__(self, raw):
        self._raw = raw

    def SerializeToString(self):
        return self._raw


def test_messages_of_any_bytes_find_no_fault_in_the_door(two):
    workshop, door = two
    rng = random.Random(5)
    good = {v: about(workshop, v, "digits").SerializeToString() for v in wire.VERBS}
    outcomes = set()
    with asking(door) as ask:
        for _ in range(200):
            verb, like = rng.choice(wire.VERBS), rng.choice(wire.VERBS)
            try:
                ask(verb, Raw(bent_bytes(rng, good[like])))
            except CallError as error:  # a fault would be an InferenceError
                outcomes.add(type(error))
    assert {InvalidInput} <= outcomes <= {InvalidInput, NotFound, Unavailable}


# --- a hostile door -------------------------------------------------------------------


@contextmanager
def bent(tmp_path, verb, respond, **more):
    """Open a door that answers `verb` with `respond(honest)`, the rest honestly.

    What `respond` returns is the answer; where it is a generator, its messages are.
    """
    workshop = Workshop(tmp_path)
    content = more.pop("files", None)
    workshop.published("one", version="1", fill=1.0, files=content)
    log = audit.Log(tmp_path / "hostile.jsonl", origin={})
    rights = policies({"digits": ["/v1/registry/digits"]})
    honest = registry_methods(
        RegistryDoor(open_registry(workshop.registry), rights, log)
    )
    path = wire.SERVICE + verb
    method = next(one for one in honest if one.path == path)

    def answer(call, read):
        return respond(lambda: method.answer(call, read))

    def stream(exchange):
        yield from respond(lambda: method.answer(exchange.call, exchange.read))

    own = (
        {"stream": stream, "answer": None}
        if more.pop("streams", False)
        else {"answer": answer}
    )
    methods = tuple(replace(one, **own) if one.path == path else one for one in honest)
    with log, serving(methods, **more) as (address, authority, _):
        source = authority.source(DIGITS)
        with DoorRegistry(address, source=source, door_id=DOOR) as registry:
            yield workshop, registry


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(reading, "ANSWER_S", 0.6)
    monkeypatch.setattr(reading, "LEAST_BYTES_S", 1 << 40)


def refused(registry, workshop, message, error=RegistryError, within_s=5.0):
    began = time.monotonic()
    with pytest.raises(error, match=message):
        verify_model(registry, "digits", workshop.trust)
    assert time.monotonic() - began < within_s


def test_other_bytes_than_were_signed_are_refused(tmp_path, monkeypatch):
    def lie(honest):
        good = honest()
        return good[:-4] + b"\0\0\x26\x44"  # 664.0

    with bent(tmp_path, "Read", lie, files={"config.json": b"{}    "}) as (
        workshop,
        registry,
    ):
        refused(registry, workshop, "was changed after signing", VerificationError)
        monkeypatch.setattr(loader, "check_digests", lambda *_: None)
        monkeypatch.setattr(loader, "check_contents", lambda _: {})
        loaded = verify_model(registry, "digits", workshop.trust)
        assert loaded.read("config.json").endswith(b"\0\0\x26\x44")


@pytest.mark.parametrize(
    "change",
    [
        lambda good: good[:-1],
        lambda good: good + b"!",
        lambda _: b"",
        lambda good: b"\x12" + good[1:],
        lambda good: good + good,
    ],
    ids=["a byte less", "a byte more", "nothing", "another field", "twice"],
)
def test_another_count_of_bytes_than_was_asked_for_is_refused(
    tmp_path, monkeypatch, change
):
    with bent(tmp_path, "Read", lambda honest: change(honest())) as (workshop, door):
        refused(door, workshop, r"answers nonsense: .*that are no Content of")
        monkeypatch.setattr(wire, "content", lambda message, _: memoryview(message))
        with pytest.raises(ZTServeError) as caught:  # what came went into the buffers
            verify_model(door, "digits", workshop.trust)
        assert "nonsense" not in str(caught.value)


@pytest.mark.parametrize(
    ("verb", "answer", "message"),
    [
        ("Resolve", b"\xff", "not a valid Model"),
        ("Resolve", b"", "the registry answers nonsense"),
        (
            "Resolve",
            pb.Model(name="secret", version="1", digest="sha256:" + "0" * 64),
            "asked for digits, answers 'secret'",
        ),
        (
            "Resolve",
            pb.Model(name="digits", version="../1", digest="sha256:" + "0" * 64),
            "the registry answers nonsense",
        ),
        ("Signature", b"\xff", "not a valid Statement"),
        ("Attestations", b"\xff", "a list with the tag 255"),
        ("Attestations", b"\x0a\xff", "not a valid AttestationList"),
        (
            "Attestations",
            pb.AttestationList(
                attestations=[pb.Attestation(name=f"a{n}") for n in range(33)]
            ),
            r"attestations of .*: a list of more than 32 entries",
        ),
        (
            "Attestations",
            pb.AttestationList(attestations=[pb.Attestation(name="../a")]),
            r"'\.\./a' cannot be the name of an attestation",
        ),
        (
            "Attestations",
            pb.AttestationList(attestations=[pb.Attestation(name="a")] * 2),
            "with one name",
        ),
        (
            "Attestations",
            pb.AttestationList(
                attestations=[pb.Attestation(name="a", bundle=bytes((1 << 20) + 1))]
            ),
            "of more than 1048576 bytes",
        ),
        (
            "Files",
            pb.FileList(files=[pb.File(name=str(n)) for n in range(10_001)]),
            r"files of .*: a list of more than 10000 entries",
        ),
        ("Files", pb.FileList(files=[pb.File(name="a")] * 2), "two files of"),
        (
            "Files",
            pb.FileList(
                files=[
                    pb.File(name=WEIGHTS, size=(1 << 64) - 1),
                    pb.File(name="config.json", size=2),
                ]
            ),
            "bytes of memory, more than the limit",
        ),
    ],
)
def test_an_answer_that_is_nonsense_is_refused(tmp_path, verb, answer, message):
    raw = answer if isinstance(answer, bytes) else answer.SerializeToString()
    with bent(tmp_path, verb, lambda _: raw) as (workshop, registry):
        refused(registry, workshop, message)


@pytest.mark.parametrize("verb", wire.VERBS)
def test_answers_of_any_bytes_find_no_fault_in_a_replica(tmp_path, verb):
    rng = random.Random(verb)
    with bent(tmp_path, verb, lambda honest: bent_bytes(rng, honest())) as (_, door):
        for _ in range(40):
            # What it raises otherwise is a fault of ours.
            with suppress(ArtifactError):
                found = door.resolve(ModelRef("digits"))
                door.signature(found), door.release(found), door.attestations(found)
                with door.open(found, next(iter(door.files(found)), "")) as reader:
                    if 0 < reader.size <= 1 << 20:
                        reader.read_into(memoryview(bytearray(reader.size)), 0)


@pytest.mark.parametrize(
    ("verb", "size"),
    [
        ("Resolve", 1 << 20),
        ("Signature", 17 << 20),
        ("Files", 5 << 20),
        ("Read", 1 << 20),
    ],
)
def test_an_answer_beyond_its_bounds_is_cut_off(tmp_path, monkeypatch, verb, size):
    with bent(tmp_path, verb, lambda _: bytes(size)) as (workshop, registry):
        refused(registry, workshop, "larger than this client takes")
        monkeypatch.setattr(wire, "MAX_OVERHEAD_BYTES", 1 << 30)
        with pytest.raises(ZTServeError) as caught:  # it came whole
            verify_model(registry, "digits", workshop.trust)
        assert "larger than" not in str(caught.value)


@pytest.mark.parametrize("verb", ["Files", "Attestations"])
def test_a_list_of_millions_of_nothings_takes_no_memory(tmp_path, monkeypatch, verb):
    raw = b"\x0a\x00" * (1 << 20)
    kind = {"Files": pb.FileList, "Attestations": pb.AttestationList}[verb]
    parsed = []

    def parse(one, message):
        parsed.append(one)
        return real(one, message)

    real = wire.parse
    with bent(tmp_path, verb, lambda _: raw) as (workshop, registry):
        monkeypatch.setattr(wire, "parse", parse)
        refused(registry, workshop, "a list of more than")
        assert kind not in parsed
        monkeypatch.setattr(wire, "check_count", lambda *_: None)
        message = "with one name|cannot be the name"
        refused(registry, workshop, message, within_s=30)
        assert kind in parsed


def test_messages_without_end_are_cut_off(tmp_path, impatient):
    sent = []

    def endless(_):
        until = time.monotonic() + 20
        while time.monotonic() < until:
            sent.append(1)
            yield bytes(64 << 10)

    with bent(tmp_path, "Signature", endless, streams=True) as (workshop, registry):
        refused(registry, workshop, "no answer within 0.6 s")
        assert len(sent) << 16 < 4 << 20  # what the windows and the server's queue hold


def test_two_answers_are_not_one(tmp_path):
    def twice(honest):
        yield honest()
        yield b""

    with bent(tmp_path, "Signature", twice, streams=True) as (workshop, registry):
        refused(registry, workshop, "answered 2 messages, not one")


@pytest.mark.parametrize("verb", wire.VERBS)
def test_a_door_that_says_nothing_is_left(tmp_path, impatient, verb):
    silent = threading.Event()

    def silence(_):
        silent.wait(10)
        return b""

    with bent(tmp_path, verb, silence) as (workshop, registry):
        refused(registry, workshop, r"no answer within 0\.[0-9]+ s")
        silent.set()


@pytest.mark.parametrize("error", [Overloaded, ZeroDivisionError])
@pytest.mark.parametrize("verb", ["Resolve", "Read"])
def test_a_door_that_only_ever_refuses_is_left(tmp_path, impatient, verb, error):
    def refuse(_):
        raise error("not now")

    with bent(tmp_path, verb, refuse) as (workshop, registry):
        refused(registry, workshop, "not now|internal error")


class Drip:
    """A wire to a door that lets a few bytes through now and then."""

    def __init__(self, target, after, pause_s):
        self._target, self._after, self._pause_s = target, after, pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = []
        self.address = DoorAddress(f"127.0.0.1:{self._listener.getsockname()[1]}")
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for pump in (
                    threading.Thread(target=self._pump, args=(near, far, 1 << 60)),
                    threading.Thread(target=self._pump, args=(far, near, self._after)),
                ):
                    pump.daemon = True
                    pump.start()

    def _pump(self, source, sink, freely):
        with suppress(OSError):
            while data := source.recv(1500):
                freely -= len(data)
                if freely <= 0:
                    time.sleep(self._pause_s)
                sink.sendall(data)

    def close(self):
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.mark.parametrize("patience_s", [0.6, 60.0], ids=["bounded", "no bound"])
def test_a_file_that_drips_through_the_door_is_cut_off(
    tmp_path, monkeypatch, patience_s
):
    monkeypatch.setattr(reading, "LEAST_BYTES_S", 1 << 40)
    content = {"table.txt": bytes(60_000)}
    with published(tmp_path) as (workshop, door):
        workshop.published("drip", version="2", files=content)
        drip = Drip(door.address.host_port, 20_000, 0.06)
        source = door.authority.source(DIGITS)
        with DoorRegistry(drip.address, source=source, door_id=DOOR) as registry:
            found = registry.resolve(ModelRef("digits:2"))
            registry.files(found)
            monkeypatch.setattr(reading, "ANSWER_S", patience_s)
            buffer = memoryview(bytearray(60_000))
            began = time.monotonic()
            if patience_s < 1:
                with pytest.raises(RegistryError, match=r"no answer within 0\.\d+ s"):
                    registry.open(found, "table.txt").read_into(buffer, 0)
                assert time.monotonic() - began < 2
            else:
                assert registry.open(found, "table.txt").read_into(buffer, 0) == 60_000
                assert time.monotonic() - began > 1
        drip.close()


def test_an_impostor_at_the_doors_address_is_asked_nothing(tmp_path):
    wrong = f"spiffe://{DOMAIN}/ns/ml-inference/sa/digits"
    with published(tmp_path) as (_, door):
        impostor = door.authority.source(wrong)
        asked = []
        from ztserve.transport import Server

        methods = tuple(
            replace(one, answer=lambda call, read: asked.append(call) or b"")
            for one in registry_methods(RegistryDoor(None, None, None))
        )
        server = Server(methods, source=impostor)
        host, port = server.start("127.0.0.1")
        source = door.authority.source(DIGITS)
        address = DoorAddress(f"{host}:{port}")
        with DoorRegistry(address, source=source, door_id=DOOR) as registry:
            with pytest.raises(RegistryError, match="SPIFFE ID"):
                registry.resolve(ModelRef("digits"))
            assert asked == []
        believed = DoorRegistry(address, source=source, door_id=wrong)
        with believed as registry, pytest.raises(RegistryError):
            registry.resolve(ModelRef("digits"))
        assert asked  # by who expects that very ID
        server.stop(0)
