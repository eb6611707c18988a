"""`python -m examples.NAME publish`, as a newcomer runs it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ztserve import config
from ztserve.artifacts import TrustPolicy, verify_model
from ztserve.authorization import PolicySet
from ztserve.cli.init import initialise
from ztserve.types import operations

ROOT = Path(__file__).parents[2]
POLICIES = ROOT / "examples/policies"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ZTSERVE_CONFIG": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomer")
    initialise(folder)
    return folder


@pytest.mark.slow
def test_publishing_prints_the_accuracy_and_what_was_published(project):
    run(project, "examples.digits", "publish")
    # Again: the same weights have the same digest, and nothing is changed.
    ran = run(project, "examples.digits", "publish")
    assert ran.returncode == 0, ran.stderr
    said = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
    assert said["model"] == "digits:1, also digits@production"
    assert float(said["accuracy"]) >= 0.95
    assert said["digest"].startswith("sha256:")
    assert "\x1b" not in ran.stdout
    settings = config.load(project / "ztserve.toml")
    trust = TrustPolicy.load(settings.artifacts.trust_policy)
    model = verify_model(settings.artifacts.registry, "digits@production", trust)
    assert model.digest == said["digest"]
    assert [signer.role for signer in model.signers] == ["trainer", "deployer"]
    assert model.names == ("config.json", "model.safetensors")


@pytest.mark.slow
def test_another_version_may_be_named(project):
    ran = run(project, "examples.chat", "publish", "--version", "2")
    assert ran.returncode == 0, ran.stderr
    assert "chat:2, also chat@production" in ran.stdout


@pytest.mark.slow
def test_without_keys_it_says_what_to_run_first(tmp_path):
    ran = run(tmp_path, "examples.digits", "publish")
    assert ran.returncode == 1
    assert "run `ztserve init` first" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "modules",
    [("digits",), ("chat", "transformer"), ("pipeline",), ("llama",)],
    ids=lambda modules: modules[0],
)
def test_an_example_has_at_most_eighty_lines_of_code(modules):
    lines = sum(len(_code_lines(ROOT / f"examples/{module}.py")) for module in modules)
    assert lines <= 80


def _code_lines(path: Path) -> set[int]:
    """The lines that hold code: neither blank, comment nor documentation."""
    source = path.read_text()
    documentation = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return {
        number
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    } - documentation


@pytest.mark.parametrize("service", ["inference-service", "chat", "preprocess"])
def test_all_policies_of_the_examples_are_understood_together(service, tmp_path):
    copies = []
    for path in sorted(POLICIES.glob("*.yaml")):
        copies.append(tmp_path / path.name)
        copies[-1].write_bytes(path.read_bytes())
        copies[-1].chmod(0o644)
    policies = PolicySet.load(
        copies,
        trust_domain="dev.ztserve.internal",
        namespace="ml-inference",
        labels={"app": service},
        operations=tuple(operations(service).values()),
    )
    assert len(policies.digest) == 64


def test_no_policy_file_is_writable_by_others():
    for path in POLICIES.glob("*.yaml"):
        assert not path.stat().st_mode & 0o022, path
