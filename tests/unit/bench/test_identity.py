"""bench.identity: every arm judges the same certificates, and well."""

import json

import pytest

from bench import identity
from ztserve.types import Peer


def test_every_arm_does_its_work() -> None:
    for (case, arm), call in identity.arms().items():
        value = call()
        if arm == "ztserve" and case != "SPIFFE ID":
            assert isinstance(value, Peer)
            assert value.id == identity.ME
        elif arm == "cryptography":
            assert len(value.chain) == 2 + (case == "via intermediate")
        elif arm == "spiffe" and case != "SPIFFE ID":
            assert str(value.spiffe_id) == identity.ME


def test_a_ratio_says_how_many_times_as_fast() -> None:
    medians = {("new", "ztserve"): 100.0, ("new", "spiffe"): 1000.0}
    assert identity.ratio(medians, "new", "ztserve", "spiffe") == "10x"
    assert identity.ratio(medians, "new", "spiffe", "spiffe") == "-"
    assert identity.ratio(medians, "new", "ztserve", "pyOpenSSL") == "-"


@pytest.mark.slow
def test_the_table_and_the_file_hold_each_arm(tmp_path, capsys) -> None:
    path = tmp_path / "figures.json"
    assert identity.main(["--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert {row["arm"] for row in rows} == {"ztserve", *identity.BASES}
    assert all(row["value"] > 0 for row in rows)
    said = capsys.readouterr().out
    assert "via intermediate" in said
    assert "the goal is 150 us" in said
