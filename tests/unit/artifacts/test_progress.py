import threading

import pytest

from ztserve.artifacts import Progress, open_registry, verify_model
from ztserve.artifacts.loading import progress
from ztserve.artifacts.loading.progress import Meter
from ztserve.artifacts.publish import release_model, sign_model
from ztserve.artifacts.statements.manifest import Manifest, SignedFile
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import VerificationError


@pytest.fixture(params=[None, 64], ids=["files", "shards"])
def root(request, workshop):
    """A signed model, by whole files and in shards."""
    root = workshop.model()
    how = Serialization("sha256", request.param)
    sign_model(root, workshop.keys["trainer"], serialization=how)
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    return root


def size(root):
    names = ("config.json", "model.safetensors")
    return sum((root / name).stat().st_size for name in names)


def test_the_last_word_is_that_all_was_read_and_verified(root, workshop):
    told = []
    verify_model(root, "digits", workshop.trust, progress=told.append)
    last, total = told[-1], size(root)
    assert (last.read, last.verified, last.total) == (total, total, total)
    assert last.rate == total / last.seconds > 0


def test_what_has_another_digest_does_not_count_as_verified(root, workshop):
    total = size(root)
    with (root / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"X")
    told = []
    with pytest.raises(VerificationError, match="was changed after signing"):
        verify_model(root, "digits", workshop.trust, progress=told.append)
    assert told[-1].read == total
    assert 0 < told[-1].verified < total


def test_it_is_told_on_the_callers_thread_and_what_it_raises_ends_the_load(
    root, workshop
):
    threads = []

    def tell(_):
        threads.append(threading.current_thread())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        verify_model(root, "digits", workshop.trust, progress=tell)
    assert threads == [threading.current_thread()]


@pytest.mark.slow
def test_a_load_that_takes_long_is_told_of_at_a_bounded_rate(workshop):
    root, told = workshop.signed(), []
    held = threading.Event()
    read = open_registry(root)
    opened = read.open

    def slow(found, name):
        if name == "model.safetensors":
            held.wait(0.5)
        return opened(found, name)

    read.open = slow
    verify_model(read, "digits", workshop.trust, progress=told.append)
    assert 3 <= len(told) <= 0.5 / progress.INTERVAL_S + 3
    assert [one.read for one in told] == sorted(one.read for one in told)


def test_only_a_signed_digest_counts_as_verified():
    files = {"f": SignedFile(("a" * 64, "b" * 64), 20)}
    manifest = Manifest("sha256:" + "0" * 64, Serialization("sha256", 10), files)
    told = []
    meter = Meter(told.append, manifest)
    for name, span, digest in (
        ("f", (0, 10), "b" * 64),
        ("f", (10, 20), "a" * 64),
        ("f", (20, 30), "a" * 64),
        ("g", (0, 10), "a" * 64),
    ):
        meter.hashed(name, span, digest)
    meter.report()
    meter.hashed("f", (10, 20), "b" * 64)
    meter.report()
    assert [one.verified for one in told] == [0, 10]


def test_it_reads_well():
    progress = Progress(3 << 29, 1 << 30, 4 << 30, 2.0)
    assert str(progress) == "1.50 of 4.00 GiB read, 1.00 verified, 0.75 GiB/s"
    assert Progress(0, 0, 0, 0.0).rate == 0
