import json
import sys

import pytest

from ztserve import config
from ztserve.audit import Log
from ztserve.cli import show
from ztserve.errors import Denied


def test_config_show_names_each_setting_and_where_it_came_from(ztserve, project):
    done = ztserve("config", "show")
    rows = [line.split("\t") for line in done.out.splitlines()]
    table = {name: (value, where) for name, value, where in rows}
    file = str(project / "ztserve.toml")
    assert table["profile"] == ("development", file)
    assert table["directory.port"] == ("7443", file)
    assert table["transport.max_in_flight"] == ("128", "default")


def test_config_show_as_json(ztserve, project):
    told = json.loads(ztserve("config", "show", "--json").out)
    assert told["gateway.port"] == 8443
    assert told["audit.directory"] == str(project / ".ztserve/audit")


def test_config_show_without_a_file_shows_the_defaults(ztserve, empty):
    told = json.loads(ztserve("config", "show", "--json").out)
    assert told["authorization.policies"] == []


@pytest.fixture
def log(project):
    """A log as a replica leaves it."""
    path = config.load().audit.directory / "digits-r1.jsonl"
    with Log(path, origin={"service": "digits"}) as log:
        log.event("replica-started", address="127.0.0.1:1")
        log.refused(
            "/x", Denied("no", "why"), principal="spiffe://a/b", address="::1:5"
        )
    return path


def test_audit_show_prints_each_record_on_a_line(ztserve, log):
    done = ztserve("audit", "show")
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["seq"] for record in records] == [1, 2, 3]
    assert [r.get("activity_name") for r in records] == [
        "log-opened",
        "replica-started",
        None,
    ]
    assert records[2]["status_detail"] == "why"
    assert ztserve("audit", "show", log).out == done.out


def test_audit_verify_says_self_consistent_and_no_more(ztserve, log):
    done = ztserve("audit", "verify")
    assert done.code == 0
    file, status, records, message = done.out.strip().split("\t")
    assert (file, status, records) == (str(log), "self-consistent", "3")
    assert "no key and no outside checkpoint was checked" in message
    (told,) = json.loads(ztserve("audit", "verify", "--json").out)
    assert (told["status"], told["records"]) == ("self-consistent", 3)


def test_a_log_that_was_edited_is_code_1(ztserve, log):
    log.write_text(log.read_text().replace('"why"', '"wha"'))
    log.write_text(log.read_text().replace("127.0.0.1:1", "127.0.0.1:2"))
    done = ztserve("audit", "verify")
    assert done.code == 1
    assert "broken" in done.out
    assert "line" in done.out


@pytest.mark.parametrize("action", ["show", "verify"])
def test_no_log_at_all_is_not_all_well(ztserve, project, action):
    done = ztserve("audit", action)
    assert (done.code, done.out) == (2, "")
    assert "there is no audit log in" in done.err
    done = ztserve("audit", action, "nowhere.jsonl")
    assert done.code == 2
    assert "there is no such file" in done.err


class Terminal:
    """A stdout that says it is a terminal."""

    def __init__(self, below):
        self.below = below

    def isatty(self):
        return True

    def __getattr__(self, name):
        return getattr(self.below, name)


def test_a_table_on_a_terminal_shows_cells_as_they_are(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    show.table("title", ("a", "b"), [("[bold]x", "\x1b[2Jy")])
    drawn = capsys.readouterr().out
    assert "[bold]x" in drawn
    assert "\ufffd[2Jy" in drawn


def test_a_digest_in_a_table_is_folded_and_never_cut(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    monkeypatch.setenv("COLUMNS", "40")
    digest = "0123456789abcdef" * 4
    show.table("", ("what", "digest"), [("model", digest)])
    drawn = capsys.readouterr().out
    lines = [line.split("│")[2].strip() for line in drawn.splitlines() if "│" in line]
    assert "".join(lines) == digest


def test_a_table_in_a_pipe_is_separated_by_tabs(capsys):
    show.table("title", ("a", "b"), [(1, None), ("x\x1b", "y")])
    assert capsys.readouterr().out == "1\tNone\nx\ufffd\ty\n"


@pytest.mark.parametrize(
    ("terminal", "shown"),
    [(False, "a\t1\nlong\t\ufffdx\n"), (True, "a     1\nlong  \ufffdx\n")],
)
def test_facts_stand_in_a_line_each_and_drive_no_terminal(
    capsys, monkeypatch, terminal, shown
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show.facts([("a", 1), ("long", "\x1bx")])
    assert capsys.readouterr().out == shown


def test_a_fact_is_never_cut_off(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show.facts([("digest", "0" * 300)])
    assert "0" * 300 in capsys.readouterr().out
