"""Attacks that hold up, fill up or flood whoever verifies: so that nothing is refused.

Each is answered, and works where its control is taken out.
"""

import fcntl
import os
import resource
import threading

import pytest

from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts import Floor, FollowedPolicy, TrustPolicy
from ztserve.artifacts.trust import floor as floors
from ztserve.artifacts.trust import signers
from ztserve.errors import ConfigError

CONTROL = pytest.mark.parametrize("control", ["on", "off"])
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change uid")


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


# --- the trust policy -----------------------------------------------------------


@CONTROL
@pytest.mark.parametrize("suffix", ["", ".sig"])
@pytest.mark.slow
def test_a_pipe_in_place_of_the_policy_does_not_hold_up_its_follower(
    workshop, monkeypatch, control, suffix
):
    """Who waits for a pipe sees no revocation, nor that the policy expires."""
    followed = FollowedPolicy(workshop.policy_path, Floor(workshop.path / "state"))
    if control == "off":
        monkeypatch.setattr(
            "ztserve.artifacts.trust.following.read_guarded",
            type(workshop.path).read_bytes,
        )
    path = workshop.policy_path.with_name(workshop.policy_path.name + suffix)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    told = []

    def look():
        try:
            told.append(followed.look())
        except (ConfigError, OSError) as error:
            told.append(str(error))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(0.5)
    if control == "on":
        said = [f"{path} is not a regular file"] if suffix == "" else [None]
        assert told == said
    else:
        assert looking.is_alive()
        path.open("wb").close()  # let it go
        looking.join()


@ROOT_ONLY
@CONTROL
def test_a_policy_that_belongs_to_somebody_else_is_refused(
    workshop, monkeypatch, control
):
    """Whoever owns a file may write it, whatever its mode says."""
    os.chown(workshop.policy_path, 12345, 12345)
    if control == "on":
        with pytest.raises(ConfigError, match=r"belongs to uid 12345.*run chown 0 "):
            TrustPolicy.load(workshop.policy_path)
    else:
        monkeypatch.setattr(signers, "check_owned", lambda *_: None)
        assert TrustPolicy.load(workshop.policy_path)


class Forgetful(FollowedPolicy):
    """Takes no policy that its node cannot remember."""

    def _take(self):
        policy = TrustPolicy.load(self._path)
        self._floor.keep(policy)
        self.policy = policy


def held_up(floor, how):
    """Keep the node from writing its floor; return how to end that."""
    if how == "locked":
        held = os.open(floor.path.with_suffix(".lock"), os.O_RDWR)
        fcntl.flock(held, fcntl.LOCK_EX)
        return lambda: os.close(held)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no byte more
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@CONTROL
@pytest.mark.parametrize("how", ["locked", "full"])
def test_a_full_disk_or_a_held_lock_does_not_undo_a_revocation(
    workshop, monkeypatch, control, how
):
    monkeypatch.setattr(floors, "LOCK_S", 0.01)
    floor = Floor(workshop.path / "state")
    kind = FollowedPolicy if control == "on" else Forgetful
    followed = kind(workshop.policy_path, floor)
    newer = workshop.write_policy(head="version = 2")
    let_go = held_up(floor, how)
    try:
        if control == "off":
            with pytest.raises(ConfigError):
                followed.look()
            let_go()
            assert followed.look() is None
            assert followed.policy.version == 1  # for good: the file is as it was
            return
        assert followed.look() == newer
        assert floor.seen().version == 1
        with pytest.raises(ConfigError, match=r"is locked by|too large: .*make room"):
            followed.look()
        assert followed.look() is None  # told once
    finally:
        if control == "on":
            let_go()
    assert followed.look() is None
    assert floor.seen().version == 2
