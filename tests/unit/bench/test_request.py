"""bench.request and what it rests on: figures must not come out of broken runs."""

import json
import os
import subprocess
import sys

import pytest

from bench import report, request
from bench.generators import (
    CASES,
    Arm,
    LoadError,
    Sample,
    cpu_s,
    family,
    grpc_frame,
    require_tools,
)
from bench.session import listeners


def sample(rps: float) -> Sample:
    return Sample(rps, 1.0, 2.0, 0.5, 0.1, 0.0)


def test_a_message_is_framed_as_grpc_does() -> None:
    assert grpc_frame(b"abc") == b"\x00\x00\x00\x00\x03abc"


def test_http_has_no_case_with_32_calls_on_one_connection() -> None:
    http = Arm("a", "http", "127.0.0.1:1", "/", "", 1, (1,))
    grpc = Arm("a", "grpc", "127.0.0.1:1", "/", "", 1, (1,))
    assert [case for case in CASES if http.takes(case)] == ["1x1", "32x1"]
    assert [case for case in CASES if grpc.takes(case)] == ["1x1", "32x1", "1x32"]


def test_cpu_counts_the_descendants_of_a_server() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(30)"]
    with subprocess.Popen(sleep) as child:
        assert child.pid in family([os.getpid()])
        child.kill()


def test_a_server_that_is_gone_is_not_measured() -> None:
    with subprocess.Popen(["/bin/true"]) as gone:
        pass
    with pytest.raises(LoadError, match=f"server process {gone.pid} is gone"):
        cpu_s([gone.pid])


def test_a_missing_generator_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LoadError, match=r"h2load, wrk, cc.* apt-get install"):
        require_tools()


def test_a_port_without_listener_has_no_processes() -> None:
    assert listeners(1) == ()


def test_figures_are_medians_and_ratios_name_what_they_compare() -> None:
    samples = {
        ("ztserve", "1x32"): [sample(90), sample(100), sample(400)],
        ("serve-http", "32x1"): [sample(10)],
        ("serve-grpc", "1x32"): [sample(50)],
    }
    figures = request.summary(samples)
    assert figures["ztserve", "1x32"]["rps"] == 100
    assert request.ratio(figures, "ztserve", "1x32", "serve-http") == "10x*"
    assert request.ratio(figures, "ztserve", "1x32", "serve-grpc") == "2x"
    assert request.ratio(figures, "ztserve", "1x32", "serve-haproxy") == "-"


def test_the_file_holds_one_row_a_metric(tmp_path) -> None:
    rows = request.as_rows({("ztserve", "1x1"): [sample(7)]})
    report.write(str(tmp_path / "out"), rows)
    written = json.loads((tmp_path / "out").read_text())
    assert written[0] == {
        "arm": "ztserve",
        "case": "1x1",
        "metric": "rps",
        "value": 7,
        "unit": "1/s",
    }
    assert {row["metric"] for row in written} == {"rps", "p50_ms", "p99_ms", "cpu_ms"}


def test_an_unknown_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        request.main(["--arms", "nonsense"])
    assert "no such arm: nonsense" in capsys.readouterr().err


@pytest.mark.slow
def test_every_room_has_its_row(tmp_path) -> None:
    # In a process of its own: the bench sets torch's threads.
    command = [sys.executable, "-m", "bench.stages", "--quick", "--json"]
    subprocess.run([*command, tmp_path / "out"], check=True, timeout=120)
    rows = json.loads((tmp_path / "out").read_text())
    assert all(row["value"] > 0 for row in rows)
    assert {row["metric"] for row in rows} >= {
        "authorization",
        "decode",
        "validation",
        "model",
        "filtering",
        "audit",
        "encode",
    }
