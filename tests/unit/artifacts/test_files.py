import os
from pathlib import Path

import pytest

from ztserve.artifacts.registry.files import list_files, open_file, read_file
from ztserve.errors import RegistryError, VerificationError


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_is_read_by_ranges(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_bytes(b"0123456789")
    with open_file(tmp_path, "a/b") as reader:
        assert reader.size == 10
        buffer = bytearray(4)
        assert reader.read_into(memoryview(buffer), 8) == 2
        assert buffer[:2] == b"89"
        assert reader.read_into(memoryview(buffer), 10) == 0


def test_listing_gives_every_file_with_its_size(tmp_path):
    (tmp_path / "a/.b").mkdir(parents=True)
    (tmp_path / "a/.b/c").write_bytes(b"123")
    (tmp_path / "d").write_bytes(b"")
    assert list_files(tmp_path) == {"a/.b/c": 3, "d": 0}


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")
    before = open_descriptors()
    read_file(tmp_path, "a", limit=1)
    for name in ("link", "a/b", "nowhere", "nowhere/b"):
        with pytest.raises((VerificationError, FileNotFoundError)):
            open_file(tmp_path, name)
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["link", "folder-link/x", "fifo", "folder"])
def test_what_is_no_regular_file_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder-link").symlink_to("folder")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(VerificationError, match="symbolic link or special file"):
        open_file(tmp_path, name)
    with pytest.raises(VerificationError, match="symbolic link or special file"):
        list_files(tmp_path)


def test_a_file_over_the_limit_is_refused_unread(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(RegistryError, match="has 5 bytes, more than the 4 allowed"):
        read_file(tmp_path, "a", limit=4)


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ztserve.artifacts.registry.files.MAX_ENTRIES", 2)
    for name in "abc":
        (tmp_path / name).touch()
    with pytest.raises(VerificationError, match="more than 2 files and folders"):
        list_files(tmp_path)
    for name in "abc":
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    with pytest.raises(VerificationError, match="more than 2 files and folders"):
        list_files(tmp_path)


def test_folders_too_deep_are_refused(tmp_path):
    (tmp_path / ("a/" * 20)).mkdir(parents=True)
    with pytest.raises(VerificationError, match="lies too deep"):
        list_files(tmp_path)


def test_a_folder_that_vanished_is_a_registry_error(tmp_path):
    with pytest.raises(RegistryError, match=r"there is no folder .*nowhere"):
        list_files(tmp_path / "nowhere")


def test_storage_that_fails_is_a_registry_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RegistryError, match="cannot be read: Not a directory"):
        open_file(tmp_path / "file", "x")
