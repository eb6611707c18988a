"""A project in an empty directory, and ``ztserve`` as a person types it."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ztserve import config
from ztserve.cli import main
from ztserve.identity import Agent, Authority, Rules, process


@dataclass
class Done:
    """What came of one command."""

    code: int
    out: str
    err: str


Ztserve = Callable[..., Done]


@pytest.fixture
def ztserve(capsys: pytest.CaptureFixture[str]) -> Ztserve:
    def run(*words: object) -> Done:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    monkeypatch.delenv("ZTSERVE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def project(empty: Path, ztserve: Ztserve, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, made by ``ztserve init``."""
    assert ztserve("init").code == 0
    monkeypatch.setenv("ZTSERVE_CONFIG", str(empty / config.FILE))
    return empty


@pytest.fixture
def weights(empty: Path) -> Path:
    """A directory with unsigned weights, beside the project."""
    folder = empty / "weights"
    folder.mkdir()
    save_file({"w": np.full(4096, 2, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def published(project: Path, weights: Path, ztserve: Ztserve) -> Path:
    """Signed weights, published as double:1."""
    assert ztserve("sign", weights).code == 0
    assert ztserve("publish", weights, "double:1").code == 0
    return weights


@pytest.fixture
def agent(project: Path) -> Iterator[Agent]:
    """The embedded agent of the project, in this process."""
    settings = config.load()
    authority = Authority(settings.identity.trust_domain)
    rules = Rules.development(authority.trust_domain, worker_parent=None)
    directory = config.agent_directory(settings)
    try:
        admins = (settings.developer_id,)
        with Agent(authority, directory, rules, admin_ids=admins) as running:
            yield running
    finally:
        shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Verbs that hold keys close the memory of their process: open it again."""
    was = process.is_dumpable()
    yield
    process._prctl(4, int(was))
