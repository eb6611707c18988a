"""A replica of profile production, and its deployment bundle."""

import pytest

from tests.unit.serving.shop import Shop, shop
from ztserve.errors import ConfigError

pytestmark = pytest.mark.slow
__all__ = ["shop"]


def test_a_replica_runs_what_was_signed(shop):
    with shop.replica() as replica:
        assert shop.call(replica) == 2.0
    events = [r for r in shop.records() if r["class_uid"] == 6002]
    (told,) = [e for e in events if e["activity_name"] == "deployment-verified"]
    assert told["unmapped"]["application"] == "shopping:app"
    assert told["unmapped"]["digest"] == replica.signed.digest


def test_each_record_bears_the_bundles_digest(shop):
    with shop.replica() as replica:
        shop.call(replica)
    first, *others = shop.records()
    assert first["activity_name"] == "log-opened"
    label = f"deployment:{replica.signed.digest}"
    assert {tuple(r["metadata"]["labels"]) for r in others} == {(label,)}
    assert {r["class_uid"] for r in others} == {6002, 6003}


def test_production_serves_nothing_without_a_bundle(tmp_path, monkeypatch):
    made = Shop(tmp_path, monkeypatch)
    with pytest.raises(
        ConfigError, match=r"there is no deployment bundle .*bundle sign"
    ):
        made.make()
