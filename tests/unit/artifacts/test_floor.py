import fcntl
import os

import pytest

from tests.unit.artifacts.workshop import pem, signing_key
from ztserve.artifacts import Floor, FollowedPolicy, TrustPolicy
from ztserve.artifacts.publish import sign_policy
from ztserve.artifacts.trust import floor as module
from ztserve.errors import ConfigError

ROOT = signing_key()


@pytest.fixture
def floor(tmp_path):
    return Floor(tmp_path / "state")


def version(workshop, number, *, signed=False, expires=""):
    head = f"version = {number}\n" + (f"expires = {expires}" if expires else "")
    workshop.write_policy(head=head)
    if signed:
        sign_policy(workshop.policy_path, ROOT)
        return TrustPolicy.load(workshop.policy_path, root=pem(ROOT))
    return workshop.trust


def test_a_floor_rises_and_never_falls(workshop, floor):
    old = version(workshop, 3)
    floor.keep(old)
    floor.keep(old)
    floor.keep(version(workshop, 4))
    assert floor.seen().version == 4
    assert floor.path.stat().st_mode & 0o777 == 0o600
    for refuse in (floor.check, floor.keep):
        with pytest.raises(
            ConfigError, match=r"version 3, and this node has seen version 4 .*fetch"
        ):
            refuse(old)
    assert Floor(floor.path.parent).seen().version == 4  # as a fresh replica sees it


def test_a_deployment_may_pin_the_oldest_policy(workshop, tmp_path):
    floor = Floor(tmp_path, least=5)
    with pytest.raises(ConfigError, match=r"is version 4, and .*min_policy_version"):
        floor.check(version(workshop, 4))
    floor.keep(version(workshop, 5))


def test_a_signed_version_has_one_text(workshop, floor):
    floor.keep(version(workshop, 2, signed=True))
    with pytest.raises(ConfigError, match=r"two trust policies are signed as version"):
        floor.keep(version(workshop, 2, signed=True, expires="2999-01-01T00:00:00Z"))
    floor.keep(version(workshop, 3, signed=True))


def test_an_unsigned_policy_may_be_edited_in_place(workshop, floor):
    floor.keep(version(workshop, 2))
    edited = version(workshop, 2, expires="2999-01-01T00:00:00Z")
    floor.keep(edited)
    assert floor.seen().digest == edited.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "not an object"),
        ('{"version": 1}', "'digest' is missing"),
        ('{"version": 0, "digest": "x"}', "not a version and a digest"),
        ('{"version": 1, "digest": "x", "y": 1}', "unknown field 'y'"),
        ('{"version": 1, "version": 2, "digest": "x"}', "duplicate JSON key"),
        (" " * 4097, "more than the limit of 4096"),
    ],
)
def test_a_floor_that_cannot_be_read_refuses(workshop, floor, text, message):
    floor.keep(workshop.trust)
    floor.path.write_text(text)
    with pytest.raises(ConfigError, match=rf"trust-floor.json: .*{message}.*put it"):
        floor.check(workshop.trust)


def test_a_floor_that_others_may_write_refuses(workshop, floor):
    floor.keep(workshop.trust)
    floor.path.chmod(0o622)
    with pytest.raises(ConfigError, match="chmod go-w"):
        floor.check(workshop.trust)


def test_a_floor_that_leads_nowhere_is_not_none_at_all(workshop, floor):
    floor.path.parent.mkdir()
    floor.path.symlink_to("gone")
    with pytest.raises(ConfigError, match="cannot be read"):
        floor.check(workshop.trust)


def test_a_floor_is_kept_by_one_at_a_time(workshop, floor, monkeypatch):
    monkeypatch.setattr(module, "LOCK_S", 0.02)
    floor.keep(workshop.trust)
    with floor.path.with_suffix(".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is locked by another process"):
            floor.keep(workshop.trust)


def test_a_folder_that_cannot_be_written_is_told(workshop, tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ConfigError, match="make the folder writable"):
        Floor(tmp_path / "state").keep(workshop.trust)


# --- following ------------------------------------------------------------------


def followed(workshop, floor, **more):
    return FollowedPolicy(workshop.policy_path, floor, **more)


def test_a_change_is_taken_once(workshop, floor):
    policy = followed(workshop, floor)
    assert policy.look() is None
    workshop.policy_path.touch()
    assert policy.look() is None
    newer = version(workshop, 2)
    assert policy.look() == newer
    assert policy.look() is None
    assert (policy.policy, floor.seen().version) == (newer, 2)


def test_what_cannot_be_taken_is_told_once_and_the_last_good_one_holds(workshop, floor):
    good = version(workshop, 2)
    policy = followed(workshop, floor)
    for spoil, message in (
        (lambda: version(workshop, 1), "has seen version 2"),
        (lambda: workshop.policy_path.write_text("nonsense"), "not TOML"),
        (workshop.policy_path.unlink, "cannot be read"),
    ):
        spoil()
        with pytest.raises(ConfigError, match=message):
            policy.look()
        assert policy.look() is None
        assert policy.policy == good
    newest = version(workshop, 3)
    assert policy.look() == newest


def test_a_signature_that_comes_after_its_policy_is_seen(workshop, floor):
    version(workshop, 1, signed=True)
    root = workshop.path / "root.pub"
    root.write_text(pem(ROOT))
    policy = followed(workshop, floor, root=root)
    version(workshop, 2)
    with pytest.raises(ConfigError, match="signs another text"):
        policy.look()
    sign_policy(workshop.policy_path, ROOT)
    assert policy.look().version == 2


def test_no_file_is_left_behind(workshop, floor, monkeypatch):
    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match=r"No space left on device: .* make room"):
        floor.keep(workshop.trust)
    assert [path.name for path in floor.path.parent.iterdir()] == ["trust-floor.lock"]
