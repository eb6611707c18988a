"""A replica of profile production, and its deployment bundle."""

import pytest

from tests.unit.serving.shop import POLICY, Shop, shop
from ztserve.errors import ConfigError, VerificationError

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


def test_in_development_a_bundle_holds_where_there_is_one(shop):
    """Where there is none, nothing is demanded; one that is there is no ornament."""
    toml = shop.folder / "ztserve.toml"
    toml.write_text(toml.read_text().replace('"production"', '"development"'))
    shop.sign()
    with shop.replica() as replica:
        assert replica.signed.signed.sequence == 2
    shop.write("policies/callers.yaml", POLICY.format(caller="stranger"))
    with pytest.raises(VerificationError, match=r"file policies.callers[.]yaml is"):
        shop.make(name="r2")
    shop.bundle.unlink()
    with shop.replica(name="r3") as replica:
        assert replica.signed is None
        assert "metadata" not in shop.records()[-1]
