"""bench.share: real processes, real memory, all figures."""

import json
import sys

import pytest

from bench import share


@pytest.mark.slow
def test_the_second_replica_adds_no_copy(tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "figures.json"
    arguments = ["share", "--mib", "128", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    share.main()
    rows = json.loads(path.read_text())
    found = {(r["case"], r["arm"], r["metric"]): r["value"] for r in rows}
    for case in ("1 file", "4 files"):
        for arm in share.ARMS:
            assert 0.8 < found[case, arm, "memory"] < 1.3
            assert found[case, arm, "without touching"] < found[case, arm, "seconds"]
        assert found[case, "broker", "start"] > 0
    assert "(goal 0.1)" in capsys.readouterr().out
