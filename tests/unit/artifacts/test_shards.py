import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import ones

from ztserve.artifacts.loading import buffers
from ztserve.artifacts.loading.buffers import physical_memory, private_memory
from ztserve.artifacts.loading.shards import Shards
from ztserve.artifacts.statements.manifest import Manifest, SignedFile
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import RegistryError, VerificationError

CONTENT = bytes(n % 251 for n in range(1003))
STEP = 10


class Disk:
    """Files that can be opened, and changed; notes each range that was read."""

    def __init__(self, **files):
        self.files = files
        self.reads = []
        self.before_read = lambda _name, _offset: None

    def open(self, name):
        return Open(self, name)

    def counts(self, name):
        """How often each byte of a file was read."""
        counts = [0] * len(self.files[name])
        for file, start, end in self.reads:
            if file == name:
                counts[start:end] = [n + 1 for n in counts[start:end]]
        return counts


class Open:
    def __init__(self, disk, name):
        self.disk, self.name, self.size = disk, name, len(disk.files[name])

    def read_into(self, view, offset):
        self.disk.before_read(self.name, offset)
        chunk = self.disk.files[self.name][offset : offset + len(view)]
        view[: len(chunk)] = chunk
        self.disk.reads.append((self.name, offset, offset + len(chunk)))
        return len(chunk)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def signed(disk, shard_size=STEP):
    how = Serialization("sha256", shard_size)
    files = {
        name: SignedFile(
            tuple(
                hashlib.sha256(content[start:end]).hexdigest()
                for start, end in how.spans(len(content))
            ),
            None if shard_size is None else len(content),
        )
        for name, content in disk.files.items()
    }
    return Manifest("sha256:" + "0" * 64, how, files)


def shards_of(disk, *, shard_size=STEP, max_bytes=1 << 30):
    sizes = {name: len(content) for name, content in disk.files.items()}
    return Shards(disk.open, signed(disk, shard_size), sizes, max_bytes=max_bytes)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT))).map(
            sorted
        ),
        max_size=8,
    ),
    st.sampled_from([1, 7, 10, 300, 1003, 5000, None]),
)
def test_any_ranges_read_each_shard_that_covers_them_once_and_no_other(ranges, step):
    disk = Disk(f=CONTENT)
    shards = shards_of(disk, shard_size=step)
    for start, end in ranges:
        assert shards.content("f", start, end) == CONTENT[start:end]
    size = step or len(CONTENT)
    covered = {
        shard
        for start, end in ranges
        if start < end
        for shard in range(start // size, (end - 1) // size + 1)
    }
    assert disk.counts("f") == [n // size in covered for n in range(len(CONTENT))]
    assert shards.unread == disk.counts("f").count(0)


def test_nothing_is_read_before_it_is_asked_for():
    disk = Disk(f=CONTENT, g=CONTENT)
    shards = shards_of(disk)
    assert (disk.reads, shards.unread) == ([], 2 * len(CONTENT))
    shards.require([("f", (0, 20)), ("g", (990, 1003))])
    assert disk.counts("f") == [1] * 20 + [0] * 983
    assert disk.counts("g") == [0] * 990 + [1] * 13
    assert shards.unread == 2 * len(CONTENT) - 33


def test_a_wrong_shard_is_refused_by_its_place_and_the_others_are_not():
    disk = Disk(f=CONTENT)
    shards = shards_of(disk)
    disk.files["f"] = CONTENT[:25] + b"X" + CONTENT[26:]
    assert shards.content("f", 0, 20) == CONTENT[:20]
    with pytest.raises(VerificationError) as caught:
        shards.content("f", 15, 45)
    wrong, right = (
        hashlib.sha256(text[20:30]).hexdigest() for text in (disk.files["f"], CONTENT)
    )
    assert str(caught.value) == (
        f"'f' was changed after signing: the SHA-256 of its bytes 20 to 30 is {wrong}, "
        f"signed was {right}"
    )
    assert shards.content("f", 30, 50) == CONTENT[30:50]
    assert shards.unread == len(CONTENT) - 40


def test_what_failed_is_read_anew_when_it_is_asked_for_again():
    disk = Disk(f=CONTENT)
    shards = shards_of(disk)
    disk.files["f"] = b"X" * len(CONTENT)
    with pytest.raises(VerificationError):
        shards.content("f", 0, 30)
    disk.files["f"] = CONTENT
    assert shards.content("f", 0, 30) == CONTENT[:30]


def test_what_was_verified_is_never_read_again():
    disk = Disk(f=CONTENT)
    shards = shards_of(disk)
    held = shards.content("f", 0, 30)
    disk.files["f"] = b"X" * len(CONTENT)
    with pytest.raises(VerificationError):
        shards.content("f", 25, 35)
    assert held == shards.content("f", 0, 30) == CONTENT[:30]


@pytest.mark.parametrize("size", [0, 999, 1004])
def test_a_file_that_has_another_size_now_is_refused(size):
    disk = Disk(f=CONTENT)
    shards = shards_of(disk)
    disk.files["f"] = bytes(size)
    with pytest.raises(VerificationError, match=f"'f' has {size} bytes .* listed 1003"):
        shards.content("f", 0, 1)


def test_a_file_that_goes_away_can_come_back():
    disk = Disk(f=CONTENT)
    shards = shards_of(disk)

    def away(name, _offset):
        raise OSError(5, "Input/output error")

    disk.before_read = away
    with pytest.raises(RegistryError, match="'f' cannot be read: Input/output"):
        shards.content("f", 0, 30)
    assert shards.unread == len(CONTENT)
    disk.before_read = lambda *_: None
    assert shards.content("f", 0, 30) == CONTENT[:30]


def test_more_than_the_limit_is_not_read():
    disk = Disk(f=CONTENT)
    shards = shards_of(disk, max_bytes=30)
    assert shards.content("f", 5, 25) == CONTENT[5:25]
    assert shards.content("f", 0, 30) == CONTENT[:30]
    with pytest.raises(RegistryError, match=r"40 bytes of weights .* limit of 30"):
        shards.content("f", 29, 31)
    assert disk.counts("f")[30:] == [0] * 973


@pytest.mark.slow
def test_threads_that_ask_for_the_same_get_it_read_once():
    disk = Disk(f=CONTENT)
    shards = shards_of(disk, shard_size=100)
    start = threading.Barrier(8)

    def ask(number):
        start.wait(10)
        for offset in range(0, 1000, 50):
            place = (offset * (2 * (number % 2) - 1)) % 1000  # some from the end
            assert shards.content("f", place, place + 3) == CONTENT[place : place + 3]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert disk.counts("f") == [1] * 1000 + [0] * 3
    assert shards.unread == 3


def test_a_thread_that_waits_for_another_gets_its_refusal_too():
    disk = Disk(f=CONTENT)
    shards = shards_of(disk)
    disk.files["f"] = b"X" * len(CONTENT)
    reading, second = threading.Event(), threading.Event()

    def hold(_name, _offset):
        reading.set()
        assert second.wait(10)

    disk.before_read = hold

    def wait_for_first():
        assert reading.wait(10)
        claim = shards._claim

        def claimed(ranges):
            found = claim(ranges)
            second.set()
            return found

        shards._claim = claimed
        shards.content("f", 5, 10)

    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(shards.content, "f", 0, 10),
            pool.submit(wait_for_first),
        ]
        for one in asked:
            with pytest.raises(VerificationError, match="bytes 0 to 10"):
                one.result(10)
    assert len(disk.reads) == 1


def test_an_interrupted_read_leaves_nobody_waiting_and_is_not_tried_again():
    """A thread of it may still write: not into what would be verified since."""
    disk = Disk(f=CONTENT)
    shards = shards_of(disk)

    def interrupted(_name, _offset):
        raise KeyboardInterrupt

    disk.before_read = interrupted
    with pytest.raises(KeyboardInterrupt):
        shards.content("f", 0, 10)
    disk.before_read = lambda *_: None
    for _ in range(2):
        with pytest.raises(RegistryError, match="was interrupted: verify the model an"):
            shards.content("f", 0, 10)
    assert shards.content("f", 10, 20) == CONTENT[10:20]
    assert disk.reads == [("f", 10, 20)]


def test_a_closed_one_gives_what_it_has_and_reads_no_more():
    disk = Disk(f=CONTENT)
    shards = shards_of(disk)
    assert shards.content("f", 0, 10) == CONTENT[:10]
    shards.close()
    assert shards.content("f", 0, 10) == CONTENT[:10]
    with pytest.raises(RegistryError) as caught:
        shards.content("f", 5, 15)
    assert str(caught.value) == (
        "the weights asked for in 'f' were not read while the model was loaded, and "
        "are read no more: ask for them in load()"
    )
    assert disk.counts("f") == [1] * 10 + [0] * 993


def test_what_failed_counts_as_memory_but_once():
    disk = Disk(f=CONTENT)
    shards = shards_of(disk, max_bytes=20)
    disk.files["f"] = b"X" * len(CONTENT)
    for _ in range(3):
        with pytest.raises(VerificationError):
            shards.content("f", 0, 20)
    with pytest.raises(RegistryError, match=r"30 bytes of weights .* limit of 20"):
        shards.content("f", 20, 30)
    assert shards.unread == len(CONTENT)
    disk.files["f"] = CONTENT
    assert shards.content("f", 0, 20) == CONTENT[:20]


def test_the_shards_of_one_range_are_read_by_several_threads(monkeypatch):
    monkeypatch.setattr(buffers.os, "cpu_count", lambda: 2)
    disk, meet = Disk(f=CONTENT), threading.Barrier(2)
    disk.before_read = lambda *_: meet.wait(10)
    assert shards_of(disk).content("f", 0, 20) == CONTENT[:20]


HEADED = save({"a": ones(100), "b": ones(50)})


@pytest.mark.parametrize("step", [1, 3, 8, 9, 64, None])
def test_the_header_is_read_and_nothing_behind_its_shards(step):
    disk = Disk(f=HEADED)
    shards = shards_of(disk, shard_size=step)
    end = 8 + int.from_bytes(HEADED[:8], "little")
    assert shards.header("f") == HEADED[:end]
    size = step or len(HEADED)
    last = min((end - 1) // size * size + size, len(HEADED))
    assert disk.counts("f") == [n < last for n in range(len(HEADED))]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "a file of 0 bytes has no header"),
        (b"1234567", "a file of 7 bytes has no header"),
        ((1 << 40).to_bytes(8, "little"), "a header of 1099511627776 bytes; the limit"),
        ((100).to_bytes(8, "little") + b"{}", "a header of 100 bytes in a file of 10"),
    ],
)
def test_a_header_of_an_impossible_length_is_refused(content, reason):
    shards = shards_of(Disk(f=content), shard_size=4)
    with pytest.raises(VerificationError, match=f"f is not sound safetens.*{reason}"):
        shards.header("f")


def test_a_file_larger_than_the_machine_takes_no_memory_until_it_is_read():
    view = private_memory(2 * physical_memory(), reserve=False)
    assert view[-1] == 0
