import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ztserve
from ztserve.cli import VERBS, main
from ztserve.cli.printing import printable

HOME = Path(ztserve.__file__).parents[1]


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_a_module_of_its_name(verb):
    module = importlib.import_module(f"ztserve.cli.{verb}")
    assert f"ztserve {verb}" in module.__doc__
    assert callable(module.arguments)
    assert callable(module.run)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_tells_how_it_is_used(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert VERBS[verb] in told


@pytest.mark.parametrize("verb", VERBS)
def test_each_argument_of_a_verb_has_a_help_text(verb):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"ztserve.cli.{verb}").arguments(parser)
    mute = [action.dest for action in parser._actions if not action.help]
    assert [name for name in mute if name != "action"] == []


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("verify", "deploy: as a deployer, before there is one (default: load)"),
        ("verify", "the trust policy to judge by"),
        ("predict", "how long the call may take, all tries together (default: 30)"),
        ("publish", "a model that its trainer signed"),
    ],
)
def test_the_help_of_a_verb_says_what_is_meant(verb, said, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert said in " ".join(capsys.readouterr().out.split())


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out.replace("\n  ", " \n  ")
    assert all(f"\n    {verb} " in told for verb in VERBS)


def test_without_a_word_each_verb_is_told_in_a_line(ztserve):
    done = ztserve()
    assert (done.code, done.out) == (2, "")
    usage, *lines = done.err.splitlines()
    assert usage.startswith("usage: ztserve VERB")
    assert [line.split(maxsplit=1) for line in lines] == [[*v] for v in VERBS.items()]


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ztserve {ztserve.__version__}\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--"], "the following arguments are required: verb"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["--insecure", "init"], "unrecognized arguments: --insecure"),
        (["init", "a", "b"], "unrecognized arguments: b"),
        (["key"], "required: action, path"),
        (["key", "old", "x.pem"], "invalid choice: 'old'"),
        (["key", "new", "x.pem", "--role", "king"], "invalid choice: 'king'"),
        (["sign"], "required: directory"),
        (["verify"], "required: model"),
        (["verify", "digits", "--for", "fun"], "invalid choice: 'fun'"),
        (["publish", "directory"], "required: model"),
        (["svid", "read", "x"], "invalid choice: 'read'"),
        (["agent", "start"], "invalid choice: 'start'"),
        (["audit", "delete"], "invalid choice: 'delete'"),
        (["config", "set"], "invalid choice: 'set'"),
        (["predict", "x", "--timeout-s", "0"], "0: expected a positive number"),
        (["predict", "x", "--timeout-s", "nan"], "nan: expected a positive number"),
        (["predict", "x", "--timeout-s", "soon"], "invalid _seconds value: 'soon'"),
    ],
)
def test_bad_arguments_end_with_usage_and_code_2(words, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("usage: ztserve")
    assert complaint in told.err


def test_a_refusal_is_one_sentence_and_code_2(ztserve, empty):
    (empty / "ztserve.toml").write_text("nonsense = 1")
    (empty / "ztserve.toml").chmod(0o600)
    done = ztserve("config", "show")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"ztserve config: {empty}/ztserve.toml: 'nonsense' is")
    assert done.err.count("\n") == 1


def test_a_file_that_cannot_be_had_is_one_sentence_too(ztserve, project):
    done = ztserve("predict", "x", "--input", "pixels=@nowhere.json")
    assert (done.code, done.out) == (2, "")
    assert "No such file or directory: 'nowhere.json'" in done.err
    assert done.err.count("\n") == 1


def test_an_interrupt_is_code_130(ztserve, empty, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ztserve.config.load", interrupted)
    assert ztserve("config", "show").code == 130


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(project):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "ztserve.cli", "config", "show"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            cwd=HOME,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_could_drive_a_terminal_is_not_printed():
    text = "a\x1b[2Jb\x07c\r\x9bd\u202ee\tf\ng é ✓"
    assert printable(text) == "a\ufffd[2Jb\ufffdc\ufffd\ufffdd\ufffde\tf\ng é ✓"


def test_help_needs_none_of_the_rooms():
    """So that it comes at once: no numpy, no cryptography, no gRPC."""
    code = """
import sys, time, ztserve.cli
try:
    ztserve.cli.main(["--help"])
except SystemExit:
    pass
heavy = {"numpy", "cryptography", "grpc", "ray", "torch", "rich", "yaml"}
print(time.process_time(), *sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=HOME,
        check=True,
    )
    seconds, *imported = done.stdout.splitlines()[-1].split()
    assert imported == []
    assert float(seconds) < 0.4


def test_without_a_project_the_refusal_says_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZTSERVE_CONFIG", raising=False)
    assert main(["sign", "weights"]) == 2
    assert "run `ztserve init`" in capsys.readouterr().err


def test_with_nothing_running_a_call_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    monkeypatch.delenv("ZTSERVE_CONFIG", raising=False)
    assert main(["init"]) == 0
    began = time.monotonic()
    assert main(["svid", "write", "here"]) == 2
    assert time.monotonic() - began < 5
    assert "start it: `ztserve run" in capsys.readouterr().err


def test_a_mistake_in_a_policy_shows_before_ray_is_started(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZTSERVE_CONFIG", raising=False)
    assert main(["init"]) == 0
    policy = tmp_path / "policies/developer.yaml"
    policy.write_text(policy.read_text().replace("principals:", "principles:", 1))
    (tmp_path / "anything.py").write_text("app = object()\n")
    assert main(["run", "anything:app"]) == 2
    told = capsys.readouterr()
    assert "principles" in told.err
    assert "starting Ray" not in told.out


@pytest.mark.parametrize(
    ("setting", "text", "complaint"),
    [
        ("entries", "[[entry]]\nx = 1\n", "'x' is not a known key"),
        ("federation", "[[federation]]\nx = 1\n", "federation"),
    ],
)
def test_a_mistake_in_the_agents_files_shows_before_ray_is_started(
    tmp_path, monkeypatch, capsys, setting, text, complaint
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZTSERVE_CONFIG", raising=False)
    assert main(["init"]) == 0
    (tmp_path / "file.toml").write_text(text)
    toml = tmp_path / "ztserve.toml"
    named = f"[identity]\n{setting} = 'file.toml'"
    toml.write_text(toml.read_text().replace("[identity]", named, 1))
    (tmp_path / "anything.py").write_text("app = object()\n")
    assert main(["run", "anything:app"]) == 2
    told = capsys.readouterr()
    assert "file.toml" in told.err
    assert complaint in told.err
    assert "starting Ray" not in told.out
