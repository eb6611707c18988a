"""Weights that the replicas of a node share, and how they come by them."""

import fcntl
import gc
import mmap
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.unit.artifacts.brokers import BROKER_ID, DOMAIN
from ztserve.artifacts import open_registry, verify_model
from ztserve.artifacts.loading.memory import Wanted
from ztserve.artifacts.loading.shared import borrowing, broker, wire
from ztserve.artifacts.loading.shared.memory import (
    SEALS,
    SealedMemory,
    check_sealed,
    layout,
    map_private,
)
from ztserve.artifacts.statements.serialization import WHOLE_FILES
from ztserve.errors import (
    AuditError,
    IdentityError,
    RegistryError,
    Unauthenticated,
    VerificationError,
)
from ztserve.testing import ThrowAwayAuthority
from ztserve.types import ModelRef

PAGE = mmap.PAGESIZE
NOTHING = "m@sha256:" + "0" * 64


def bias(model):
    return dict(model.tensors())["layer.bias"]


def mapped():
    """The inode numbers of the shared memory that this process maps, with doubles."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [int(x.split()[4]) for x in lines if "memfd:ztserve-weights" in x]


def reason(node):
    (event,) = node.told("weights-not-shared")
    return event["reason"]


# --- sharing ----------------------------------------------------------------------


@pytest.mark.slow
def test_two_replicas_map_one_memory_and_it_is_read_once(workshop, node):
    workshop.published(fill=3.0)
    broker = node.broker()
    one, two = node.verify(), node.verify()
    assert bias(one).tolist() == bias(two).tolist() == [3.0] * 4
    first, second = node.told("weights-borrowed")
    assert first["memory"] == second["memory"]
    assert mapped() == [first["memory"]] * 2
    assert node.reads == 1
    assert broker.holders == {one.digest: 2}
    (read,) = node.told("weights-read")
    assert read["bytes"] == 2 * PAGE
    node.wait_for(lambda: len(node.told("weights-shared")) == 2)
    assert {event["process"] for event in node.told("weights-shared")} == {os.getpid()}


def test_a_borrowed_model_is_all_that_an_own_one_is(workshop, node):
    workshop.published(fill=2.0, files={"vocab/words.txt": b"a b"})
    node.broker()
    shared = node.verify()
    own = verify_model(workshop.registry, "digits:1", workshop.trust)
    assert (shared.digest, shared.names) == (own.digest, own.names)
    assert shared.checks == own.checks
    assert shared.read("vocab/words.txt") == b"a b"
    assert (shared.directory() / "vocab/words.txt").read_bytes() == b"a b"
    assert bias(shared).tolist() == bias(own).tolist()


@pytest.mark.parametrize("how", [{"shard_size": 64}, {"hash_type": "blake3"}])
def test_shards_and_other_hashes_are_shared_too(workshop, node, how):
    from ztserve.artifacts.publish import publish, release_model, sign_model
    from ztserve.artifacts.statements.serialization import Serialization

    root = workshop.model()
    sign_model(root, workshop.keys["trainer"], serialization=Serialization(**how))
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    publish(root, workshop.registry, name="digits", version="1")
    node.broker()
    assert bias(node.verify()).tolist() == [1.0] * 4
    assert node.told("weights-borrowed")


@pytest.mark.slow
def test_models_have_memory_of_their_own(workshop, node):
    workshop.published(fill=1.0)
    workshop.published("letters", "letters", fill=2.0)
    node.broker()
    one, two = node.verify(), node.verify("letters:1")
    assert (bias(one)[0], bias(two)[0]) == (1.0, 2.0)
    assert len(set(mapped())) == 2


@pytest.mark.slow
def test_replicas_that_start_together_wait_for_one_reading(workshop, node, monkeypatch):
    monkeypatch.setattr(broker, "WAIT_S", 0.01)
    workshop.published()
    node.before_read = lambda: time.sleep(0.05)
    made = node.broker()
    models = []
    threads = [
        threading.Thread(target=lambda: models.append(node.verify())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert node.reads == 1
    assert made.holders == {models[0].digest: 4}


def test_a_small_model_is_not_worth_asking_for(workshop, node):
    workshop.published()
    assert verify_model(
        workshop.registry,
        "digits:1",
        workshop.trust,
        memory=node.memory(min_bytes=borrowing.MIN_BYTES),
    )
    assert node.events == []


def test_a_broker_is_started_where_none_listens(workshop, node):
    workshop.published()
    assert bias(node.verify(summon=node.broker)).tolist() == [1.0] * 4
    assert node.told("weights-borrowed")
    node.verify(summon=lambda: pytest.fail("it listens already"))


@pytest.mark.slow
@pytest.mark.parametrize("key", [ec.SECP384R1(), 2048], ids=["P-384", "RSA"])
def test_a_broker_may_have_any_key_that_svids_have(workshop, node, key):
    workshop.published()
    made = (
        rsa.generate_private_key(65537, key)
        if isinstance(key, int)
        else ec.generate_private_key(key)
    )
    node.broker(source=node.authority.forged_source(BROKER_ID, key=made))
    node.verify()
    assert node.told("weights-borrowed")


# --- holding and giving back ----------------------------------------------------------


@pytest.mark.slow
def test_what_no_replica_holds_is_given_back_after_a_while(workshop, node):
    workshop.published()
    made = node.broker(grace_s=0.2)
    model = node.verify()
    tensor = bias(model)
    digest = model.digest
    del model
    gc.collect()
    assert made.holders == {digest: 1}  # a tensor is enough to hold it
    del tensor
    gc.collect()
    node.wait_for(lambda: made.holders == {})
    node.wait_for(lambda: node.told("weights-freed") == [{"digest": digest}])
    assert mapped() == []
    node.verify()
    assert node.reads == 2


def test_a_replica_that_ends_holds_nothing(workshop, node):
    workshop.published()
    made = node.broker()
    with socket.socket(socket.AF_UNIX) as killed:
        killed.connect(str(node.path))
        ref = open_registry(workshop.registry).resolve(ModelRef("digits:1")).ref
        wire.send(killed, {"model": str(ref), "nonce": "0" * 64})
        node.wait_for(lambda: list(made.holders.values()) == [1])
    node.wait_for(lambda: list(made.holders.values()) == [0])


@pytest.mark.slow
def test_what_nobody_holds_makes_room(workshop, node):
    workshop.published()
    workshop.published("letters", "letters")
    made = node.broker(max_bytes=2 * PAGE)
    first = node.verify()
    digest = first.digest
    del first
    gc.collect()
    node.wait_for(lambda: made.holders == {digest: 0})
    second = node.verify("letters:1")
    assert made.holders == {second.digest: 1}


def test_what_does_not_fit_is_refused_and_read_by_the_replica(workshop, node):
    workshop.published()
    workshop.published("letters", "letters", fill=2.0)
    node.broker(max_bytes=3 * PAGE)
    held = node.verify()
    assert bias(node.verify("letters:1")).tolist() == [2.0] * 4
    assert "do not fit beside" in reason(node)
    assert "[artifacts] max_shared_bytes" in reason(node)
    assert bias(held).tolist() == [1.0] * 4


def test_a_broker_that_ends_leaves_its_replicas_their_weights(workshop, node):
    workshop.published(fill=5.0)
    made = node.broker()
    model = node.verify()
    made.stop()
    assert bias(model).tolist() == [5.0] * 4
    assert not node.path.exists()


@pytest.mark.slow
def test_a_change_of_authority_is_waited_for(workshop, node):
    """The replica knows the new one at once, the broker's SVID follows."""
    workshop.published()
    old = ThrowAwayAuthority(DOMAIN).source(BROKER_ID)

    class Follows:
        def __init__(self):
            self.looks = 0

        def current(self):
            self.looks += 1
            source = old if self.looks < 3 else node.authority.source(BROKER_ID)
            return source.current()

    following = Follows()
    node.broker(source=following)
    assert node.verify()
    assert following.looks == 3
    assert node.told("weights-borrowed")


# --- a broker that gives nothing ------------------------------------------------------


def test_without_a_broker_a_replica_reads_for_itself(workshop, node):
    workshop.published(fill=4.0)
    assert bias(node.verify()).tolist() == [4.0] * 4
    assert "no weights broker at" in reason(node)
    assert mapped() == []


def test_a_broker_that_cannot_be_started_is_told(workshop, node):
    workshop.published()

    def summon():
        raise IdentityError("nobody gives it an identity")

    assert node.verify(summon=summon)
    assert "nobody gives it an identity" in reason(node)


class Expired:
    def current(self):
        raise IdentityError("the SVID expired")


def test_a_broker_without_an_identity_refuses(workshop, node):
    workshop.published()
    node.broker(source=Expired())
    assert node.verify()
    assert "the broker has no identity" in reason(node)


def test_a_broker_in_quarantine_is_not_believed(workshop, node):
    workshop.published()
    node.broker()

    def check(peer):
        raise Unauthenticated("no", f"{peer.id} is in quarantine")

    assert node.verify(check_peer=check)
    assert "weights is in quarantine" in reason(node)


def test_a_model_that_the_broker_refuses_is_refused_by_the_replica(workshop, node):
    digest = workshop.published().digest
    revoked = f'[revoked]\nmanifests = ["{digest}"]\n'
    good = workshop.trust
    workshop.write_policy(tail=revoked)
    node.broker()
    with pytest.raises(VerificationError, match="revokes the model"):
        node.verify()
    assert node.verify(trust=good)  # the broker judges by its own, and says so
    assert "it refuses: stage load" in reason(node)
    assert "revokes the model" in reason(node)


@pytest.mark.slow
def test_a_model_that_is_revoked_while_it_is_held_is_refused(workshop, node):
    digest = workshop.published().digest
    node.broker()
    held = node.verify()
    workshop.write_policy(tail=f'[revoked]\nmanifests = ["{digest}"]\n')
    with pytest.raises(VerificationError, match="revokes the model"):
        node.verify()
    assert held


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broker_with_a_fault_of_its_own_refuses(workshop, node):
    workshop.published()

    def load(ref, memory):
        raise RuntimeError("a fault")

    made = node.broker(load=load)
    assert node.verify()
    assert "it refuses: the broker failed; its log says how" in reason(node)
    assert made.holders == {}


def test_a_refusal_is_not_kept(workshop, node):
    workshop.published()
    faults = iter(["the disk is away"])

    def load(ref, memory):
        for fault in faults:
            raise RegistryError(fault)
        return node.load(ref, memory)

    node.broker(load=load)
    node.verify()
    assert "the disk is away" in reason(node)
    node.verify()
    assert len(node.told("weights-borrowed")) == 1


# --- asking the broker ----------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "field 'model' is missing"),
        ({"model": "digits:1", "nonce": "0" * 64}, "expected a pinned model"),
        ({"model": "../x", "nonce": "0" * 64}, "expected name"),
        ({"model": f"d@sha256:{'0' * 64}", "nonce": "0"}, "a nonce of 64 digits"),
        ({"model": "d", "nonce": "0", "more": 1}, "unknown field 'more'"),
        ({"model": "d" * 5000, "nonce": "0" * 64}, "more than the limit of 4096"),
    ],
)
def test_a_request_out_of_order_ends_the_connection(node, request_, message):
    node.broker()
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(node.path))
        wire.send(asking, request_)
        with suppress(ConnectionResetError):  # not all was read
            assert asking.recv(1) == b""
    node.wait_for(lambda: node.told("weights-refused"))
    assert message in node.told("weights-refused")[0]["reason"]


def test_who_asks_nothing_is_not_waited_for(node, monkeypatch):
    monkeypatch.setattr(broker, "REQUEST_S", 0.05)
    node.broker()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(node.path))
        assert silent.recv(1) == b""
    node.wait_for(lambda: node.told("weights-refused"))
    assert "timed out" in node.told("weights-refused")[0]["reason"]


def test_connections_are_bounded(node, monkeypatch):
    monkeypatch.setattr(broker, "MAX_CONNECTIONS", 1)
    node.broker()
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        one.connect(str(node.path))
        two.connect(str(node.path))
        assert two.recv(1) == b""
    assert node.told("weights-refused")[0]["reason"] == "over 1 replicas"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_given_nothing(node):
    node.broker()
    node.path.chmod(0o666)
    node.path.parent.chmod(0o711)
    code = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); "
        "os.setuid(65534); s.connect(sys.argv[1]); print(s.recv(1))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, node.path.name],
        cwd=node.path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "b''\n", run.stderr
    node.wait_for(lambda: node.told("weights-refused"))
    assert "runs as uid 65534" in node.told("weights-refused")[0]["reason"]


def test_the_socket_is_the_users_own(node):
    node.broker()
    assert node.path.stat().st_mode & 0o777 == 0o600


def test_a_socket_that_was_left_behind_is_replaced(workshop, node):
    workshop.published()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(node.path))
    node.broker()
    node.verify()
    assert node.told("weights-borrowed")


def test_what_cannot_be_audited_is_not_handed_out(workshop, node, caplog):
    workshop.published()
    made = node.broker()

    def on_event(kind, fields):
        raise AuditError("the disk is full")

    made._on_event = on_event
    assert node.verify()
    assert "closed the connection" in reason(node)
    node.wait_for(lambda: list(made.holders.values()) == [0])
    node.wait_for(lambda: "weights-refused" in caplog.text)
    made._on_event = node.tell
    node.verify()
    assert node.told("weights-borrowed")


def test_a_broker_that_is_out_of_descriptors_turns_not_deaf(workshop, node, caplog):
    workshop.published()
    made = node.broker()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name.name) for name in Path("/proc/self/fd").iterdir())
    with socket.socket(socket.AF_UNIX) as waiting:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
        held = []
        with suppress(OSError):  # until there is none left
            while True:
                held.append(os.dup(waiting.fileno()))
        waiting.connect(str(node.path))
        time.sleep(0.3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
    assert "takes nobody on now" in caplog.text
    assert made._threads[0].is_alive()
    node.verify()
    assert node.told("weights-borrowed")


def test_a_broker_does_not_take_the_next_ones_socket_away(workshop, node):
    workshop.published()
    old = node.broker()
    node.broker()
    old.stop()
    node.verify()
    assert node.told("weights-borrowed")


def test_a_model_beyond_the_replicas_own_limit_is_not_borrowed(workshop, node):
    workshop.published()
    node.broker()
    with pytest.raises(RegistryError, match="more than the limit of 10"):
        verify_model(
            workshop.registry,
            "digits:1",
            workshop.trust,
            memory=node.memory(),
            max_bytes=10,
        )
    assert node.reads == 0


# --- the memory ----------------------------------------------------------------


class Bytes:
    """A registry's file in memory."""

    def __init__(self, content):
        self.content, self.size = content, len(content)

    def read_into(self, view, offset):
        piece = self.content[offset : offset + len(view)]
        view[: len(piece)] = piece
        return len(piece)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def wanted(files):
    sizes = {name: len(content) for name, content in files.items()}
    return Wanted(
        ModelRef(NOTHING), sizes, WHOLE_FILES, lambda name: Bytes(files[name])
    )


@pytest.fixture
def sealed():
    made = SealedMemory(lambda _: None)
    yield made
    made.close()


def test_files_lie_from_page_to_page_in_the_order_of_their_names(sealed):
    files = {"b": b"2" * (PAGE + 1), "a": b"1", "c": b"", "d": b"4" * PAGE}
    buffers = sealed.fill(wanted(files))
    assert {name: bytes(b.view) for name, b in buffers.items()} == files
    assert layout(sealed.sizes) == (
        {"a": 0, "b": PAGE, "c": 3 * PAGE, "d": 3 * PAGE},
        4 * PAGE,
    )
    assert sealed.id().size == 4 * PAGE
    assert os.pread(sealed.descriptor, 2, PAGE) == b"22"


def test_a_model_of_empty_files_has_memory_too(sealed):
    assert bytes(sealed.fill(wanted({"a": b""}))["a"].view) == b""
    assert sealed.id().size == PAGE


def test_sealed_memory_cannot_be_changed_by_any_way(sealed):
    sealed.fill(wanted({"a": b"1" * PAGE}))
    memory = sealed.descriptor
    assert fcntl.fcntl(memory, fcntl.F_GET_SEALS) & SEALS == SEALS
    for change in (
        lambda: os.pwrite(memory, b"2", 0),
        lambda: os.ftruncate(memory, 1),
        lambda: os.ftruncate(memory, 2 * PAGE),
        lambda: mmap.mmap(memory, PAGE, flags=mmap.MAP_SHARED),
        lambda: fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        lambda: os.posix_fallocate(memory, 0, 2 * PAGE),
    ):
        with pytest.raises(PermissionError):
            change()
    again = os.open(f"/proc/self/fd/{memory}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.write(again, b"2")
    os.close(again)


def test_memory_takes_no_write_from_before_its_first_byte(sealed):
    faults = []

    class Watching(Bytes):
        def read_into(self, view, offset):
            try:
                os.pwrite(sealed.descriptor, b"x", 0)
            except OSError as error:
                faults.append(type(error))
            return super().read_into(view, offset)

    files = wanted({"a": b"1"})
    object.__setattr__(files, "open", lambda _: Watching(b"1"))
    sealed.fill(files)
    assert faults == [PermissionError]


def test_a_reader_that_keeps_the_memory_keeps_it_unshared(sealed):
    kept = []

    class Keeping(Bytes):
        def read_into(self, view, offset):
            kept.append(view[:1])
            return super().read_into(view, offset)

    files = wanted({"a": b"1"})
    object.__setattr__(files, "open", lambda _: Keeping(b"1"))
    with pytest.raises(RegistryError, match="in use still"):
        sealed.fill(files)
    assert sealed.descriptor == -1


def test_memory_for_weights_cannot_be_executed(sealed):
    sealed.fill(wanted({"a": b"1"}))
    assert os.fstat(sealed.descriptor).st_mode & 0o111 == 0
    with pytest.raises(PermissionError):
        os.fchmod(sealed.descriptor, 0o700)


def test_what_is_not_read_whole_is_not_kept(sealed):
    files = wanted({"a": b"1" * 10})
    object.__setattr__(files, "open", lambda _: Bytes(b"1"))
    with pytest.raises(VerificationError, match="has 1 bytes where"):
        sealed.fill(files)
    assert sealed.descriptor == -1


def test_what_may_not_be_reserved_is_not_made():
    def reserve(size):
        raise RegistryError(f"{size} are too many")

    made = SealedMemory(reserve)
    with pytest.raises(RegistryError, match=f"{PAGE} are too many"):
        made.fill(wanted({"a": b"1"}))
    assert made.descriptor == -1


def test_more_memory_than_can_be_is_refused():
    with pytest.raises(RegistryError, match="no memory to share of"):
        SealedMemory(lambda _: None).fill(
            Wanted(
                ModelRef(NOTHING),
                {"a": 1 << 63},
                WHOLE_FILES,
                lambda _: Bytes(b""),
                None,
            )
        )


def test_a_write_stays_in_the_process_that_makes_it(sealed):
    sealed.fill(wanted({"a": b"1" * 10}))
    mine = map_private(sealed.descriptor, sealed.sizes)["a"]
    other = map_private(sealed.descriptor, sealed.sizes)["a"]
    mine[0] = ord("X")
    assert bytes(mine[:2]) == b"X1"
    assert bytes(other[:2]) == os.pread(sealed.descriptor, 2, 0) == b"11"


def test_which_memory_it_is_is_told_of_sealed_memory_alone(sealed):
    sealed.fill(wanted({"a": b"1"}))
    assert check_sealed(sealed.descriptor) == sealed.id()
