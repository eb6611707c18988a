"""Attacks on the weights broker's memory, descriptors, threads and audit, by its own
user's processes: who asks and leaves, and what a broken file or a full disk adds."""

import resource
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.unit.artifacts.brokers import Node
from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts.loading.shared import borrowing, memory, statement, wire
from ztserve.artifacts.loading.shared import broker as broker_room
from ztserve.artifacts.loading.shared.broker import Broker
from ztserve.artifacts.loading.shared.memory import SealedMemory
from ztserve.artifacts.registry.protocol import open_registry
from ztserve.errors import AuditError, VerificationError
from ztserve.types import ModelRef

pytestmark = pytest.mark.slow


@pytest.fixture
def node(tmp_path):
    with Node(Workshop(tmp_path), tmp_path) as made:
        yield made


def bias(model):
    return dict(model.tensors())["layer.bias"][0].item()


def asked(node, ref):
    """Ask for a model as a replica does; return the connection."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(node.path))
    with suppress(BrokenPipeError):  # it may have been closed already
        wire.send(connection, statement.Request.new(ref).message())
    return connection


def ended(connection):
    """Whether the broker closes the connection and says nothing."""
    connection.settimeout(3)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it had not read what we sent
        return True


def pinned(node, ref="digits:1"):
    return open_registry(node.workshop.registry).resolve(ModelRef(ref)).ref


def memories():
    """How many pieces of memory to share this process has descriptors of."""
    found = 0
    for one in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the listing itself
            found += "ztserve-weights" in str(one.readlink())
    return found


def in_time(fact, seconds=3.0):
    until = time.monotonic() + seconds
    while not fact() and time.monotonic() < until:
        time.sleep(0.01)
    return fact()


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "not closed"])
def test_a_read_that_fails_when_nobody_waits_any_more_keeps_no_memory(
    node, monkeypatch, closed
):
    """Each time it would be a model's memory and a descriptor, beyond max_bytes."""
    node.workshop.published()
    blobs = node.workshop.registry / "blobs/sha256"
    weights = next(p for p in blobs.iterdir() if b"layer.bias" in p.read_bytes()[:200])
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    gate = threading.Event()
    node.before_read = lambda: gate.wait(5)
    monkeypatch.setattr(broker_room, "WAIT_S", 0.05)
    made = node.broker()
    if not closed:
        monkeypatch.setattr(SealedMemory, "close", lambda _: None)
    before = memories()
    asked(node, pinned(node)).close()
    assert in_time(lambda: list(made.holders.values()) == [0])
    gate.set()
    node.wait_for(lambda: any("model" in one for one in node.told("weights-refused")))
    assert in_time(lambda: made.holders == {})  # whatever it counts
    assert memories() - before == (0 if closed else 1)


def ends_at_the_first_fault(self):
    with suppress(OSError):
        while True:
            self._admit(self._listener.accept()[0])


@pytest.mark.parametrize("stays", [True, False], ids=["stays", "ends"])
def test_a_broker_that_ran_out_of_descriptors_takes_replicas_again(
    node, monkeypatch, caplog, stays
):
    node.workshop.published(fill=1.0)
    monkeypatch.setattr(broker_room, "WAIT_S", 0.1)
    monkeypatch.setattr(borrowing, "SILENCE_S", 1.0)
    if not stays:
        monkeypatch.setattr(Broker, "_accept", ends_at_the_first_fault)
    node.broker()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as asking:
        resource.setrlimit(resource.RLIMIT_NOFILE, (asking.fileno(), limits[1]))
        try:
            asking.connect(str(node.path))
            told = in_time(lambda: "takes nobody on now" in caplog.text, 1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert bias(node.verify()) == 1.0
    assert told == stays
    if stays:
        assert node.told("weights-borrowed")
    else:  # deaf for good
        assert "does not answer" in node.told("weights-not-shared")[0]["reason"]


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "no bound"])
def test_who_asks_and_leaves_again_and_again_has_few_models_read(
    node, monkeypatch, bounded
):
    ref = node.workshop.published(fill=1.0).ref
    gate, reads = threading.Event(), []

    def load(ref, memory):
        reads.append(ref)
        gate.wait(10)
        return node.load(ref, memory)

    monkeypatch.setattr(broker_room, "WAIT_S", 0.05)
    monkeypatch.setattr(broker_room, "MAX_MODELS", 3 if bounded else 1 << 30)
    made = node.broker(load=load, grace_s=60.0)
    for number in range(8):
        asked(node, ModelRef(f"digits@sha256:{number:064x}")).close()
        if not (bounded and number >= 3):
            assert in_time(lambda n=number: len(reads) == n + 1)
    try:
        assert in_time(lambda: sum(made.holders.values()) == 0)
        if bounded:
            assert bias(node.verify("digits:1")) == 1.0  # by the replica itself
            (told,) = node.told("weights-not-shared")
            assert "3 models are held or being read" in told["reason"]
        assert len(reads) == (3 if bounded else 8)
    finally:
        gate.set()
    assert in_time(lambda: made.holders == {})
    with asked(node, ref) as connection:
        assert connection.recv(1)  # there is room again


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "not guarded"])
def test_a_full_audit_does_not_keep_memory_for_ever(node, monkeypatch, guarded):
    node.workshop.published(fill=1.0)
    full = threading.Event()

    tidy = Broker._tidy

    def tidies(self):
        with suppress(AuditError):  # pytest would speak of the thread that ends
            tidy(self)

    if not guarded:
        monkeypatch.setattr(Broker, "_tidy", tidies)
        monkeypatch.setattr(Broker, "_note", lambda self, k, **f: self._on_event(k, f))
    made = node.broker(grace_s=0.2)

    def on_event(kind, fields):
        if full.is_set():
            raise AuditError("the disk is full")
        node.tell(kind, fields)

    made._on_event = on_event
    first = node.verify()
    full.set()
    del first
    assert in_time(lambda: made.holders == {})
    full.clear()
    second = node.verify()
    assert bias(second) == 1.0
    del second
    assert in_time(lambda: made.holders == {}, 1.5) == guarded


def test_a_node_without_a_thread_to_spare_has_nobody_wait_for_a_model(
    node, monkeypatch
):
    """RLIMIT_NPROC counts all threads of a user: any process of it uses them up."""
    ref = node.workshop.published(fill=1.0).ref
    made = node.broker()
    start, none_left = threading.Thread.start, ["_read", "_serve"]

    def starting(self):
        target = getattr(getattr(self, "_target", None), "__name__", "")
        if target in none_left:
            none_left.remove(target)
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", starting)
    monkeypatch.setattr(broker_room, "WAIT_S", 0.1)
    for _ in range(2):  # no thread for the replica, then none for its model
        with asked(node, ref) as connection:
            assert ended(connection)
    assert made.holders == {}
    assert bias(node.verify()) == 1.0
    assert node.told("weights-borrowed")


@pytest.mark.parametrize("release", ["5.8.18-generic", "4.18.0-553.el8", "?"])
def test_where_inode_numbers_repeat_no_memory_is_shared(node, monkeypatch, release):
    """There a relay finds memory of its own to put behind the broker's statement."""
    node.workshop.published(fill=1.0)
    made = node.broker()
    monkeypatch.setattr(memory.platform, "release", lambda: release)
    assert bias(node.verify()) == 1.0
    told = node.told("weights-not-shared")[0]["reason"]
    assert f"Linux {release} may give two memories one inode number" in told
    assert made.holders == {}
    monkeypatch.setattr(memory, "check_numbering", lambda _: None)
    assert bias(node.verify()) == 1.0
    assert node.told("weights-borrowed")


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "not checked"])
def test_a_statement_too_long_to_be_read_makes_no_model_refused(
    node, monkeypatch, checked
):
    """10,000 files of long names: each replica would take the broker for a liar."""
    node.workshop.published(fill=1.0)
    node.broker()
    monkeypatch.setattr(statement, "MAX_PAYLOAD_BYTES", 200)
    if checked:
        assert bias(node.verify()) == 1.0
        told = node.told("weights-not-shared")[0]["reason"]
        assert "more than the limit of 200" in told
        return

    def sign(stated, svid, sign=statement.sign):
        with monkeypatch.context() as without:
            without.setattr(statement, "MAX_PAYLOAD_BYTES", 1 << 30)
            return sign(stated, svid)

    monkeypatch.setattr(statement, "sign", sign)
    with pytest.raises(VerificationError, match="more than the limit of 200"):
        node.verify()
