"""Attacks on the weights that replicas of a node share: who poses as the broker."""

import fcntl
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from hashlib import sha256

import pytest

from tests.unit.artifacts.brokers import BROKER_ID, DOMAIN, REPLICA_ID, Node
from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts.loading import loader
from ztserve.artifacts.loading.shared import borrowing, memory, statement, wire
from ztserve.artifacts.loading.shared.memory import SealedMemory, layout, memory_id
from ztserve.artifacts.loading.shared.statement import Statement
from ztserve.artifacts.registry.protocol import open_registry
from ztserve.errors import VerificationError
from ztserve.testing import ThrowAwayAuthority
from ztserve.types import ModelRef, Peer, now

WEIGHTS = "model.safetensors"
EVIL = b"\0\0\xc7\x42" * 4  # 99.5


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


@pytest.fixture
def node(workshop, tmp_path):
    with Node(workshop, tmp_path) as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(borrowing, "PROOF_S", 0.0)


@pytest.fixture
def without(monkeypatch):
    """Take controls out: `without(statement, "check_nonce")`."""

    def take_out(module, *names):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, **__: None)

    return take_out


def bias(model):
    return dict(model.tensors())["layer.bias"][0].item()


def refused(node, message, ref="digits:1"):
    with pytest.raises(VerificationError, match=message) as caught:
        node.verify(ref)
    assert str(node.path) in str(caught.value)
    assert not node.told("weights-borrowed")


class Impostor:
    """Sits at the broker's socket; `answer(connection, request)` is all that it does.

    `files` are the signed ones, with the last numbers of the weights set to 99.5.
    """

    def __init__(self, node, answer):
        self.node = node
        self.found = open_registry(node.workshop.registry)
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(node.path))
        self._listener.listen()
        self._kept = ExitStack()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._kept.close()

    def _run(self):
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._kept.enter_context(connection)
                threading.Thread(target=self._serve, args=(connection,)).start()

    def _serve(self, connection):
        deadline = time.monotonic() + 5
        request = wire.receive(connection, limit=4096, deadline=deadline)
        with suppress(OSError):  # they have left
            self._answer(connection, statement.parse_request(request))


def contents(node, ref="digits:1"):
    """The model's signed files."""
    registry = open_registry(node.workshop.registry)
    found = registry.resolve(ModelRef(ref))
    files = {}
    for name, size in registry.files(found).items():
        files[name] = bytearray(size)
        with registry.open(found, name) as reader:
            assert reader.read_into(memoryview(files[name]), 0) == size
    return files


def poisoned(node):
    files = contents(node)
    files[WEIGHTS][-16:] = EVIL  # the bias's bytes come first or last: both are made
    files[WEIGHTS][-80:-64] = EVIL
    return files


def written(descriptor, files):
    """Lay files out in a memory or file as a broker does; return the descriptor."""
    offsets, size = layout({name: len(content) for name, content in files.items()})
    os.ftruncate(descriptor, size)
    for name, content in files.items():
        os.pwrite(descriptor, content, offsets[name])
    return descriptor


def sealed(files):
    descriptor = written(unsealed(), files)
    memory._add_seals(descriptor, memory.SEALS)
    return descriptor


def unsealed():
    return os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def stated(request, descriptor, files, **changes):
    """What an honest broker would state, had it found the signed digests."""
    fields = {
        "nonce": request.nonce,
        "boot": statement.boot_id(),
        "manifest": request.ref.digest,
        "memory": memory_id(descriptor),
        "sizes": {name: len(content) for name, content in files.items()},
        "digests": {n: (sha256(c).hexdigest(),) for n, c in files.items()},
    }
    return Statement(**(fields | changes))


def send(connection, message, descriptor):
    wire.send(connection, message)
    wire.send_descriptor(connection, descriptor)


def impostor(node, svid, *, descriptor=None, claimed=None, **changes):
    """Hand out `descriptor` (poisoned, sealed memory), said to be `claimed`."""
    claimed = claimed or contents(node)
    given = sealed(poisoned(node)) if descriptor is None else descriptor

    def answer(connection, request):
        message = statement.sign(stated(request, given, claimed, **changes), svid)
        send(connection, message, given)

    return Impostor(node, answer)


def real(node):
    return node.authority.issue(BROKER_ID)


# --- who answers ----------------------------------------------------------------


def test_an_impostor_without_an_svid_of_ours_is_refused(node, monkeypatch):
    node.workshop.published()
    stranger = ThrowAwayAuthority(DOMAIN).issue(BROKER_ID)
    with impostor(node, stranger):
        refused(node, "no valid path to the trust domain's roots.*look for what")
        peer = Peer(BROKER_ID, 1, now(), now(), "")
        monkeypatch.setattr(statement, "verify_peer", lambda *_, **__: peer)
        assert bias(node.verify()) == 99.5


def test_a_replica_that_poses_as_the_broker_is_refused(node, without):
    node.workshop.published()
    with impostor(node, node.authority.issue(REPLICA_ID)):
        refused(node, f"{REPLICA_ID} answers, expected {BROKER_ID}")
        without(statement, "check_signer")
        assert bias(node.verify()) == 99.5


def test_the_brokers_certificates_without_its_key_are_refused(node, without):
    node.workshop.published()
    other = node.authority.issue(REPLICA_ID)
    stolen = replace(real(node), key=other.key)
    with impostor(node, stolen):
        refused(node, "its signature does not hold")
        without(statement, "check_signature")
        assert bias(node.verify()) == 99.5


def test_an_expired_broker_is_refused(node, monkeypatch):
    node.workshop.published()
    with impostor(node, node.authority.forge(BROKER_ID, starts_s=-7200, ends_s=-3600)):
        refused(node, "weights broker at")
        peer = Peer(BROKER_ID, 1, now(), now(), "")
        monkeypatch.setattr(statement, "verify_peer", lambda *_, **__: peer)
        assert bias(node.verify()) == 99.5


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_users_process_at_the_socket_is_refused(node, without, monkeypatch):
    node.workshop.published(fill=1.0)
    code = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); os.setuid(65534); "
        "s.bind('weights.sock'); s.listen(); print('up', flush=True); sys.stdin.read()"
    )
    node.path.parent.chmod(0o777)
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=node.path.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"up\n"
        refused(node, "runs as uid 65534, expected 0")
        without(borrowing, "check_user")  # then it is spoken to, and waited for
        monkeypatch.setattr(borrowing, "SILENCE_S", 0.1)
        assert bias(node.verify()) == 1.0
        assert "does not answer" in node.told("weights-not-shared")[0]["reason"]
        other.stdin.close()


# --- what it says ---------------------------------------------------------------


def test_a_replayed_statement_is_refused(node, without):
    node.workshop.published()
    with impostor(node, real(node), nonce="0" * 64):
        refused(node, "another nonce than ours: a replay")
        without(statement, "check_nonce")
        assert bias(node.verify()) == 99.5


def test_a_statement_of_another_node_is_refused(node, without):
    """There the inode number, which anybody can count up to here, is of other bytes."""
    node.workshop.published()
    with impostor(node, real(node), boot="00000000-0000-0000-0000-000000000000"):
        refused(node, "the node with boot ID '00000000.*not of this one")
        without(statement, "check_node")
        assert bias(node.verify()) == 99.5


def test_another_models_statement_is_refused(node, without):
    node.workshop.published()
    other = node.workshop.published("letters", "letters", fill=99.5)
    files = contents(node, "letters:1")
    given = sealed(files)
    with impostor(
        node, real(node), descriptor=given, claimed=files, manifest=other.digest
    ):
        refused(node, f"it is of the model '{other.digest}', not of digits")
        without(statement, "check_model")
        with pytest.raises(VerificationError, match="changed after signing"):
            node.verify()
        without(loader, "check_digests")
        assert bias(node.verify()) == 99.5


def test_memory_of_other_digests_than_were_signed_is_refused(node, without):
    node.workshop.published()
    files = poisoned(node)
    with impostor(node, real(node), claimed=files):
        with pytest.raises(VerificationError, match=f"'{WEIGHTS}' was changed after"):
            node.verify()
        without(loader, "check_digests")
        assert bias(node.verify()) == 99.5


def test_files_that_the_registry_does_not_list_are_refused(node):
    node.workshop.published()
    with impostor(node, real(node), claimed=contents(node) | {"run.py": b"evil"}):
        refused(node, "it has other files than the registry lists: .*run.py")


# --- what it hands out ----------------------------------------------------------


def test_memory_that_is_not_sealed_is_refused(node, monkeypatch):
    node.workshop.published(fill=1.0)
    given = written(unsealed(), contents(node))
    with impostor(node, real(node), descriptor=given):
        refused(node, "its seals are 0x0, expected at least 0xf")
        monkeypatch.setattr(borrowing, "check_sealed", memory_id)
        model = node.verify()
        assert bias(model) == 1.0
        written(given, poisoned(node))  # after it was verified
        assert bias(model) == 99.5


@pytest.mark.parametrize("left_out", ["GROW", "SHRINK", "WRITE", "SEAL"])
def test_memory_that_lacks_a_seal_is_refused(node, left_out):
    node.workshop.published()
    given = written(unsealed(), contents(node))
    memory._add_seals(given, memory.SEALS & ~getattr(fcntl, f"F_SEAL_{left_out}"))
    with impostor(node, real(node), descriptor=given):
        refused(node, "whoever has it can change it still")


@pytest.mark.parametrize("folder", ["", "/dev/shm"], ids=["disk", "tmpfs"])
def test_a_file_in_place_of_memory_is_refused(node, tmp_path, monkeypatch, folder):
    node.workshop.published(fill=1.0)
    path = f"{folder or tmp_path}/ztserve-test-{os.getpid()}"
    given = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)  # noqa: PTH108
    written(given, contents(node))
    with impostor(node, real(node), descriptor=given):
        refused(node, "its seals are 0x1" if folder else "a file that cannot be sealed")
        monkeypatch.setattr(borrowing, "check_sealed", memory_id)
        model = node.verify()
        assert bias(model) == 1.0
        written(given, poisoned(node))
        assert bias(model) == 99.5


def relayed(node, given):
    """Pass a replica's request on to the broker, and its statement back, but not the
    memory."""

    def answer(connection, request):
        with socket.socket(socket.AF_UNIX) as onward:
            onward.connect(str(node.path) + ".real")
            wire.send(onward, request.message())
            deadline = time.monotonic() + 5
            message = wire.receive(onward, limit=1 << 20, deadline=deadline)
        send(connection, message, given)

    return Impostor(node, answer)


def test_other_memory_behind_the_brokers_own_statement_is_refused(node, without):
    node.workshop.published(fill=1.0)
    node.broker()
    node.path.rename(f"{node.path}.real")
    with relayed(node, sealed(poisoned(node))):
        refused(node, "the descriptor is of .* the statement of MemoryId")
        without(borrowing, "check_same")
        assert bias(node.verify()) == 99.5


def test_another_models_memory_is_refused(node, without):
    node.workshop.published(fill=1.0)
    node.workshop.published("letters", "letters", fill=99.5)
    node.broker()
    other = SealedMemory(lambda _: None)
    registry = open_registry(node.workshop.registry)
    node.load(registry.resolve(ModelRef("letters:1")).ref, other)
    node.path.rename(f"{node.path}.real")
    with relayed(node, other.descriptor):
        refused(node, "the descriptor is of .* the statement of MemoryId")
        without(borrowing, "check_same")
        assert bias(node.verify()) == 99.5
    other.close()


@pytest.mark.parametrize("pages", [-1, 1])
def test_memory_of_a_wrong_size_is_refused(node, without, pages):
    node.workshop.published()
    given = written(unsealed(), contents(node))
    os.ftruncate(given, memory_id(given).size + pages * mmap.PAGESIZE)
    memory._add_seals(given, memory.SEALS)
    with impostor(node, real(node), descriptor=given):
        refused(node, rf"the memory has {(2 + pages) * mmap.PAGESIZE} bytes, its files")
        without(borrowing, "check_size")
        if pages < 0:  # the mapping would end in SIGBUS; Python's own refuses it
            with pytest.raises(ValueError, match="greater than file size"):
                node.verify()
        else:
            assert node.verify()


@pytest.mark.parametrize("count", [0, 2])
def test_not_one_descriptor_is_refused_and_none_is_kept(node, count):
    node.workshop.published()
    files = contents(node)
    given = sealed(files)

    def answer(connection, request):
        wire.send(connection, statement.sign(stated(request, given, files), real(node)))
        socket.send_fds(connection, [b"\0"], [given] * count)

    with Impostor(node, answer):
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
        refused(node, "not one descriptor behind the statement")
        kept = set(os.listdir("/proc/self/fd")) - before  # noqa: PTH208
        assert len(kept) <= 1  # the impostor's own end of the connection


# --- how it answers -------------------------------------------------------------


def in_background(call):
    """Return whether `call` ends within a second, and what is to end it."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(1.0)
    return not thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("says", [False, True], ids=["silent", "waits"])
def test_a_broker_that_never_answers_is_left(node, monkeypatch, says):
    node.workshop.published(fill=1.0)
    ended = threading.Event()

    def answer(connection, request):
        while not ended.wait(0.01):
            if says:
                wire.send(connection, {"wait": True})

    with Impostor(node, answer):
        monkeypatch.setattr(borrowing, "SILENCE_S", 0.3)
        if says:  # a word in time, again and again
            assert not in_background(node.verify)
        monkeypatch.setattr(borrowing, "LEAST_S", 0.3)
        began = time.monotonic()
        assert bias(node.verify()) == 1.0
        assert time.monotonic() - began < 3
        assert "does not answer" in node.told("weights-not-shared")[-1]["reason"]
        if not says:
            monkeypatch.setattr(borrowing, "SILENCE_S", 30.0)
            monkeypatch.setattr(borrowing, "LEAST_S", 30.0)
            assert not in_background(node.verify)
        ended.set()


def test_a_broker_that_sends_without_end_is_refused(node):
    node.workshop.published()

    def answer(connection, request):
        connection.sendall(b"\xff" * 4)
        while True:
            connection.sendall(b" " * 65536)

    with Impostor(node, answer):
        refused(node, "a message of 4294967295 bytes, more than the limit")


@pytest.mark.slow
def test_a_broker_that_drips_is_left(node, monkeypatch):
    node.workshop.published(fill=1.0)
    monkeypatch.setattr(borrowing, "SILENCE_S", 0.3)

    def answer(connection, request):
        connection.sendall(b"\0\1\0\0")
        while True:
            connection.sendall(b" ")
            time.sleep(0.02)

    with Impostor(node, answer):
        assert bias(node.verify()) == 1.0
        assert "does not answer" in node.told("weights-not-shared")[0]["reason"]


@pytest.mark.parametrize(
    "answer", [b"[]", b"{}", b'{"a": 1, "a": 2}', b"\xff", b'{"refused": 1}']
)
def test_nonsense_is_refused(node, answer):
    node.workshop.published()
    with Impostor(
        node, lambda c, _: c.sendall(len(answer).to_bytes(4, "big") + answer)
    ):
        refused(node, "look for what listens there")


# --- who reads, and who writes --------------------------------------------------


@pytest.mark.slow
def test_a_replica_that_writes_changes_its_own_weights_alone(node, monkeypatch):
    node.workshop.published(fill=1.0)
    node.broker()
    writer, reader = node.verify(), node.verify()
    dict(writer.tensors())["layer.bias"].fill_(99.5)
    assert (bias(writer), bias(reader), bias(node.verify())) == (99.5, 1.0, 1.0)
    descriptor = memory_of(node)
    with pytest.raises(PermissionError):  # nor can it map what others see
        mmap.mmap(descriptor, mmap.PAGESIZE, flags=mmap.MAP_SHARED)
    os.close(descriptor)
    # Memory that is not sealed, in mappings that are shared: all see the write.
    given = written(unsealed(), contents(node))
    one, two = mmap.mmap(given, 0), mmap.mmap(given, 0)
    one[0:4] = EVIL[:4]
    assert two[0:4] == EVIL[:4]


def memory_of(node):
    """Ask the broker as a replica would; return the descriptor."""
    ref = open_registry(node.workshop.registry).resolve(ModelRef("digits:1")).ref
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(node.path))
        wire.send(asking, statement.Request.new(ref).message())
        deadline = time.monotonic() + 5
        wire.receive(asking, limit=1 << 20, deadline=deadline)
        return wire.receive_descriptor(asking, deadline=deadline)


@pytest.mark.slow
def test_a_write_in_another_process_reaches_nobody(node):
    node.workshop.published(fill=1.0)
    node.broker()
    reader = node.verify()
    descriptor = memory_of(node)
    code = (
        "import mmap, sys; "
        "m = mmap.mmap(int(sys.argv[1]), 0, flags=mmap.MAP_PRIVATE); "
        "n = len(m); m[:] = b'x' * n; print(m[:4])"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(descriptor)],
        pass_fds=[descriptor],
        capture_output=True,
        text=True,
        check=True,
    )
    os.close(descriptor)
    assert run.stdout == "b'xxxx'\n"
    assert bias(reader) == bias(node.verify()) == 1.0


def test_the_broker_reads_no_weights_that_nobody_signed(node):
    found = node.workshop.published()
    trusted = node.workshop.trust
    node.workshop.write_policy({"stranger": ["trainer", "deployer"]})
    opened = []

    def load(ref, shared):
        reserve = shared._reserve
        shared._reserve = lambda size: (opened.append(size), reserve(size))
        return node.load(ref, shared)

    made = node.broker(load=load)
    assert bias(node.verify(trust=trusted)) == 1.0  # read by the replica itself
    assert (
        "none of the trust policy's signers"
        in node.told("weights-not-shared")[0]["reason"]
    )
    assert opened == []
    assert found.digest not in made.holders


def test_weights_that_were_changed_in_the_registry_are_not_shared(node, without):
    found = node.workshop.published(fill=1.0)
    blobs = node.workshop.registry / "blobs/sha256"
    weights = next(p for p in blobs.iterdir() if b"layer.bias" in p.read_bytes()[:200])
    content = bytearray(weights.read_bytes())
    content[-16:] = content[-80:-64] = EVIL
    weights.chmod(0o644)
    weights.write_bytes(content)
    made = node.broker()
    with pytest.raises(VerificationError, match="changed after signing"):
        node.verify()
    assert "changed after signing" in node.told("weights-refused")[0]["reason"]
    assert found.digest not in made.holders
    without(loader, "check_digests")
    assert bias(node.verify()) == 99.5
