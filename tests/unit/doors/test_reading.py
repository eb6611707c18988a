import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from tests.unit.artifacts.workshop import Workshop
from tests.unit.doors.support import DIGITS, DOMAIN, DOOR, opened, published
from ztserve.artifacts import open_registry, verify_model
from ztserve.doors import DoorAddress, DoorRegistry, reading, wire
from ztserve.doors.reading import AHEAD, PIECE, DoorReader
from ztserve.errors import ConfigError, RegistryError, VerificationError
from ztserve.identity import SpiffeId
from ztserve.transport import Limits
from ztserve.types import ModelRef

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "host_port"),
    [
        ("ztserve://127.0.0.1:7444", ("127.0.0.1", 7444)),
        ("ztserve://registry.example:1", ("registry.example", 1)),
        ("ztserve://[::1]:65535", ("::1", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(text, host_port):
    address = DoorAddress.parse(text)
    assert address.host_port == host_port
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "ztserve://",
        "ztserve://a",
        "ztserve://a:0",
        "a:1",
        "ztserve://u@a:1",
        "ztserve://a:1/",
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match="expected ztserve://HOST:PORT"):
        DoorAddress.parse(text)


# --- reading ahead ------------------------------------------------------------------


@dataclass
class Asked:
    """What a reader asks for; the answers come when the test says so, or at once."""

    content: bytes
    later: bool = False
    ranges: list[tuple[int, int]] = field(default_factory=list)
    futures: list[Future] = field(default_factory=list)

    def __call__(self, offset, length):
        self.ranges.append((offset, length))
        future = Future()
        self.futures.append(future)
        if not self.later:
            future.set_result(memoryview(self.content)[offset : offset + length])
        return future

    def reader(self):
        return DoorReader(self, len(self.content))


def whole(reader, chunk, start=0, end=None):
    end = reader.size if end is None else end
    buffer = bytearray(end - start)
    view, at = memoryview(buffer), 0
    while at < len(buffer):
        at += reader.read_into(view[at : at + chunk], start + at)
    return bytes(buffer)


@pytest.mark.parametrize("chunk", [2 * MIB, 3 * MIB, 64 << 10, 1_000_003])
@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, 9 * MIB + 7])
def test_a_file_is_read_whole_in_chunks_of_any_size(chunk, size):
    content = bytes(n * 31 & 0xFF for n in range(1009)) * (size // 1009 + 1)
    asked = Asked(content[:size])
    with asked.reader() as reader:
        assert whole(reader, chunk) == content[:size]
        assert reader.read_into(memoryview(bytearray(1)), size) == 0
    ends = [offset + length for offset, length in asked.ranges]
    assert ends == sorted(ends)  # nothing twice
    assert sum(length for _, length in asked.ranges) == size


def test_what_is_read_in_order_is_asked_for_ahead():
    asked = Asked(bytes(64 * MIB), later=True)
    reader, buffer = asked.reader(), memoryview(bytearray(PIECE))
    most = 0
    for done, at in enumerate(range(0, 64 * MIB, PIECE)):
        thread = threading.Thread(target=reader.read_into, args=(buffer, at))
        thread.start()
        while len(asked.futures) <= done:
            time.sleep(0.001)
        most = max(most, len(asked.futures) - done)
        asked.futures[done].set_result(memoryview(bytes(PIECE)))
        thread.join()
    assert most == AHEAD
    assert sum(length for _, length in asked.ranges) == 64 * MIB


@pytest.mark.parametrize("span", [8 * MIB, 32 * MIB])
def test_a_loaders_share_of_a_file_is_asked_for_and_no_more(span):
    asked = Asked(bytes(span + 32 * MIB))
    with asked.reader() as reader:
        whole(reader, 2 * MIB, 16 * MIB, 16 * MIB + span)
    assert sum(length for _, length in asked.ranges) == span


def test_reading_elsewhere_begins_anew():
    asked = Asked(bytes(range(256)) * (16 * MIB // 256))
    with asked.reader() as reader:
        assert whole(reader, PIECE, 0, 4 * MIB)[:3] == b"\0\1\2"
        assert whole(reader, 100, 1, 101) == bytes(range(1, 101))
        assert whole(reader, PIECE, 8 * MIB + 5, 8 * MIB + 9) == bytes((5, 6, 7, 8))


def test_a_reader_that_is_closed_lets_go_of_what_it_asked_for():
    asked = Asked(bytes(64 * MIB), later=True)
    reader = asked.reader()
    thread = threading.Thread(
        target=lambda: whole(reader, PIECE, 0, 2 * PIECE), daemon=True
    )
    thread.start()
    while not asked.futures:
        time.sleep(0.001)
    asked.futures[0].set_result(memoryview(bytes(PIECE)))
    while len(asked.futures) < 2:
        time.sleep(0.001)
    asked.futures[1].set_result(memoryview(bytes(PIECE)))
    thread.join()
    with reader:
        pass
    assert all(one.done() for one in asked.futures)


# --- a door that goes and comes -------------------------------------------------------


def big(tmp_path, mib=24):
    workshop = Workshop(tmp_path)
    content = b"\x5a" * (mib * MIB)
    root = workshop.signed(files={"table.txt": content})
    return workshop, root, content


@pytest.mark.slow
def test_a_read_that_breaks_off_is_asked_for_again(tmp_path):
    _, root, content = big(tmp_path)
    registry = open_registry(root)
    with opened(registry, tmp_path) as first:
        port, authority = first.address.host_port[1], first.authority
        replica = first.registry()
        model = replica.resolve(ModelRef("digits"))
        reader = replica.open(model, "table.txt")
        buffer = memoryview(bytearray(len(content)))
        read = reader.read_into(buffer[: 2 * MIB], 0)
    (tmp_path / "again").mkdir()  # the door is gone, in the middle of the file
    again = threading.Event()

    def reopen():
        time.sleep(0.5)
        with opened(registry, tmp_path / "again", port=port, authority=authority):
            again.wait(20)

    thread = threading.Thread(target=reopen)
    thread.start()
    try:
        while read < len(content):
            read += reader.read_into(buffer[read : read + 2 * MIB], read)
        assert bytes(buffer) == content
    finally:
        again.set()
        thread.join()
        replica.close()


@pytest.mark.slow
def test_more_readers_than_the_door_takes_at_once_all_get_their_bytes(tmp_path):
    workshop, root, content = big(tmp_path, 16)
    limits = Limits(max_message_bytes=64 << 10, max_in_flight_per_principal=2)
    with opened(open_registry(root), tmp_path, limits=limits) as door:
        replicas = [door.registry() for _ in range(3)]
        models = [None] * len(replicas)

        def load(n):
            models[n] = verify_model(replicas[n], "digits", workshop.trust)

        threads = [threading.Thread(target=load, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(model.read("table.txt") == content for model in models)
        for replica in replicas:
            replica.close()
    codes = {r["status_code"] for r in door.records()}
    assert codes - {""} <= {"Overloaded"}


@pytest.mark.slow
def test_a_door_that_is_away_is_a_registry_error(tmp_path, monkeypatch):
    with published(tmp_path) as (_, door):
        replica = door.registry()
        model = replica.resolve(ModelRef("digits"))
        replica.files(model)
    began = time.monotonic()
    with pytest.raises(RegistryError, match=r"ztserve://127.0.0.1:\d+: "):
        replica.resolve(ModelRef("digits"))
    assert time.monotonic() - began < 5
    monkeypatch.setattr(reading, "ANSWER_S", 0.3)
    reader = replica.open(model, "config.json")
    began = time.monotonic()
    with pytest.raises(RegistryError, match="ztserve://"):
        reader.read_into(memoryview(bytearray(2)), 0)
    assert time.monotonic() - began < 5
    replica.close()


@pytest.mark.slow
def test_another_server_at_the_address_is_asked_nothing(tmp_path):
    with published(tmp_path) as (_, door):
        other = SpiffeId.parse(f"spiffe://{DOMAIN}/ns/ztserve/sa/other")
        source = door.authority.source(DIGITS)
        with (
            DoorRegistry(door.address, source=source, door_id=other) as replica,
            pytest.raises(RegistryError, match="SPIFFE ID"),
        ):
            replica.resolve(ModelRef("digits"))
        assert door.records() == []


def test_a_file_that_is_not_listed_cannot_be_opened(tmp_path):
    with published(tmp_path) as (_, door), door.registry() as replica:
        model = replica.resolve(ModelRef("digits"))
        with pytest.raises(VerificationError, match=r"has no file 'model.sig'"):
            replica.open(model, "model.sig")


def test_it_says_where_it_reads_and_may_be_closed_twice(tmp_path):
    with published(tmp_path) as (_, door):
        replica = door.registry()
        assert repr(replica) == f"DoorRegistry('{door.address}')"
        replica.close()
        replica.close()


def test_the_verbs_are_those_of_the_protocol():
    from ztserve.doors.v1 import registry_pb2

    service = registry_pb2.DESCRIPTOR.services_by_name["Registry"]
    assert tuple(service.methods_by_name) == wire.VERBS
    assert str(DOOR).endswith("/ns/ztserve/sa/registry")
