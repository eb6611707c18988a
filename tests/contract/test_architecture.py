"""The shape of the house, held to by tests."""

import ast
import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ztserve
from ztserve import errors

ROOT = Path(ztserve.__file__).parent
GENERATED = "_pb2"
MODULES = sorted(p for p in ROOT.rglob("*.py") if GENERATED not in p.name)

MAKERS = {
    "Peer": {"identity"},
    "Call": {"transport", "gateway"},
    "Inputs": {"validation"},
    "Outputs": {"inference"},
    "Reply": {"filtering"},
    "VerifiedModel": {"artifacts"},
    "Record": {"audit"},
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def calls_of(name: str) -> set[str]:
    """The rooms in which `name(...)` is called."""
    return {
        room(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (getattr(node.func, "id", None) or getattr(node.func, "attr", None)) == name
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rooms"), MAKERS.items())
def test_each_value_is_made_in_its_own_room_only(name, rooms):
    assert calls_of(name) - {"testing"} == rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_fits_in_the_eye(path):
    assert len(path.read_text().splitlines()) <= 400


def test_no_module_has_a_name_that_says_nothing():
    bad = {"utils", "helpers", "common", "manager", "misc"}
    assert not [p for p in MODULES if p.stem in bad]


def imported_by(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


@pytest.mark.slow
def test_private_names_of_ray_are_imported_in_one_module_only():
    offenders = {
        path.name
        for path in MODULES
        for name in imported_by(path)
        if name.split(".")[0] == "ray"
        and any(p.startswith("_") for p in name.split("."))
    }
    assert offenders == {"ray_private.py"}


def test_only_config_reads_the_environment():
    assert {room(p) for p in MODULES if "os.environ" in p.read_text()} == {"config"}


@pytest.mark.slow
@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_failure_is_swallowed(path):
    tree = ast.parse(path.read_text())
    assert not {"pickle", "cloudpickle", "marshal", "shelve"} & imported_by(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and isinstance(node.body[0], ast.Pass):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in {"everything", "Exception", "BaseException"}


# --- errors ---------------------------------------------------------------------

ERRORS = sorted(
    (cls for _, cls in inspect.getmembers(errors, inspect.isclass)),
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_is_in_the_tree_and_survives_pickling(cls):
    assert issubclass(cls, errors.ZTServeError)
    assert cls.__name__ in (errors.__doc__ or "")
    args = ("public", "reason") if issubclass(cls, errors.CallError) else ("message",)
    back = pickle.loads(pickle.dumps(cls(*args)))
    assert (type(back), str(back), back.args) == (cls, args[-1], args)


def test_the_caller_is_told_the_public_sentence_only():
    error = errors.Denied("this identity may not do this", "rule 3 of policy x")
    assert (error.public, str(error)) == (
        "this identity may not do this",
        "rule 3 of policy x",
    )


# --- imports ----------------------------------------------------------------------


def test_the_public_names_are_sorted_and_all_there():
    assert ztserve.__all__ == sorted(ztserve.__all__)
    for name in ztserve.__all__:
        assert getattr(ztserve, name).__name__ == name


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.iter_modules([str(ROOT)]) if m.ispkg]
)
def test_a_rooms_public_names_are_sorted_and_all_there(name):
    module = importlib.import_module(f"ztserve.{name}")
    assert module.__doc__
    if name == "cli":
        return
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for public in module.__all__:
        assert getattr(module, public) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("ztserve", "ray torch presidio_analyzer grpc numpy"),
        ("ztserve.cli", "ray torch presidio_analyzer"),
        ("ztserve.gateway", "ray torch presidio_analyzer"),
        ("ztserve.serving", "ray torch presidio_analyzer"),
        ("ztserve.transport", "ray torch presidio_analyzer"),
    ],
)
def test_what_is_not_needed_is_not_imported(module, absent):
    code = (
        f"import sys, {module}\n"
        f"print(*(n for n in {absent.split()!r} if n in sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


@pytest.mark.slow
@pytest.mark.parametrize("example", ["digits", "chat", "pipeline"])
def test_importing_an_example_opens_no_socket_and_starts_no_process(example, tmp_path):
    code = f"""
import sys
def refuse(event, args):
    if event in ("socket.connect", "socket.bind", "os.fork", "os.forkpty",
                 "subprocess.Popen", "os.posix_spawn", "os.exec"):
        raise RuntimeError(f"{{event}} {{args}}")
import ray.serve, torch   # what these do when imported is theirs
sys.addaudithook(refuse)
import examples.{example}
assert "ray" in sys.modules and not __import__("ray").is_initialized()
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        check=False,
    )
    assert run.returncode == 0, run.stderr
