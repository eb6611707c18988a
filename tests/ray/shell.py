"""A shell of its own, as a newcomer has it: a home, a project, and no Ray of ours."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ray import processes
from tests.ray.conftest import free_port

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ZTSERVE = (sys.executable, "-m", "ztserve.cli")
PATIENCE_S = 120.0


class Started:
    """A command that runs until it is ended."""

    def __init__(self, words, cwd: Path, env: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                words,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches the whole group
            )
        self.family: set[processes.Process] = set()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, pattern: str, seconds: float = PATIENCE_S) -> re.Match[str]:
        """Wait until it has printed this."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.said, re.MULTILINE)
            if found:
                return found
            if ended:
                break
            time.sleep(0.1)
        raise AssertionError(f"never said {pattern!r}:\n{self.said[-4000:]}")

    def living(self) -> set[processes.Process]:
        """Whatever it has started, be it orphaned since."""
        self.family |= processes.family(self.process.pid)
        return {process for process in self.family if process.is_alive()}

    def end(self, number: int, *, group: bool = False) -> int:
        """Send a signal; return the exit code once nothing of it is left."""
        self.living()
        send = os.killpg if group else os.kill
        send(self.process.pid, number)
        code = self.process.wait(60)
        until = time.monotonic() + 20
        while (left := self.living()) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left, f"still there: {sorted(p.command() for p in left)}"
        return code

    def kill(self) -> None:
        """End what a failed test left."""
        for process in self.living():
            process.kill()
        self.process.wait(10)


class Shell:
    """Runs commands in a project of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "project"
        self.project.mkdir()
        home = folder / "home"
        home.mkdir(mode=0o700)
        self.started: list[Started] = []
        self.env = {
            "PATH": f"{BIN}:{os.environ.get('PATH', os.defpath)}",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(folder),
        }

    def run(self, *words: str, code: int = 0, **env: str) -> str:
        """Run a command to its end; return all that it printed."""
        done = subprocess.run(
            words,
            cwd=self.project,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE_S,
            check=False,
        )
        said = done.stdout.decode(errors="replace")
        assert done.returncode == code, f"{words} gave {done.returncode}:\n{said}"
        return said

    def produce(self, domain: str) -> None:
        """Make the project one of profile production: its trust policy gets a root."""
        policy = self.project / ".ztserve/trust.toml"
        policy.write_text(policy.read_text().replace("dev.ztserve.internal", domain))
        self.run(*ZTSERVE, "key", "new", "root.pem", "--name", "root")
        self.run(*ZTSERVE, "sign", str(policy), "--key", "root.pem")
        toml = self.project / "ztserve.toml"
        toml.write_text(
            toml.read_text()
            .replace('profile = "development"', 'profile = "production"')
            .replace("dev.ztserve.internal", domain)
            .replace("# trust_root", "trust_root")
        )

    def sign(self, app: str) -> None:
        """Sign all that decides what runs, as the deployer of the project."""
        self.run(*ZTSERVE, "bundle", "sign", app)

    def start(self, *words: str, **env: str) -> Started:
        log = self.folder / f"{len(self.started)}.log"
        begun = Started(words, self.project, {**self.env, **env}, log)
        self.started.append(begun)
        return begun


@contextmanager
def opened() -> Iterator[Shell]:
    """A project in which digits is published, from an empty directory."""
    # Not under pytest's: the path of a unix socket may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="zt-"))
    shell = Shell(folder)
    try:
        shell.run(*ZTSERVE, "init")
        toml = shell.project / "ztserve.toml"
        toml.write_text(
            toml.read_text()
            .replace("port = 7443", f"port = {free_port()}")
            .replace("port = 8443", f"port = {free_port()}")
        )
        shell.run(sys.executable, "-m", "examples.digits", "publish")
        yield shell
    finally:
        for begun in shell.started:
            if begun.process.poll() is None or begun.living():
                begun.process.poll() is None and begun.process.send_signal(
                    signal.SIGTERM
                )
                begun.kill()
        shutil.rmtree(folder, ignore_errors=True)
