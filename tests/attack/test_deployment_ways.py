"""Ways round the deployment bundle: each works where its control is out."""

import importlib
import os
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.attack.test_deployment import anchored, anywhere, refused, without
from tests.unit.artifacts.workshop import pem
from tests.unit.serving.shop import MODULE, shop
from ztserve import artifacts, config
from ztserve.artifacts.deployment import anchor, measuring
from ztserve.errors import ConfigError
from ztserve.serving import parts

pytestmark = pytest.mark.slow
__all__ = ["anchored", "anywhere", "shop", "without"]

EVIL = MODULE.replace("self.weight *", "666 *")


# --- code that nobody measured ----------------------------------------------------


@pytest.mark.parametrize("name", ["dependency.libs", "dependency-data"])
@pytest.mark.parametrize("control", [True, False])
def test_a_native_library_beside_a_package_is_measured(
    shop, monkeypatch, control, name
):
    """As ``numpy.libs``, which wheels bring and no import names; here it is a text."""
    library = shop.packages / name / "libfast.so"
    library.parent.mkdir()
    library.write_text("2.0")
    if not control:
        monkeypatch.setattr(
            measuring,
            "_is_importable",
            lambda e: e.name.isidentifier() or e.name.endswith(".py"),
        )
    reads = f"float(__import__('pathlib').Path({str(library)!r}).read_text()) *"
    shop.write("shopping.py", MODULE.replace("self.weight *", reads))
    shop.sign()
    library.write_text("666")
    if control:
        refused(shop, f"'{name}' on sys.path is sha256:.*, signed as sha256:")
    else:
        with shop.replica() as replica:
            assert shop.call(replica) == 1332.0


def test_a_native_library_of_a_version_is_measured(shop):
    (shop.packages / "libfast.so.2").write_text("")
    refused(shop, r"'libfast.so.2' on sys.path is .*signed as no part of it")


@pytest.mark.parametrize("control", [True, False])
def test_a_folder_in_a_zip_file_is_measured(shop, monkeypatch, tmp_path, control):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("inner/planted.py", "FACTOR = 666")
    entry = str(tmp_path / "evil.zip/inner")
    monkeypatch.setattr(sys, "path", [entry, *sys.path])
    whole = partial(artifacts.measure_packages, path=[str(shop.packages), entry])
    monkeypatch.setattr(artifacts, "measure_packages", whole)
    if control:
        refused(shop, "'evil.zip' on sys.path is sha256:.*signed as no part of it")
        return
    monkeypatch.setattr(measuring, "_archives", lambda _path: [])
    with shop.replica():
        assert importlib.import_module("planted").FACTOR == 666
    del sys.modules["planted"]


def test_compiled_modules_from_another_folder_are_refused(shop, monkeypatch, tmp_path):
    """PYTHONPYCACHEPREFIX: packages would be run from where anybody could write."""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "cache"))
    refused(shop, "compiled modules would be taken from .*unset PYTHON", ConfigError)


@pytest.mark.parametrize("control", [True, False])
def test_a_module_that_came_after_the_measuring_is_not_imported(
    shop, monkeypatch, anywhere, tmp_path, control
):
    """What is not there is not measured, as beside a gateway; then it is there."""
    planned = shop.plan()
    away = tmp_path / "away"
    away.mkdir()
    path = [entry for entry in sys.path if entry != str(shop.folder)]
    monkeypatch.setattr(sys, "path", [str(away), *path])
    monkeypatch.chdir(away)
    there = partial(measuring.measure_packages, path=[str(away), str(shop.packages)])
    monkeypatch.setattr(artifacts, "measure_packages", there)
    check = config.check_code

    def check_and_plant(*given):
        check(*given)
        (away / "shopping.py").write_text(EVIL)

    monkeypatch.setattr(config.deployment, "check_code", check_and_plant)
    try:
        if control:
            refused(shop, "'shopping' was not found when the code", planned=planned)
            return
        anywhere()
        with shop.replica(planned=planned) as replica:
            assert shop.call(replica) == 1332.0
    finally:
        sys.modules.pop("shopping", None)


@pytest.mark.parametrize("control", [True, False])
def test_a_module_that_was_imported_before_is_not_taken(
    shop, monkeypatch, anywhere, tmp_path, control
):
    """Ray's workers are used again: this one has imported it from elsewhere."""
    planned = shop.plan()
    (tmp_path / "shopping.py").write_text(EVIL)
    with monkeypatch.context() as before:
        before.setattr(sys, "path", [str(tmp_path), *sys.path])
        importlib.import_module("shopping")
    try:
        if control:
            message = "was imported by SourceFileLoader, not from the code that was"
            refused(shop, message, planned=planned)
            return
        anywhere()
        with shop.replica(planned=planned) as replica:
            assert shop.call(replica) == 1332.0
    finally:
        sys.modules.pop("shopping", None)


# --- settings and arguments -------------------------------------------------------


@pytest.mark.parametrize("control", [True, False])
def test_a_relative_path_in_the_plan_is_not_taken_for_the_signed_one(
    shop, monkeypatch, tmp_path, control
):
    """It has the signed one's name, and leads to where the process is: no quarantine
    there, another log, other roots of callers."""
    plan, args, kwargs = shop.plan()
    audit = replace(plan.settings.audit, directory=Path(".ztserve/audit"))
    planned = (
        replace(plan, settings=replace(plan.settings, audit=audit)),
        args,
        kwargs,
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".ztserve").mkdir(mode=0o700)
    if control:
        message = "the path '.ztserve/audit' in the settings is relative to whatever"
        refused(shop, message, ConfigError, planned=planned)
        return
    name = config.deployment.file_name
    monkeypatch.setattr(
        config.deployment,
        "_plain",
        lambda settings, value: (
            [str(name(settings, v)) for v in value]
            if isinstance(value, tuple)
            else name(settings, value)
            if isinstance(value, Path)
            else value
        ),
    )
    with shop.replica(planned=planned):
        pass
    assert not shop.records()


class Evil(float):
    """Equal to its number, and brings a method."""

    def __mul__(self, other):
        return 333.0


@pytest.mark.parametrize("control", [True, False])
def test_an_argument_that_only_looks_signed_is_refused(shop, monkeypatch, control):
    shop.write("shopping.py", MODULE.replace("= factor", "= factor * 1"))
    shop.sign()
    plan, args, _ = shop.plan()
    planned = plan, args, {"factor": Evil(2.0)}
    if control:
        message = "arguments of the constructor cannot be signed: not JSON: Evil"
        refused(shop, message, ConfigError, planned=planned)
        return
    monkeypatch.setattr(parts, "_plain", lambda value: value)
    with shop.replica(planned=planned) as replica:
        assert shop.call(replica) == 333.0


class Lax:
    """Looks as `os.path.lexists` does: whatever the reason, there is none."""

    @staticmethod
    def lstat(path):
        if not os.path.lexists(path):
            raise FileNotFoundError


@pytest.mark.parametrize("control", [True, False])
def test_an_anchor_that_cannot_be_looked_at_is_not_taken_for_none(
    shop, anchored, monkeypatch, tmp_path, control
):
    """Its folder is another's, of mode 0700 perhaps: here a link in a circle."""
    anchored(pem(shop.root))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr(anchor, "ANCHOR", tmp_path / "loop/trust-root.pem")
    shop.bundle.unlink()
    settings = {"profile": "development"}
    if control:
        message = "whether there is one cannot be told.*chmod 0755"
        refused(shop, message, ConfigError, settings=settings)
        return

    monkeypatch.setattr(anchor, "os", Lax)
    with shop.replica(settings=settings) as replica:
        assert shop.call(replica) == 2.0


@pytest.mark.parametrize(
    ("runtime_env", "told"),
    [
        ({"env_vars": {"SPIFFE_ENDPOINT_SOCKET": "unix:///evil"}}, "'SPIFFE_ENDPOINT"),
        ({"env_vars": {"LD_PRELOAD": "evil.so", "PYTHONPATH": ""}}, "'LD_PRELOAD'"),
        ({"worker_process_setup_hook": "evil.hook"}, "'worker_process_setup_hook'"),
        ({"py_executable": "./evil"}, "'py_executable'"),
        ({"image_uri": "evil"}, "'image_uri'"),
    ],
)
def test_an_environment_in_serves_configuration_is_refused(runtime_env, told):
    """On Ray: tests/ray/test_deployment.py."""
    with pytest.raises(ConfigError, match=f"has {told}.*which nobody signed"):
        parts.check_environment(runtime_env)
    ours = {"env_vars": {"PYTHONPATH": "/srv"}, "working_dir": "gcs://x.zip"}
    parts.check_environment(ours)
