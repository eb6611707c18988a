"""What `ztserve run` refuses before Ray starts, and where `status` looks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ztserve import config
from ztserve.errors import ConfigError
from ztserve.serving.running import check_free, claimed, noted_address

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's

ROOT = Path(__file__).parents[3]
DOUBLE = """
from ztserve import ModelRef, TensorSpec, ZTDeployment

class Double(ZTDeployment):
    model = ModelRef("double")
    inputs = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)

    def load(self, model): ...

    def predict(self, x):
        return x

app = Double.bind()

class Outer(Double):
    model = ModelRef("outer:3")

    def __init__(self, inner): ...

outer = Outer.bind(app)

def built(args):
    return app
"""


@pytest.fixture
def module(project, monkeypatch):
    """The name of a module with applications, in the project."""
    name = f"double_{project.name.replace('-', '_')}"
    (project / f"{name}.py").write_text(DOUBLE)
    monkeypatch.syspath_prepend(str(project))
    return name


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Double", "the class Double"),
        ("built", "a function"),
        ("ModelRef", "the class ModelRef"),
    ],
)
def test_what_was_not_bound_is_refused_by_what_it_is(module, ztserve, name, what):
    done = ztserve("run", f"{module}:{name}")
    assert done.code == 2
    assert f"{what}: expected what `bind` of a ZTDeployment returns" in done.err
    assert "starting Ray" not in done.out


def test_a_model_that_is_not_published_is_refused_before_ray_starts(module, ztserve):
    done = ztserve("run", f"{module}:app")
    assert done.code == 2
    assert "there is no registry" in done.err
    assert "`ztserve publish` makes one" in done.err
    assert "starting Ray" not in done.out


def test_so_is_that_of_what_is_bound_to_another(module, published, ztserve, capsys):
    done = ztserve("run", f"{module}:outer")
    assert done.code == 2
    assert "has no model 'outer': publish it with `ztserve publish FOLDER" in done.err
    assert "starting Ray" not in done.out


def test_a_version_that_is_not_there_is_refused_with_those_that_are(
    module, published, ztserve
):
    text = DOUBLE.replace('"double"', '"double:7"')
    (config.load().base / f"{module}_7.py").write_text(text)
    done = ztserve("run", f"{module}_7:app")
    assert done.code == 2
    assert "has no double:7; it has double:1" in done.err


def test_a_second_run_of_a_project_is_refused_and_takes_nothing_from_the_first(
    module, published, ztserve
):
    settings = config.load()
    with claimed(settings) as note:
        note("127.0.0.1:6379")
        done = ztserve("run", f"{module}:app")
        assert done.code == 2
        assert "is being served already: see it with `ztserve status`" in done.err
        assert done.out == ""
        assert noted_address(settings) == "127.0.0.1:6379"


def test_to_ask_whether_a_project_is_free_changes_nothing(project):
    settings = config.load()
    check_free(settings)
    assert not (settings.state / "cluster").exists()
    (settings.state / "cluster").write_text("as it was")
    check_free(settings)
    assert (settings.state / "cluster").read_text() == "as it was"
    with claimed(settings), pytest.raises(ConfigError, match="being served already"):
        check_free(settings)


def test_what_a_killed_process_has_noted_counts_no_more(project):
    settings = config.load()
    with claimed(settings) as note:
        note("127.0.0.1:6379")
    assert (settings.state / "cluster").read_text() == "127.0.0.1:6379"
    assert noted_address(settings) is None


def test_the_note_is_no_link_elsewhere(project):
    settings = config.load()
    (project / "precious").write_text("kept")
    settings.state.mkdir(exist_ok=True)
    (settings.state / "cluster").symlink_to(project / "precious")
    with pytest.raises(OSError, match="symbolic links"), claimed(settings):
        pass
    assert (project / "precious").read_text() == "kept"


def status(*words):
    """Ask in a process of its own, as Ray is one to a process."""
    return subprocess.run(
        [sys.executable, "-m", "ztserve.cli", "status", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_status_names_the_project_that_nobody_serves(project):
    """Whatever else runs on this machine."""
    done = status()
    assert f"the project of {project}" in done.stderr
    assert (done.returncode == 2) == ("nothing serves the project" in done.stderr)


def test_status_of_an_address_where_nobody_answers_names_it(project):
    done = status("--address", "127.0.0.1:1")
    assert done.returncode == 2
    assert "no Ray answers at 127.0.0.1:1" in done.stderr
