"""Real registry servers, where this machine has them: else a test is skipped, aloud."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest


def program(name, variable):
    """Return the program that a variable, or else the path, names; skip without."""
    found = os.environ.get(variable) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed; set {variable} to the program's path")
    return str(Path(found).absolute())


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def running(command, folder, url, *, wait_s):
    """Run a server until it answers at `url`; end it, and what it started, after."""
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait(process, url, wait_s, folder)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _wait(process, url, wait_s, folder):
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError:
            return  # it asks for credentials: it is there
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"no answer at {url}: {(folder / 'server.log').read_text()[-2000:]}")
