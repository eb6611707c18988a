"""One server for all cases, and one client of each kind."""

import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop import service
from tests.interop.drivers import Driver
from tests.interop.own import EVERY
from tests.interop.service import Served
from tests.unit.transport.support import DOMAIN
from ztserve.testing import ThrowAwayAuthority

NODE = Path(__file__).parent / "node"
NPM = (
    *("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"),
    *("--fetch-retries=0", "--prefer-offline"),
)
INSTALL_S = 40


@pytest.fixture(scope="module")
def authority() -> ThrowAwayAuthority:
    return ThrowAwayAuthority(DOMAIN)


@pytest.fixture(scope="module")
def shared(authority, tmp_path_factory) -> Iterator[Served]:
    with service.serving(authority, tmp_path_factory.mktemp("interop")) as one:
        yield one


@pytest.fixture
def served(shared: Served) -> Served:
    shared.service.calls.clear()
    return shared


@pytest.fixture(scope="module")
def driver(request, shared: Served) -> Iterator[Driver]:
    """The client whose name is the parameter."""
    if request.param == "grpc-js":
        have_grpc_js()
    one = EVERY[request.param](shared)
    yield one
    one.close()


def have_grpc_js() -> None:
    """Skip the test where @grpc/grpc-js cannot be had."""
    for tool in ("node", "npm"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    with (NODE / "package.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several workers installs
        if not (NODE / "node_modules" / "@grpc" / "grpc-js").exists():
            try:
                subprocess.run(NPM, cwd=NODE, check=True, timeout=INSTALL_S)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                shutil.rmtree(NODE / "node_modules", ignore_errors=True)
                pytest.skip(f"@grpc/grpc-js cannot be had: {error}")
