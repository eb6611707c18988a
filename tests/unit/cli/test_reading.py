import os
import pty
import subprocess
import sys
import threading

import pytest

from ztserve.artifacts import Progress
from ztserve.cli import reading

pytestmark = pytest.mark.slow


@pytest.fixture
def published(ztserve, project, weights):
    assert ztserve("sign", weights).code == 0
    return weights


def on_a_terminal(*words):
    """Run a command whose stderr is a terminal; return its code, stdout, and that."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def listen():
        try:
            while piece := os.read(ours, 1 << 16):
                shown.extend(piece)
        except OSError:  # the last end of a terminal that is closed is EIO
            return

    listener = threading.Thread(target=listen)
    listener.start()
    command = (sys.executable, "-m", "ztserve.cli", *map(str, words))
    screen = {"TERM": "xterm", "COLUMNS": "160"}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | screen,
        timeout=60,
        check=False,
    )
    os.close(theirs)
    listener.join(10)
    os.close(ours)
    return done.returncode, done.stdout.decode(), shown.decode()


def test_on_a_terminal_verifying_and_publishing_show_how_far_they_are(published):
    code, out, shown = on_a_terminal("publish", published, "double:1")
    assert (code, out.startswith("double:1 sha256:")) == (0, True), shown
    assert "verifying double:1 for its release" in shown
    assert "verifying double:1 as a replica" in shown
    code, out, shown = on_a_terminal("verify", "double:1", "--json")
    assert code == 0
    assert "verifying double:1" in shown
    assert "100% verified" in shown
    assert "verifying" not in out


def test_in_a_pipe_nothing_is_shown_of_it(ztserve, published):
    done = ztserve("publish", published, "double:1")
    assert (done.code, done.err) == (0, "")
    done = ztserve("verify", "double:1")
    assert (done.code, done.err) == (0, "")


def test_what_is_named_cannot_drive_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with reading.bar("verifying [bold]\x1b[2J") as tell:
        tell(Progress(1 << 20, 1 << 19, 1 << 21, 1.0))
    shown = capsys.readouterr().err
    assert "[bold]" in shown
    assert "\x1b[2J" not in shown
