"""A stolen SVID, and whoever holds it: shut out, and what they try against the list.

Each attack is shown to work once its control is taken out.
"""

import contextlib
import fcntl
import json
import os
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from tests.unit.gateway.support import CLI as GATEWAY_CLIENT
from tests.unit.gateway.support import asked, running, tensor, text
from tests.unit.gateway.test_gateway import post
from tests.unit.transport.support import (
    CLI,
    DOMAIN,
    GATEWAY,
    INFER,
    SERVER,
    STREAM,
    Echo,
    message,
    serving,
)
from ztserve import audit
from ztserve.audit import Log
from ztserve.config import record_refusal
from ztserve.errors import IdentityError, Unavailable, ZTServeError
from ztserve.gateway.desk import Desk
from ztserve.identity import (
    Agent,
    Quarantine,
    Rules,
    admin,
    guarded_files,
    quarantine_operations,
    register,
)
from ztserve.identity.quarantine import check as quarantine_module
from ztserve.identity.quarantine import entry as quarantine_entry
from ztserve.identity.quarantine import file as quarantine_file
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Client
from ztserve.transport.loop.wire import Wire
from ztserve.transport.visit import Visit

ROOT = Path(__file__).parents[2]
THIEF = CLI
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change uid")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def authority() -> ThrowAwayAuthority:
    return ThrowAwayAuthority(DOMAIN)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "quarantine.json"


@pytest.fixture
def quarantine(path):
    with Quarantine.open(path) as following:
        yield following


def shut_out(path: Path, subject: str) -> None:
    quarantine_file.add(
        path, subject, reason="stolen", by="me", on_event=lambda *_: None
    )


def soon(fact, seconds: float = 3.0) -> bool:
    end = time.monotonic() + seconds
    while not fact() and time.monotonic() < end:
        time.sleep(0.01)
    return fact()


def gets_in(channel: grpc.Channel) -> bool:
    try:
        channel.unary_unary(INFER)(message(), timeout=5)
    except grpc.RpcError:
        return False
    return True


# --- the thief calls ------------------------------------------------------------------


def test_a_quarantined_principal_is_refused_audited_and_served_nothing(
    authority, quarantine, path, tmp_path
) -> None:
    shut_out(path, THIEF)
    assert soon(lambda: quarantine._held)
    log = Log(tmp_path / "audit" / "log.jsonl", origin={"service": "echo"})
    with (
        log,
        serving(
            authority,
            quarantine=quarantine,
            on_handshake_refused=log.refused_handshakes,
        ) as served,
        served.channel(authority.issue(GATEWAY)) as honest,
    ):
        for _ in range(3):
            with served.channel(authority.issue(THIEF)) as thief:
                assert not gets_in(thief)
        assert gets_in(honest)
        assert [call.peer.id for call in served.service.calls] == [GATEWAY]
    lines = list(audit.read(tmp_path / "audit" / "log.jsonl"))[1:]
    assert sum(line["count"] for line in lines) == 3
    for line in lines:
        assert (line["status"], line["status_code"]) == ("refused", "handshake")
        assert f"{THIEF} is in quarantine since" in line["status_detail"]
        assert line["status_detail"].endswith(": stolen")
        assert line["src_endpoint"] == {"ip": "127.0.0.1"}


def test_who_is_connected_already_is_told_by_name_and_then_cut_off(
    authority, quarantine, path, tmp_path
) -> None:
    log = Log(tmp_path / "audit" / "log.jsonl", origin={"service": "echo"})
    with (
        log,
        serving(
            authority,
            quarantine=quarantine,
            on_handshake_refused=log.refused_handshakes,
        ) as served,
        served.channel(authority.issue(THIEF)) as thief,
    ):
        assert gets_in(thief)
        shut_out(path, THIEF)
        assert soon(lambda: not gets_in(thief))
        began, calls = time.monotonic(), len(served.service.calls)
        assert soon(lambda: not served.server._house.wires)
        assert time.monotonic() - began < 2.5
        assert not gets_in(thief)
        assert len(served.service.calls) == calls
        for refusal in served.refusals:
            record_refusal(log, refusal)
    lines = list(audit.read(tmp_path / "audit" / "log.jsonl"))[1:]
    found = {(line["status"], line["status_code"]) for line in lines}
    assert found == {("refused", "Unauthenticated"), ("refused", "handshake")}
    for line in lines:
        assert f"{THIEF} is in quarantine since" in line["status_detail"]


def test_without_the_list_the_thief_is_served_until_the_svid_expires(
    authority, quarantine, path, monkeypatch
) -> None:
    shut_out(path, THIEF)
    assert soon(lambda: quarantine._held)
    monkeypatch.setattr(Quarantine, "check", lambda _, __: None)
    with (
        serving(authority, quarantine=quarantine) as served,
        served.channel(authority.issue(THIEF)) as thief,
    ):
        assert gets_in(thief)


def test_a_stolen_svid_is_refused_and_a_fresh_one_of_the_same_id_served(
    authority, quarantine, path, monkeypatch
) -> None:
    stolen, fresh = authority.issue(THIEF), authority.issue(THIEF)
    with (
        serving(authority, quarantine=quarantine) as served,
        served.channel(stolen) as thief,
        served.channel(fresh) as owner,
    ):
        assert gets_in(thief)  # known to the server by now, and still refused
        shut_out(path, f"{stolen.serial:X}")
        assert soon(lambda: not gets_in(thief))
        assert gets_in(owner)
        with served.channel(stolen) as again:
            assert not gets_in(again)
        monkeypatch.setattr(Quarantine, "check", lambda _, __: None)
        assert gets_in(thief)


def test_a_stream_that_was_open_ends_within_a_second(
    authority, quarantine, path, monkeypatch
) -> None:
    with serving(
        authority, Echo(pieces=10_000, pause_s=0.01), quarantine=quarantine
    ) as (served):

        def lasts_s() -> float:
            with served.channel(authority.issue(THIEF)) as thief:
                pieces = thief.stream_stream(STREAM)(iter((message(),)), timeout=30)
                next(pieces)
                began = time.monotonic()
                shut_out(path, THIEF)
                with contextlib.suppress(grpc.RpcError):
                    for _ in pieces:
                        if time.monotonic() - began > 2:
                            break
                return time.monotonic() - began

        assert lasts_s() < 1
        quarantine_file.remove(path, THIEF, by="me", on_event=lambda *_: None)
        assert soon(lambda: not quarantine._held)
        monkeypatch.setattr(Visit, "still", lambda _: None)
        assert 1 < lasts_s() < 2.5  # its connection is cut all the same
        quarantine_file.remove(path, THIEF, by="me", on_event=lambda *_: None)
        assert soon(lambda: not quarantine._held)
        monkeypatch.setattr(Wire, "judge", lambda _: None)
        assert lasts_s() > 2


def test_a_thief_at_the_gateway_is_refused_recorded_and_cut_off(
    authority, quarantine, path, tmp_path, monkeypatch
) -> None:
    with running(authority, tmp_path, quarantine=quarantine) as edge:
        svid = authority.issue(GATEWAY_CLIENT)
        with edge.https(svid) as kept, edge.socket(svid) as streaming:
            assert asked(kept, "POST", "/v1/predict", tensor())[0] == 200
            streaming.sendall(post("/v1/stream", text("endless")))
            assert streaming.recv(65536)
            began = time.monotonic()
            shut_out(path, f"{svid.serial:x}")
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                while streaming.recv(65536):
                    assert time.monotonic() - began < 3
            assert time.monotonic() - began < 1
            served = len(edge.service.calls)
            status, headers, told = asked(kept, "POST", "/v1/predict", tensor())
        assert (status, headers["connection"]) == (401, "close")
        assert told["error"] == "the peer's identity could not be verified"
        assert len(edge.service.calls) == served
        record = edge.records()[-1]
        assert record["actor"]["user"] == {
            "uid": GATEWAY_CLIENT,
            "credential_uid": f"{svid.serial:x}",
        }
        assert record["status"] == "refused"
        assert f"serial {svid.serial:x} of {GATEWAY_CLIENT}" in record["status_detail"]
        fresh = authority.issue(GATEWAY_CLIENT)
        assert edge.ask("POST", "/v1/predict", tensor(), svid=fresh)[0] == 200
        monkeypatch.setattr(Desk, "check", lambda _, __: None)
        assert edge.ask("POST", "/v1/predict", tensor(), svid=svid)[0] == 200


def test_a_stolen_replica_is_not_called(authority, quarantine, path) -> None:
    shut_out(path, SERVER)
    assert soon(lambda: quarantine._held)
    with serving(authority) as impostor:
        source = authority.source(GATEWAY)
        address = impostor.address
        with (
            Client(
                address, source=source, server_id=SERVER, quarantine=quarantine
            ) as careful,
            pytest.raises(Unavailable, match="is in quarantine since"),
        ):
            careful.infer({"secret": "of the caller"})
        assert impostor.service.calls == []
        with Client(address, source=source, server_id=SERVER) as careless:
            careless.infer({"secret": "of the caller"})
        assert len(impostor.service.calls) == 1


# --- the thief wants off the list: the admin socket -----------------------------------

ASK = """
    import json, sys
    from ztserve.errors import IdentityError
    from ztserve.identity import admin
    try:
        print(admin(sys.argv[1], {"op": "quarantine-remove", "subject": sys.argv[2]}))
    except IdentityError as error:
        print(error)
"""


def child(*words: object, program: str = ASK) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    return done.stdout


@contextmanager
def agent(authority, path: Path, events: list, **rules):
    rules = {"default_id": GATEWAY, "local_ids": (THIEF,), **rules}
    with Agent(
        authority,
        path.parent,
        Rules(trust_domain=DOMAIN, **rules),
        admin_ids=(GATEWAY,),
        extra_ops=quarantine_operations(
            path, lambda kind, fields: events.append((kind, fields))
        ),
        on_event=lambda kind, fields: events.append((kind, fields)),
    ) as one:
        yield one


def test_a_worker_cannot_edit_the_list(authority, path, monkeypatch) -> None:
    shut_out(path, THIEF)
    events: list = []
    worker = {"worker_parent": os.getpid()}  # our child is its descendant
    with agent(authority, path, events, **worker) as one:
        answer = child(one.admin_socket, THIEF)
        assert "refuses" in answer
        assert [entry.subject for entry in quarantine_file.read(path)] == [THIEF]
        assert any("is a Ray worker" in told.get("reason", "") for _, told in events)
        monkeypatch.setattr(Agent, "_check_admin", lambda *_: None)
        assert THIEF in child(one.admin_socket, THIEF)
        assert quarantine_file.read(path) == ()


def test_a_local_process_that_is_no_admin_cannot_edit_the_list(
    authority, path, monkeypatch
) -> None:
    shut_out(path, THIEF)
    request = {"op": "quarantine-remove", "subject": THIEF}
    with agent(authority, path, []) as one:
        register(one.admin_socket, THIEF)
        with pytest.raises(IdentityError, match="refuses"):
            admin(one.admin_socket, request)
        assert len(quarantine_file.read(path)) == 1
        monkeypatch.setattr(Agent, "_check_admin", lambda *_: None)
        admin(one.admin_socket, request)
        assert quarantine_file.read(path) == ()


# --- the thief wants off the list: the file -------------------------------------------


@contextmanager
def besieged(authority, quarantine, path):
    """A thief who is shut out, and an honest caller."""
    shut_out(path, THIEF)
    assert soon(lambda: quarantine._held)
    with (
        serving(authority, quarantine=quarantine) as served,
        served.channel(authority.issue(THIEF)) as thief,
        served.channel(authority.issue(GATEWAY)) as honest,
    ):
        assert not gets_in(thief)
        assert gets_in(honest)
        yield thief, honest


EMPTY = json.dumps({"version": 1, "entries": []})


OVERWRITE = """
    import os, sys
    os.setgroups([]); os.setgid(4242); os.setuid(4242)
    with open(sys.argv[1], "w") as file:
        file.write(sys.argv[2])
"""


SWAP = """
    import os, sys
    os.setgroups([]); os.setgid(4242); os.setuid(4242)
    os.rename(sys.argv[1], sys.argv[1] + ".gone")
    os.rename(sys.argv[2], sys.argv[1])
"""


@ROOT_ONLY
@pytest.mark.parametrize("control", [True, False])
def test_a_list_that_others_may_write_to_admits_nobody(
    authority, monkeypatch, control
) -> None:
    if not control:
        monkeypatch.setattr(guarded_files, "_check_mode", lambda *_: None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        path = Path(folder) / "quarantine.json"
        with (
            Quarantine.open(path) as quarantine,
            besieged(authority, quarantine, path) as (thief, honest),
        ):
            path.chmod(0o666)
            child(path, EMPTY, program=OVERWRITE)
            assert quarantine_entry.parse(path.read_bytes()) == ()
            if control:
                assert soon(lambda: not gets_in(honest))
                assert not gets_in(thief)
            else:
                assert soon(lambda: gets_in(thief))


@ROOT_ONLY
@pytest.mark.parametrize("control", [True, False])
def test_a_list_in_a_folder_that_others_can_swap_admits_nobody(
    authority, monkeypatch, control
) -> None:
    """The file and its folder are ours; the folder above is everybody's."""
    if not control:
        monkeypatch.setattr(guarded_files, "_check_ancestors", lambda _: None)
    with tempfile.TemporaryDirectory() as above:
        path = Path(above) / "folder" / "quarantine.json"
        path.parent.mkdir(mode=0o755)
        with (
            Quarantine.open(path) as quarantine,
            besieged(authority, quarantine, path) as (thief, honest),
        ):
            Path(above).chmod(0o777)
            # Ours, harmless and older: somebody else only moves it into place.
            (Path(above) / "old").mkdir()
            (Path(above) / "old" / path.name).write_text(EMPTY)
            (Path(above) / "old" / path.name).chmod(0o600)
            child(path.parent, Path(above) / "old", program=SWAP)
            assert quarantine_entry.parse(path.read_bytes()) == ()
            if control:
                assert soon(lambda: not gets_in(honest))
                assert not gets_in(thief)
            else:
                assert soon(lambda: gets_in(thief))


@pytest.mark.parametrize("control", [True, False])
def test_a_list_that_was_truncated_admits_nobody(
    authority, quarantine, path, monkeypatch, control
) -> None:
    if not control:
        strict = quarantine_entry.parse

        def lenient(raw):
            try:
                return strict(raw)
            except IdentityError:
                return ()

        monkeypatch.setattr(quarantine_file, "parse", lenient)
    with besieged(authority, quarantine, path) as (thief, honest):
        os.truncate(path, 0)
        if control:
            assert soon(lambda: not gets_in(honest))
            assert not gets_in(thief)
        else:
            assert soon(lambda: gets_in(thief))


@pytest.mark.parametrize("control", [True, False])
def test_a_list_that_was_removed_is_not_begun_anew_by_the_next_entry(
    path, monkeypatch, control
) -> None:
    def listed(subject):
        quarantine_file.add(
            path, subject, reason="r", by="me", on_event=lambda *_: None
        )

    listed(THIEF)
    path.unlink()
    if control:
        for attempt in (
            lambda: listed("77"),
            lambda: quarantine_file.read(path),
            lambda: Quarantine(path),
        ):
            with pytest.raises(IdentityError, match="is gone, and with it who was"):
                attempt()
        return
    nowhere = path.with_name("another")
    monkeypatch.setattr(quarantine_file, "_begun", lambda _: nowhere)
    listed("77")
    assert THIEF not in [one.subject for one in quarantine_file.read(path) or ()]


def test_a_reader_of_the_folder_cannot_hold_up_an_edit(path):
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        quarantine_file.add(path, THIEF, reason="r", by="me", on_event=lambda *_: None)
    finally:
        os.close(folder)
    lock = path.parent / ".quarantine.lock"
    assert lock.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("control", [True, False])
def test_a_list_on_a_disk_that_stalls_admits_nobody(
    authority, path, monkeypatch, control
):
    stalls = threading.Event()
    with (
        Quarantine.open(path) as quarantine,
        besieged(authority, quarantine, path) as (_, honest),
    ):
        if control:
            monkeypatch.setattr(quarantine_module, "STALE_S", 0.5)
        monkeypatch.setattr(Quarantine, "_look", lambda _: stalls.wait(10))
        time.sleep(1)
        assert gets_in(honest) is not control
        stalls.set()


@pytest.mark.parametrize("control", [True, False])
def test_a_list_that_was_removed_admits_nobody(
    authority, path, monkeypatch, control
) -> None:
    if not control:
        forgetful = property(lambda _: False, lambda _, __: None)
        monkeypatch.setattr(Quarantine, "_seen", forgetful, raising=False)
        forgotten = iter(path.with_name(f"{n}.begun") for n in range(10**6))
        monkeypatch.setattr(quarantine_file, "_begun", lambda _: next(forgotten))
    with (
        Quarantine.open(path) as quarantine,
        besieged(authority, quarantine, path) as (thief, honest),
    ):
        path.unlink()
        if control:
            assert soon(lambda: not gets_in(honest))
            assert not gets_in(thief)
        else:
            assert soon(lambda: gets_in(thief))


@pytest.mark.parametrize("control", [True, False])
def test_a_link_to_an_older_list_admits_nobody(
    authority, quarantine, path, monkeypatch, control
) -> None:
    older = path.with_name("older.json")
    older.write_text(EMPTY)
    older.chmod(0o600)
    if not control:
        followed = guarded_files._FLAGS & ~os.O_NOFOLLOW
        monkeypatch.setattr(guarded_files, "_FLAGS", followed)
    with besieged(authority, quarantine, path) as (thief, honest):
        link = path.with_name("link")
        link.symlink_to(older)
        link.replace(path)
        if control:
            assert soon(lambda: not gets_in(honest))
            assert not gets_in(thief)
        else:
            assert soon(lambda: gets_in(thief))


def test_a_torn_write_is_never_taken_for_the_list(
    authority, quarantine, path, monkeypatch
) -> None:
    """Edits without pause, while the thief tries: never a moment without the list."""
    with besieged(authority, quarantine, path) as (thief, honest):
        done = threading.Event()

        def edit() -> None:
            number = 0
            while not done.is_set():
                number += 1
                shut_out(path, f"{number:x}")

        editing = threading.Thread(target=edit)
        editing.start()
        try:
            until = time.monotonic() + 1
            while time.monotonic() < until:
                assert not gets_in(thief)
                assert gets_in(honest)
        finally:
            done.set()
            editing.join()


def test_an_edit_in_place_would_lock_everybody_out_for_a_moment(path) -> None:
    """What the atomic replacement is for: half a file is no list."""
    shut_out(path, THIEF)
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        with pytest.raises(ZTServeError):
            quarantine_entry.parse(whole[:length])
