import hashlib
import sys
import threading

import pytest
from blake3 import blake3

from ztserve.artifacts.loading import buffers
from ztserve.artifacts.loading.buffers import read_all
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import RegistryError, VerificationError


class Memory:
    """A Reader over bytes, that fails or stops short on request."""

    def __init__(self, content, *, size=None, error=None, step=None):
        self.content, self.error, self.step = content, error, step
        self.size = len(content) if size is None else size

    def read_into(self, view, offset):
        if self.error:
            raise self.error
        chunk = self.content[offset : offset + min(self.step or len(view), len(view))]
        view[: len(chunk)] = chunk
        return len(chunk)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def read(reader, size, **more):
    return read_all(lambda _: reader, {"f": size}, **more)["f"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 4096, 5 << 20])
def test_what_is_hashed_is_what_is_in_the_buffer(size):
    content = bytes(n % 251 for n in range(size))
    buffer = read(Memory(content), size)
    assert bytes(buffer.view) == content
    assert buffer.digests == (hashlib.sha256(content).hexdigest(),)
    assert not buffer.view.readonly


def test_short_reads_are_continued():
    content = b"0123456789" * 100
    assert bytes(read(Memory(content, step=7), 1000).view) == content


def test_a_file_that_ends_early_is_refused():
    with pytest.raises(VerificationError, match="'f' is truncated: it ends after 3"):
        read(Memory(b"abc", size=4), 4)


def test_a_file_of_another_size_than_listed_is_refused():
    with pytest.raises(VerificationError, match=r"has 3 bytes where .* listed 4"):
        read(Memory(b"abc"), 4)


def test_a_failing_read_is_a_registry_error():
    with pytest.raises(RegistryError, match="'f' cannot be read: Input/output error"):
        read(Memory(b"abc", error=OSError(5, "Input/output error")), 3)


def test_more_than_the_limit_is_refused_before_anything_is_opened():
    opened = []
    with pytest.raises(RegistryError, match=r"need 30 bytes of memory, .* of 29"):
        read_all(opened.append, {"a": 10, "b": 20}, max_bytes=29)
    assert opened == []


HASHES = {"sha256": hashlib.sha256, "blake3": blake3}


@pytest.mark.parametrize("hash_type", HASHES)
@pytest.mark.parametrize("size", [0, 1, 4096])
def test_a_whole_file_is_hashed_as_declared(hash_type, size):
    content = bytes(n % 251 for n in range(size))
    buffer = read(Memory(content), size, serialization=Serialization(hash_type))
    assert buffer.digests == (HASHES[hash_type](content).hexdigest(),)


@pytest.mark.parametrize("hash_type", HASHES)
@pytest.mark.parametrize("piece", [25, 1 << 20])
@pytest.mark.parametrize("size", [1, 9, 10, 11, 1000, 1003])
def test_each_shard_has_its_own_digest(hash_type, piece, size, monkeypatch):
    monkeypatch.setattr(buffers, "_PIECE", piece)
    content = bytes(n % 251 for n in range(size))
    how = Serialization(hash_type, 10)
    buffer = read(Memory(content, step=7), size, serialization=how)
    assert bytes(buffer.view) == content
    assert buffer.digests == tuple(
        HASHES[hash_type](content[n : n + 10]).hexdigest() for n in range(0, size, 10)
    )


class Counting(Memory):
    """A Reader that counts how often it is read."""

    reads = 0

    def read_into(self, view, offset):
        self.reads += 1
        return super().read_into(view, offset)


@pytest.mark.parametrize(("chunk", "reads"), [(1000, 1), (300, 4), (3, 334)])
def test_small_shards_cost_no_small_reads(chunk, reads, monkeypatch):
    monkeypatch.setattr(buffers, "_CHUNK", chunk)
    content = bytes(n % 251 for n in range(1000))
    reader = Counting(content)
    buffer = read(reader, 1000, serialization=Serialization("sha256", 10))
    assert bytes(buffer.view) == content
    assert buffer.digests == tuple(
        hashlib.sha256(content[n : n + 10]).hexdigest() for n in range(0, 1000, 10)
    )
    assert reader.reads == reads


def test_an_empty_file_has_no_shard():
    buffer = read(Memory(b""), 0, serialization=Serialization("sha256", 10))
    assert buffer.digests == ()


@pytest.mark.parametrize("shard_size", [None, 10])
def test_many_files_keep_their_own_digests(shard_size):
    files = {f"f{n}": bytes([n]) * (n * 7) for n in range(1, 20)}
    how = Serialization("sha256", shard_size)
    found = read_all(
        lambda name: Memory(files[name]),
        {name: len(content) for name, content in files.items()},
        serialization=how,
    )
    for name, content in files.items():
        assert bytes(found[name].view) == content
        assert found[name].digests == tuple(
            hashlib.sha256(content[start:end]).hexdigest()
            for start, end in how.spans(len(content))
        )


class Meeting(Memory):
    """A Reader that waits at its first byte until two threads are at theirs."""

    def __init__(self, content, barrier):
        super().__init__(content)
        self.barrier, self.waited = barrier, False

    def read_into(self, view, offset):
        if not self.waited:
            self.waited = True
            self.barrier.wait(10)
        return super().read_into(view, offset)


def test_the_shards_of_one_file_are_read_by_several_threads(monkeypatch):
    monkeypatch.setattr(buffers, "_PIECE", 10)
    monkeypatch.setattr(buffers.os, "cpu_count", lambda: 2)
    barrier, content = threading.Barrier(2), bytes(range(20))
    how = Serialization("sha256", 10)
    read_all(lambda _: Meeting(content, barrier), {"f": 20}, serialization=how)
    monkeypatch.setattr(buffers, "_PIECE", 20)  # both shards to one thread
    with pytest.raises(threading.BrokenBarrierError):
        read_all(
            lambda _: Meeting(content, Broken(barrier)), {"f": 20}, serialization=how
        )


class Broken:
    """A barrier at which nobody else arrives."""

    def __init__(self, barrier):
        self.barrier = barrier

    def wait(self, _):
        self.barrier.wait(0.01)


def test_blake3_that_is_not_installed_is_refused_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "blake3", None)  # what an absent package is
    opened = []
    with pytest.raises(VerificationError, match=r"pip install 'ztserve\[blake3\]'"):
        read_all(opened.append, {"a": 10}, serialization=Serialization("blake3"))
    assert opened == []
