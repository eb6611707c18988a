"""bench.rotation: a soak that cannot fail would show nothing."""

import json

import pytest

from bench import rotation, tally
from bench.tally import Call, Restart, Run, Seen


def seen(at: float, serial: str, *authorities: str, lives_s: float = 20) -> Seen:
    return Seen(at, serial, at + lives_s, authorities)


def unary(end: float, error: str = "", *, begin: float | None = None) -> Call:
    return Call("unary", end - 0.01 if begin is None else begin, end, error)


def stream(begin: float, end: float, error: str = "Interrupted: cut") -> Call:
    return Call("stream", begin, end, error)


def made(
    *calls: Call,
    callers: tuple[Seen, ...] = (seen(0, "1", "A"),),
    servers: tuple[tuple[Seen, ...], ...] = ((seen(0, "9", "A", lives_s=100),),),
    restart: Restart | None = None,
) -> Run:
    return Run(0.0, 60.0, calls, callers, servers, restart)


def outcomes(run: Run) -> list[str]:
    return [outcome for _, outcome in run.outcomes()]


def test_a_failed_call_fails_the_run():
    run = made(unary(5), stream(5, 19, error=""), unary(6, "Unavailable: no"))
    assert outcomes(run) == ["answered", "answered", "failed"]
    assert tally.shortcomings(run, rotations=0, rollovers=0) == [
        "1 unary calls failed outside the restart window"
    ]


def test_a_run_that_answers_nothing_fails():
    assert tally.shortcomings(made(), rotations=0, rollovers=0) == [
        "no unary call was answered",
        "no stream call was answered",
    ]


def test_the_restart_excuses_what_fails_until_a_second_after_the_first_answer():
    run = made(
        unary(29.9, "before"),
        unary(30.5, "while it ended"),
        unary(32.0),
        unary(32.9, "soon after"),
        unary(33.1, "after"),
        restart=Restart(30, 31, 31.5),
    )
    assert run.window() == (30, 33)
    assert outcomes(run) == ["failed", "restart", "answered", "restart", "failed"]


def test_an_answer_of_the_old_server_does_not_end_the_window():
    run = made(unary(30.5), unary(31.2, begin=30.9), restart=Restart(30, 31, 31.5))
    assert run.window() == (30, 41.5)


def test_callers_who_do_not_find_back_are_not_excused():
    run = made(unary(41.4, "away"), unary(41.6, "away"), restart=Restart(30, 31, 31.5))
    assert outcomes(run) == ["restart", "failed"]


def test_a_stream_that_outlives_the_servers_svid_is_cut_by_design_too():
    servers = ((seen(0, "8", "A", lives_s=10), seen(5, "9", "A", lives_s=20)),)
    run = made(
        stream(4, 10.5),
        stream(6, 10.5),  # on a connection of before the renewal
        stream(10.1, 11),
        stream(6, 18),
        unary(10.5, "Interrupted: cut"),
        servers=servers,
    )
    assert outcomes(run) == ["expired", "expired", *["failed"] * 3]


def test_a_stream_that_outlives_its_svid_is_cut_by_design_and_no_other_call():
    callers = (seen(0, "1", "A"), seen(10, "2", "A"))
    run = made(
        stream(9, 20.2),
        stream(10.5, 20.2),  # on the connection of the SVID before
        stream(12.5, 20.2),
        stream(9, 15),
        stream(9, 25),
        Call("unary", 9, 20.2, "Unauthenticated: expired"),
        callers=callers,
    )
    assert outcomes(run) == ["expired", "expired", *["failed"] * 4]


def test_a_stream_that_is_broken_off_when_a_root_is_withdrawn_is_counted_apart():
    callers = (seen(0, "1", "A", "B", lives_s=60), seen(10, "2", "B", lives_s=60))
    run = made(stream(9, 10.6), stream(9, 14), stream(10.1, 10.6), callers=callers)
    assert outcomes(run) == ["distrusted", "failed", "failed"]


def test_rotations_and_rollovers_are_counted_on_both_sides():
    run = made(
        callers=(seen(0, "1", "A"), seen(10, "2", "A", "B"), seen(20, "3", "B")),
        # The first SVID of another process is no rotation; a root may go meanwhile.
        servers=((seen(0, "4", "A"), seen(9, "5", "A", "B")), (seen(30, "6", "B"),)),
    )
    assert run.rotations() == {"callers": [10, 20], "server": [9]}
    assert run.rollovers() == {"callers": [20], "server": [30]}
    assert tally.shortcomings(run, rotations=2, rollovers=2)[2:] == [
        "1 rotations seen by the server, expected 2",
        "1 rollovers seen by the callers, expected 2",
        "1 rollovers seen by the server, expected 2",
    ]


def test_latencies_leave_out_failures_and_whatever_the_restart_touched():
    run = made(
        unary(1.1, begin=1),
        unary(-0.5, begin=-1),
        unary(2, "failed"),
        unary(30.2, begin=29.9),
        unary(32),
        stream(1, 9, error=""),
        restart=Restart(30, 31, 31.5),
    )
    assert run.latencies_ms() == pytest.approx([100])


def test_a_plot_has_a_column_for_each_part_of_the_run(capsys):
    run = made(unary(5), unary(6, "Unavailable: no [really]"), unary(59.9))
    rotation.plot(run, "a run")
    rotation.tell_errors(run)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("failed"))
    assert line.split()[2] == "·" * 5 + "1" + "·" * 44
    assert "failed, unary, 1 times: 6.0 s Unavailable: no [really]" in said


@pytest.mark.slow
def test_nothing_fails_in_half_a_minute_of_rotation(tmp_path, capsys):
    path = tmp_path / "figures.json"
    half = ("--seconds", "30", "--baseline-seconds", "0")
    code = rotation.main(["--quick", *half, "--json", str(path)])
    said = capsys.readouterr().out
    assert code == 0, said
    rows = json.loads(path.read_text())
    found = {row["metric"]: row["value"] for row in rows if row["case"] == "soak"}
    assert found["failed"] == 0
    assert found["answered"] > 1000
    for side in ("callers", "server"):
        assert found[f"rotations, {side}"] >= 30 / 10
        assert found[f"rollovers, {side}"] >= 1
    assert "every call outside the restart window was answered" in said


@pytest.mark.slow
def test_a_soak_whose_agent_goes_away_fails():
    plan = rotation.Plan(
        seconds=8,
        lifetime_s=3,
        restart=False,
        callers=4,
        streams=2,
        stream_s=1,
        agent_ends_s=1,
    )
    run = rotation.run(plan)
    (missing,) = [one for one in tally.failures(run) if "unary" in one]
    assert missing.endswith("unary calls failed outside the restart window")
    assert any("IdentityError" in call.error for call in run.calls)
    assert any(not call.error for call in run.calls)
