import hashlib

import pytest

from ztserve.artifacts.loading.buffers import read_all
from ztserve.errors import RegistryError, VerificationError


class Memory:
    """A Reader over bytes, that fails or stops short on request."""

    def __init__(self, content, *, size=None, error=None, step=None):
        self.content, self.error, self.step = content, error, step
        self.size = len(content) if size is None else size

    def read_into(self, view, offset):
        if self.error:
            raise self.error
        chunk = self.content[offset : offset + (self.step or len(view))]
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
    assert buffer.sha256 == hashlib.sha256(content).hexdigest()
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
