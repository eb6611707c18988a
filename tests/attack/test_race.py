"""A racing writer: what is loaded is what was signed, or nothing is.

`python -m tests.attack.race 10000` is the long version.
"""

import pytest

from tests.attack.race import SHARD, prepare, race
from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts import verify_model
from ztserve.artifacts.loading import loader
from ztserve.artifacts.statements.serialization import Serialization

TURNS = 600


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True], ids=["private", "sealed"])
@pytest.mark.parametrize("shard_size", [None, SHARD], ids=["files", "shards"])
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_a_racing_process_gets_no_wrong_byte_accepted(
    workshop, monkeypatch, shard_size, checked, sealed
):
    root = prepare(workshop, Serialization("sha256", shard_size))
    if not checked:
        monkeypatch.setattr(loader, "check_digests", lambda *_: None)
    for _ in range(10):  # that a wrong one gets in is likely, but a matter of chance
        result = race(root, workshop.trust, TURNS, sealed=sealed)
        if checked or result.wrong:
            break
    assert result.refused  # the writer did get in the way
    assert bool(result.wrong) != checked
    assert verify_model(root, "digits", workshop.trust)  # it left all as it was
