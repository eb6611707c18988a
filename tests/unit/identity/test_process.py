import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ztserve.errors import IdentityError
from ztserve.identity import private_directory
from ztserve.identity.process import check_private

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_a_hardened_process_is_not_dumpable_and_leaves_no_core():
    program = (
        "import resource; from ztserve.identity import harden_process, is_dumpable;"
        "print(is_dumpable()); harden_process(); harden_process();"
        "print(is_dumpable(), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.split("\n")[:2] == ["True", "False (0, 0)"]


def test_a_private_directory_is_made_once_and_found_again(temporary):
    made = private_directory("some/state")
    assert made == private_directory(Path("some/state").absolute())
    assert made != private_directory("some/other")
    assert made.parent == temporary
    assert made.name.startswith(f"ztserve-{os.geteuid()}-")
    assert made.stat().st_mode & 0o777 == 0o700
    assert len(made.name) < 40


def test_a_directory_that_others_can_enter_is_refused():
    private_directory("state").chmod(0o750)
    with pytest.raises(IdentityError, match="mode 0750, expected 0700"):
        private_directory("state")


def test_a_link_or_a_file_in_its_place_is_refused(temporary):
    made = private_directory("state")
    made.rmdir()
    (temporary / "elsewhere").mkdir(mode=0o700)
    made.symlink_to(temporary / "elsewhere")
    with pytest.raises(IdentityError, match="is not a directory"):
        private_directory("state")
    made.unlink()
    made.touch()
    with pytest.raises(IdentityError, match="is not a directory"):
        private_directory("state")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_owner_is_refused():
    os.chown(private_directory("state"), 12345, 12345)
    with pytest.raises(IdentityError, match="belongs to uid 12345"):
        private_directory("state")


def test_a_directory_that_cannot_be_made_or_is_not_there_says_so(
    temporary, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "none"))
    with pytest.raises(IdentityError, match="No such file"):
        private_directory("state")
    with pytest.raises(IdentityError, match="No such file"):
        check_private(temporary / "none")
