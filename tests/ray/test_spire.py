"""The digits example on real SPIRE, where its two programs are installed."""

import shutil
import time

import pytest

from tests.ray.shell import REPOSITORY, ZTSERVE, opened

pytestmark = pytest.mark.skipif(
    not (shutil.which("spire-server") and shutil.which("spire-agent")),
    reason="spire-server and spire-agent are not on PATH: SPIRE itself was not tried",
)
FILES = REPOSITORY / "examples" / "spire"
SERVER = ("-socketPath", "run/server.sock")


@pytest.fixture(scope="module")
def spire():
    """A shell whose project uses a SPIRE agent of its own."""
    with opened() as shell:
        shutil.copytree(FILES, shell.project, dirs_exist_ok=True)
        run = shell.project / "run"
        for folder in (run, run / "server", run / "agent", run / "public"):
            folder.mkdir(mode=0o700)
        shell.start("spire-server", "run", "-config", "server.conf")
        until = time.monotonic() + 60
        while not (run / "server.sock").exists():
            assert time.monotonic() < until
            time.sleep(0.2)
        bundle = shell.run("spire-server", "bundle", "show", *SERVER)
        (run / "bootstrap.crt").write_text(bundle)
        node = ("-spiffeID", "spiffe://ml.example/node")
        said = shell.run("spire-server", "token", "generate", *SERVER, *node)
        token = said.removeprefix("Token: ").strip()
        shell.start(
            "spire-agent", "run", "-config", "agent.conf", "-joinToken", token
        ).says("Starting Workload and SDS APIs")
        shell.run("./register.sh")
        shell.produce("ml.example")
        shell.sign("examples.digits:app")
        shell.env["SPIFFE_ENDPOINT_SOCKET"] = f"unix://{run / 'public/api.sock'}"
        yield shell


def test_digits_answers_on_spire(spire):
    begun = spire.start(*ZTSERVE, "run", "examples.digits:app")
    begun.says("^serving; Ctrl-C stops it")
    said = spire.run(*ZTSERVE, "predict", "inference-service", "--example")
    assert "spiffe://ml.example/ns/dev/sa/cli" in said
    begun.kill()
