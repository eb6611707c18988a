"""Attacks on identity: somebody wants to be who they are not."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

import grpc
import pytest

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import Agent, Rules, WorkloadSource, admin, register
from ztserve.identity import workload_api as wire
from ztserve.identity.agent import attestation as attestation
from ztserve.identity.agent import callers as workload_callers
from ztserve.identity.agent.attestation import FalseClaim
from ztserve.identity.agent.callers import Callers
from ztserve.identity.agent.front import Front
from ztserve.identity.agent.registration import Registry
from ztserve.testing import ThrowAwayAuthority

ROOT = Path(__file__).parents[2]
A = ThrowAwayAuthority("a.example")
CLI = "spiffe://a.example/ns/dev/sa/cli"
GATEWAY = "spiffe://a.example/ns/ml-api/sa/api-gateway"
REPLICA = "spiffe://a.example/ns/ml-inference/sa/digits"
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change uid")


# --- the agent's sockets --------------------------------------------------------


@pytest.fixture
def directory():
    # Not under pytest's own directory, which other uids could not enter anyway.
    made = Path(tempfile.mkdtemp(prefix="zt-attack-"))
    yield made
    shutil.rmtree(made)


def alerts(events):
    return [fields["reason"] for kind, fields in events if kind == "identity-alert"]


def rules(**changes):
    return Rules(
        trust_domain="a.example",
        worker_namespaces=("ml-inference",),
        local_ids=(GATEWAY,),
        default_id=CLI,
        **changes,
    )


def fetch(endpoint):
    with grpc.insecure_channel(endpoint) as channel:
        stream = channel.unary_stream(
            f"/{wire.SERVICE}/{wire.FETCH_SVID}",
            request_serializer=wire.X509SVIDRequest.SerializeToString,
            response_deserializer=wire.X509SVIDResponse.FromString,
        )(wire.X509SVIDRequest(), metadata=(wire.HEADER,), timeout=20)
        first = next(iter(stream))
        stream.cancel()
        return first.svids[0].spiffe_id


CHILD = """
import os, sys
from ztserve.errors import ZTServeError
from ztserve.identity import WorkloadSource, admin, register
socket, admin_socket, *steps = sys.argv[1:]
if steps[0].startswith("uid "):
    os.setgroups([])
    os.setuid(int(steps.pop(0).removeprefix("uid ")))
for step in steps:
    try:
        if step == "fetch":
            with WorkloadSource(socket, timeout_s=2) as source:
                print("GOT", source.current().svid.id)
        elif step == "stop":
            print("STOPPED", admin(admin_socket, {"op": "stop"}, timeout_s=2))
        else:
            register(admin_socket, step, timeout_s=2)
            print("REGISTERED", step)
    except ZTServeError as error:
        print("REFUSED", error)
"""


def child_command(agent, *steps):
    program = [sys.executable, "-c", CHILD]
    return [*program, agent.socket, str(agent.admin_socket), *steps]


def run_child(agent, *steps):
    done = subprocess.run(
        child_command(agent, *steps),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    return done.stdout.splitlines()


def test_dialling_past_the_attestation_gives_nothing(directory, monkeypatch):
    inner = f"unix://{directory}/inner.sock"
    events = []
    with Agent(A, directory, rules(), on_event=lambda *e: events.append(e)) as agent:
        assert fetch(agent.socket) == CLI
        with pytest.raises(grpc.RpcError) as caught:
            fetch(inner)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "not attested" in caught.value.details()
        assert alerts(events) == ["the connection is not attested"]
        # Without the look-up of the attested process, it would be anybody's:
        me = next(iter(agent._registry.living()))
        monkeypatch.setattr(Front, "caller", lambda self, peer: me)
        assert fetch(inner) == CLI


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_a_name_that_means_a_process_cannot_be_taken_before_it_means_nobody(
    directory, monkeypatch, control
):
    taken = []

    class Watched(dict):
        def pop(self, address, default=None):
            with socket.socket(socket.AF_UNIX) as thief:
                try:
                    thief.bind("\0" + address.removeprefix("unix-abstract:"))
                except OSError:
                    taken.append(False)
                else:
                    taken.append(True)
            return super().pop(address, default)

    if not control:
        monkeypatch.setattr(socket.socket, "dup", lambda _: socket.socket())
    with Agent(A, directory, rules()) as agent:
        agent._front._callers = Watched()
        for _ in range(3):
            with suppress(IdentityError), WorkloadSource(agent.socket, timeout_s=5):
                pass
        until = time.monotonic() + 5
        while len(taken) < 3 and time.monotonic() < until:
            time.sleep(0.02)
    assert any(taken) is not control


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_one_process_cannot_follow_all_streams(directory, monkeypatch, control):
    if not control:
        monkeypatch.setattr(workload_callers, "MAX_STREAMS_OF_ONE", 10**6)
    with (
        Agent(A, directory, rules()) as agent,
        grpc.insecure_channel(f"unix:{agent.socket.removeprefix('unix://')}") as door,
    ):
        follow = door.unary_stream(f"/{wire.SERVICE}/{wire.FETCH_BUNDLES}")
        streams = [follow(b"", metadata=(wire.HEADER,)) for _ in range(40)]
        codes = []
        for stream in streams:
            try:
                next(stream)
            except grpc.RpcError as error:
                codes.append(error.code())
        exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
        assert codes == ([exhausted] * 8 if control else [])


def test_a_process_that_ended_and_was_not_reaped_is_nobody():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(IdentityError, match="has ended"):
            attestation._stat(pid)
    finally:
        os.waitpid(pid, 0)


def test_a_process_has_one_identity_for_its_whole_life(directory, monkeypatch):
    events = []
    with Agent(A, directory, rules(), on_event=lambda *e: events.append(e)) as agent:
        said = run_child(agent, GATEWAY, CLI, "fetch", GATEWAY)
        assert said[0] == f"REGISTERED {GATEWAY}"
        assert f"is {GATEWAY} already and cannot become {CLI}" in said[1]
        assert said[2] == f"GOT {GATEWAY}"
        assert f"is {GATEWAY} already and cannot become {GATEWAY}" in said[3]
        first_used = run_child(agent, "fetch", GATEWAY)
        assert first_used[0] == f"GOT {CLI}"
        assert f"is {CLI} already and cannot become {GATEWAY}" in first_used[1]
        assert len(alerts(events)) == 3
        # Were a claim not the only one, a second would take the first one's place:
        monkeypatch.setattr(Registry, "held", lambda self, process: None)
        monkeypatch.setattr(
            Registry,
            "_settle",
            lambda self, process, text: self._claims.__setitem__(process, text),
        )
        said = run_child(agent, GATEWAY, CLI, "fetch")
        assert said == [f"REGISTERED {GATEWAY}", f"REGISTERED {CLI}", f"GOT {CLI}"]


@pytest.mark.slow
def test_nobody_can_register_another_process(directory):
    with Agent(A, directory, rules()) as agent:
        with pytest.raises(IdentityError, match="expected op register"):
            admin(agent.admin_socket, {"op": "register", "id": GATEWAY, "pid": 1})
        run_child(agent, GATEWAY)
        assert fetch(agent.socket) == CLI  # another's registration is not ours


@ROOT_ONLY
@pytest.mark.slow
def test_a_registration_does_not_pass_to_a_process_with_the_same_pid(
    directory, monkeypatch
):
    def run_twice(agent):
        """Run two children, one after the other, that the kernel gives one pid."""
        for _ in range(20):
            said, pid = run_child_noting_pid(agent, GATEWAY)
            assert said == [f"REGISTERED {GATEWAY}"]
            LAST_PID.write_text(str(pid - 1))
            said, again = run_child_noting_pid(agent, "fetch")
            if again == pid:
                return said
        pytest.skip("other processes take the pid each time")

    if not os.access(LAST_PID, os.W_OK):
        pytest.skip("this system lets nobody choose a pid")
    with Agent(A, directory, rules()) as agent:
        assert run_twice(agent) == [f"GOT {CLI}"]
        # Were processes told apart by their pid alone, the later would be the earlier:
        stat = attestation._stat
        monkeypatch.setattr(attestation, "_stat", lambda pid: (stat(pid)[0], 0))
        assert run_twice(agent) == [f"GOT {GATEWAY}"]


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def run_child_noting_pid(agent, *steps):
    command = child_command(agent, *steps)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        out, _ = child.communicate(timeout=60)
    return out.splitlines(), child.pid


HANDS_ON = """
import socket, sys
from ztserve.identity import register
workload, admin_socket, spiffe_id, channel = sys.argv[1:]
register(admin_socket, spiffe_id)
connection = socket.socket(socket.AF_UNIX)
connection.connect(workload)
with socket.socket(fileno=int(channel)) as to_heir:
    socket.send_fds(to_heir, [b"!"], [connection.fileno()])
    to_heir.recv(1)
"""


def inherited_connection(agent, spiffe_id):
    """Return a connection to the Workload API that a process made that has ended."""
    mine, theirs = socket.socketpair()
    command = [sys.executable, "-c", HANDS_ON, agent.socket.removeprefix("unix://")]
    command += [str(agent.admin_socket), spiffe_id, str(theirs.fileno())]
    with (
        mine,
        theirs,
        subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT) as maker,
    ):
        _, (descriptor,), *_ = socket.recv_fds(mine, 1, 1)
        while not agent._front._callers:  # until it is attested
            time.sleep(0.01)
        mine.send(b"!")
        assert maker.wait(timeout=20) == 0
    return socket.socket(fileno=descriptor)


@contextmanager
def relayed(connection, path):
    """Have whoever dials `path` speak through `connection`."""

    def pump(source, target):
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def serve():
        with suppress(OSError), listener.accept()[0] as dialled:
            back = Thread(target=pump, args=(connection, dialled))
            back.start()
            pump(dialled, connection)
            connection.shutdown(socket.SHUT_RDWR)
            back.join()

    with connection, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = Thread(target=serve)
        server.start()
        yield f"unix://{path}"
        server.join()  # the one who dialled has gone
    path.unlink()


@pytest.mark.slow
def test_a_connection_that_outlives_its_process_gives_nothing(directory, monkeypatch):
    relay = directory / "relay.sock"
    with Agent(A, directory, rules()) as agent:
        with (
            relayed(inherited_connection(agent, GATEWAY), relay) as endpoint,
            pytest.raises(grpc.RpcError) as caught,
        ):
            fetch(endpoint)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "is gone" in caught.value.details()
        # Were it not asked whether the process still runs, its heir would be it:
        monkeypatch.setattr(attestation.Process, "check_alive", lambda self: None)
        with relayed(inherited_connection(agent, GATEWAY), relay) as endpoint:
            assert fetch(endpoint) == GATEWAY


def ask_as_worker(directory, *steps, known=True, **options):
    """Have a grandchild of what stands for the raylet take `steps`."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    worker_rules = rules(worker_parent=parent.pid if known else None)
    with Agent(A, directory, worker_rules, **options) as agent:
        command = "\0".join(child_command(agent, *steps))
        out, _ = parent.communicate(command, timeout=60)
    return out.splitlines()


PARENT = """
import subprocess, sys
command = sys.stdin.read().split(chr(0))
grandchild = ["/bin/sh", "-c", '"$@"; exit 0', "sh", *command]
print(subprocess.run(grandchild, capture_output=True, text=True).stdout, end="")
"""


@pytest.mark.slow
def test_a_ray_worker_can_be_neither_gateway_nor_developer(directory):
    events = []
    refused = ask_as_worker(
        directory,
        *("fetch", GATEWAY, CLI, "stop", REPLICA, "fetch"),
        admin_ids=(CLI, REPLICA),
        on_stop=list,
        on_event=lambda *event: events.append(event),
    )
    assert "has registered no identity" in refused[0]
    assert f"a Ray worker, and none such may be {GATEWAY}" in refused[1]
    assert f"a Ray worker, and none such may be {CLI}" in refused[2]
    assert "is a Ray worker: it may not" in refused[3]
    assert refused[4:] == [f"REGISTERED {REPLICA}", f"GOT {REPLICA}"]
    assert len(alerts(events)) == 3
    # Where the agent does not know the workers' parent, they are as good as anybody:
    assert ask_as_worker(directory, GATEWAY, "fetch", known=False) == [
        f"REGISTERED {GATEWAY}",
        f"GOT {GATEWAY}",
    ]
    said = ask_as_worker(directory, "stop", known=False, admin_ids=(CLI,), on_stop=list)
    assert said == ["STOPPED {'ok': True}"]


@pytest.mark.slow
def test_no_entry_makes_a_ray_worker_the_gateway(directory, monkeypatch):
    entries = directory / "entries.toml"
    selectors = [f"unix:uid:{os.geteuid()}"]  # which holds for workers as well
    entries.write_text(
        "".join(
            f"[[entry]]\nspiffe_id = {one!r}\nselectors = {selectors}\n"
            for one in (GATEWAY, REPLICA)
        )
    )
    steps = (GATEWAY, "fetch", REPLICA, "fetch")
    said = ask_as_worker(directory, *steps, entries=entries)
    assert f"a Ray worker, and none such may be {GATEWAY}" in said[0]
    assert "has registered no identity" in said[1]  # nor what nobody was asked about
    assert said[2:] == [f"REGISTERED {REPLICA}", f"GOT {REPLICA}"]
    # The entry alone would have made it so:
    monkeypatch.setattr(Rules, "is_local", lambda self, spiffe_id: False)
    said = ask_as_worker(directory, *steps[:2], entries=entries)
    assert said == [f"REGISTERED {GATEWAY}", f"GOT {GATEWAY}"]


@pytest.mark.slow
def test_a_worker_that_runs_no_actor_registers_nothing(directory):
    """A child of a replica, or code that runs as the worker's module is imported."""

    def check(process, spiffe_id):
        raise FalseClaim(f"process {process.pid} runs no actor, claims {spiffe_id}")

    events = []
    steps = (REPLICA, "fetch")
    said = ask_as_worker(
        directory, *steps, check=check, on_event=lambda *event: events.append(event)
    )
    assert f"runs no actor, claims {REPLICA}" in said[0]
    assert "has registered no identity" in said[1]
    assert len(alerts(events)) == 1
    # Where nobody asks Ray, a forged registration is as good as a true one:
    said = ask_as_worker(directory, *steps)
    assert said == [f"REGISTERED {REPLICA}", f"GOT {REPLICA}"]


@pytest.mark.slow
def test_an_entry_that_is_removed_is_withdrawn_from_a_running_stream(
    directory, monkeypatch
):
    path = directory / "entries.toml"
    entry = f"[[entry]]\nspiffe_id = {CLI!r}\nselectors = ['unix:uid:{os.geteuid()}']"

    def write(text):
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)

    def seconds_until_withdrawn(most):
        with (
            Agent(A, directory, rules(), entries=path) as agent,
            WorkloadSource(agent.socket, timeout_s=20) as source,
        ):
            assert source.current().svid.id == CLI
            write("entry = []")
            began = time.monotonic()
            while time.monotonic() < began + most:
                try:
                    source.current()
                except IdentityError:
                    return time.monotonic() - began
                time.sleep(0.01)
            return None

    write(entry)
    assert seconds_until_withdrawn(most=5) < 1
    # Were the streams not told, the SVID would be good for as long as it lives:
    write(entry)
    monkeypatch.setattr(Callers, "changed", lambda self: None)
    assert seconds_until_withdrawn(most=1.5) is None


@pytest.mark.slow
def test_a_process_that_is_no_admin_cannot_stop_the_agent(directory, monkeypatch):
    stopped = []
    with Agent(
        A, directory, rules(), admin_ids=(CLI,), on_stop=lambda: stopped.append(1)
    ) as agent:
        said = run_child(agent, GATEWAY, "stop")
        assert "is no admin of this agent" in said[1]
        # Were it not asked who it is:
        monkeypatch.setattr(Registry, "check_admin", lambda self, process: CLI)
        said = run_child(agent, GATEWAY, "stop")
        assert said[1] == "STOPPED {'ok': True}"


def test_a_local_process_cannot_pose_as_a_replica(directory):
    with (
        Agent(A, directory, rules(worker_parent=2**22 + 1)) as agent,
        pytest.raises(IdentityError, match="a local process, and none such may be"),
    ):
        register(agent.admin_socket, REPLICA)


@ROOT_ONLY
@pytest.mark.slow
def test_a_process_of_another_uid_gets_nothing_even_through_an_open_door(directory):
    with Agent(A, directory, rules()) as agent:
        closed = run_child(agent, "uid 12345", "fetch", GATEWAY)
        assert all("Permission denied" in line for line in closed)
        directory.chmod(0o711)
        agent.admin_socket.chmod(0o666)
        Path(agent.socket.removeprefix("unix://")).chmod(0o666)
        said = run_child(agent, "uid 12345", "fetch", GATEWAY)
        assert all(line.startswith("REFUSED") for line in said)
        assert all("runs as uid 12345; only uid 0 is served" in line for line in said)


# --- the memory of a process that holds a key -----------------------------------

VICTIM_AND_READER = """
import ctypes, os, sys
from ztserve.identity import harden_process
if os.geteuid() == 0:  # root may read everything: neither of the two shall be root
    os.setgroups([]); os.setgid(12345); os.setuid(12345)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as for any program that is just started
ready, done = os.pipe(), os.pipe()
victim = os.fork()
if victim == 0:
    if sys.argv[1] == "hardened":
        harden_process()
    secret = b"s3cret-" * int("3")
    os.write(ready[1], b"!")
    os.close(done[1])
    os.read(done[0], 1)
    os._exit(0)
os.read(ready[0], 1)
found = False
try:
    with open(f"/proc/{victim}/maps") as maps:
        regions = [line.split()[0].split("-") for line in maps if " rw-p " in line]
    with open(f"/proc/{victim}/mem", "rb", 0) as memory:
        for start, end in ((int(a, 16), int(b, 16)) for a, b in regions):
            memory.seek(start)
            try:
                found = found or b"s3cret-" * 3 in memory.read(min(end - start, 2**24))
            except OSError:
                pass
    print("READ" if found else "NOT FOUND")
except PermissionError:
    print("PERMISSION DENIED")
os.close(done[1])
os.waitpid(victim, 0)
"""


def read_memory_of_a_process(state):
    done = subprocess.run(
        [sys.executable, "-c", VICTIM_AND_READER, state],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_the_key_of_a_hardened_process_cannot_be_read_by_its_own_uid():
    assert read_memory_of_a_process("hardened") == "PERMISSION DENIED"
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if not scope.exists() or int(scope.read_text()) < 2:
        assert read_memory_of_a_process("as it was") == "READ"


@pytest.mark.slow
def test_a_hardened_process_still_gets_its_identity(directory):
    # The agent reads the start time of processes whose memory is closed to it.
    program = "from ztserve.identity import harden_process; harden_process()\n" + CHILD
    with Agent(A, directory, rules()) as agent:
        command = child_command(agent, "fetch")
        command[2] = program
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
        )
    assert done.stdout.splitlines() == [f"GOT {CLI}"]


def test_an_expired_identity_is_not_served_from_memory(directory):
    moment = types.now()
    with (
        Agent(A, directory, rules(), ttl_s=60) as agent,
        WorkloadSource(agent.socket, timeout_s=20, clock=lambda: moment) as source,
    ):
        assert source.current().svid.id == CLI
        moment += timedelta(seconds=90)
        with pytest.raises(IdentityError, match="expired at"):
            source.current()
