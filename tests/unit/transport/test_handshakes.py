"""The core's log of refused handshakes, as it really is; in processes of their own."""

import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from ztserve.transport import handshakes

ROOT = Path(__file__).parents[3]

PROLOGUE = """
import os, socket, ssl, sys, time
from tests.unit.transport.support import *
from tests.unit.transport import support
from ztserve.transport.handshakes import watch_handshakes
from ztserve.transport.server import GrpcServer
from ztserve.testing import ThrowAwayAuthority

support.Server = GrpcServer

authority, seen = ThrowAwayAuthority(DOMAIN), []

def connect(cert=None):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if cert:
        path = sys.argv[1] + "/client.pem"
        open(path, "wb").write(cert.chain_pem() + cert.key_pem())
        context.load_cert_chain(path)
    try:
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            context.wrap_socket(raw).recv(10)
    except OSError:
        pass

def plain():
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.sendall(b"PRI * HTTP/2.0" + b"x" * 30)
        raw.recv(100)

def until(count, seconds=5):
    end = time.monotonic() + seconds
    while sum(n for _, n in seen) < count and time.monotonic() < end:
        time.sleep(0.02)
"""


def run(
    body: str, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(body), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_refused_handshakes_are_counted_by_cause_and_not_shown(tmp_path: Path) -> None:
    done = run(
        """
        report = lambda cause, count: seen.append((cause, count))
        with serving(authority, on_handshake_refused=report) as served:
            for _ in range(3):
                plain()
            connect()
            stranger = ThrowAwayAuthority(DOMAIN).issue(CLI)
            connect(stranger); connect(stranger)
            try:
                wrong = served.channel(server=SERVER + "x")
                wrong.unary_unary(INFER)(b"", timeout=2)
            except grpc.RpcError:
                pass
            until(7); wrong.close()
            print("to the real one", file=sys.stderr, flush=True)
            os.write(2, b"no newline")
        totals = {}
        for cause, count in seen:
            totals[cause] = totals.get(cause, 0) + count
        assert totals.pop("server of another name expected") >= 1
        print(sorted(totals.items()))
        os.write(2, b" after")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == [
        ("certificate not trusted", 2),
        ("no client certificate", 1),
        ("not TLS", 3),
    ]
    assert done.stderr == "to the real one\nno newline after"


@pytest.mark.slow
def test_a_flood_is_at_most_one_report_a_second_for_each_cause(tmp_path: Path) -> None:
    done = run(
        """
        at = []
        def report(cause, count):
            seen.append((cause, count)); at.append(time.monotonic())
        with serving(authority, on_handshake_refused=report) as served:
            begun = time.monotonic()
            while time.monotonic() - begun < 2.2:
                plain()
                served_calls = served
            sent = None
        print(len(seen), min(b - a for a, b in zip(at, at[1:])) > 0.9)
        """,
        tmp_path,
    )
    count, apart = done.stdout.split()
    assert int(count) in (2, 3)
    assert apart == "True"
    assert done.stderr == ""


@pytest.mark.slow
def test_two_watchers_share_one_pipe_and_the_last_gives_it_back(tmp_path: Path) -> None:
    done = run(
        """
        before = os.fstat(2)
        one = watch_handshakes(lambda *_: None)
        two = watch_handshakes(lambda *_: None)
        one(); one()
        assert os.fstat(2).st_ino != before.st_ino
        print("in between", file=sys.stderr, flush=True)
        two()
        assert os.fstat(2).st_ino == before.st_ino
        print("after", file=sys.stderr, flush=True)
        """,
        tmp_path,
    )
    assert done.stderr == "in between\nafter\n"
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "counted"), [("", True), ("INFO", True), ("ERROR", False)]
)
def test_which_verbosity_the_core_needs(
    tmp_path: Path, level: str, counted: bool
) -> None:
    done = run(
        """
        report = lambda cause, count: seen.append((cause, count))
        with serving(authority, on_handshake_refused=report) as served:
            plain()
            until(1, 2.5)
        print(seen)
        """,
        tmp_path,
        **({"GRPC_VERBOSITY": level} if level else {}),
    )
    assert (done.stdout.strip() == "[('not TLS', 1)]") is counted


@pytest.mark.slow
def test_a_report_that_fails_does_not_end_the_watch(tmp_path: Path) -> None:
    done = run(
        """
        def report(cause, count):
            seen.append((cause, count))
            raise ValueError("broken report")
        with serving(authority, on_handshake_refused=report) as served:
            plain(); until(1)
            connect(); until(2)
        print(seen)
        """,
        tmp_path,
    )
    assert done.stdout.strip() == "[('not TLS', 1), ('no client certificate', 1)]"
    assert "broken report" in done.stderr


@pytest.mark.slow
def test_the_last_words_of_a_process_are_not_lost(tmp_path: Path) -> None:
    done = run(
        """
        watch_handshakes(lambda *_: None)
        raise RuntimeError("the last words")
        """,
        tmp_path,
    )
    assert "RuntimeError: the last words" in done.stderr


@pytest.mark.slow
def test_a_crash_is_still_told(tmp_path: Path) -> None:
    done = run(
        """
        import faulthandler
        faulthandler.enable()
        watch_handshakes(lambda *_: None)
        faulthandler._sigsegv()
        """,
        tmp_path,
    )
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_a_server_name_that_looks_like_the_cores_line_makes_up_no_cause():
    tap = object.__new__(handshakes._Tap)
    tap._counts = Counter()
    told = (
        b"ssl_transport_security.cc:1] Handshake failed with error x OPENSSL_internal:"
    )
    forged = b"E0000 " + told + b"ADMIN_LOGGED_IN"
    assert not tap._is(forged)
    assert tap._is(b"I1122 21:16:36.651471    6364 " + told + b"ADMIN_LOGGED_IN")
    assert tap._counts == {"other": 1}
    # Unanchored, and with causes as they are told, the same line is believed.
    loose = re.compile(handshakes._LINE.pattern.partition(b" ssl_")[2])
    assert loose.search(forged)[1] == b"ADMIN_LOGGED_IN"
