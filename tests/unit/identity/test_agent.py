import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from tests.unit.identity.federated import until
from ztserve.errors import AuditError, IdentityError
from ztserve.identity import (
    Agent,
    JwtSource,
    Rules,
    SpiffeId,
    WorkloadSource,
    admin,
    admin_path,
    register,
    register_again,
    workload_endpoint,
)
from ztserve.identity import workload_api as wire
from ztserve.identity.agent.attestation import CannotTell

CLI = "spiffe://td.example/ns/dev/sa/cli"
GATEWAY = "spiffe://td.example/ns/ml-api/sa/api-gateway"
LOCAL = Rules(trust_domain="td.example", default_id=CLI)
ROOT = Path(__file__).parents[3]


def call(endpoint, method, request, answer, metadata=(wire.HEADER,)):
    with grpc.insecure_channel(endpoint) as channel:
        stream = channel.unary_stream(
            f"/{wire.SERVICE}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )(request(), metadata=metadata, timeout=20)
        first = next(iter(stream))
        stream.cancel()
        return first


def fetch(endpoint, metadata=(wire.HEADER,)):
    return call(
        endpoint, wire.FETCH_SVID, wire.X509SVIDRequest, wire.X509SVIDResponse, metadata
    )


def refused(code, *args, **kwargs):
    with pytest.raises(grpc.RpcError) as caught:
        fetch(*args, **kwargs)
    assert caught.value.code() is code
    return caught.value.details()


def test_a_process_gets_an_svid_and_the_bundle(agent, authority):
    (svid,) = fetch(agent.socket).svids
    assert svid.spiffe_id == CLI
    assert svid.bundle == authority.bundle[0]
    with WorkloadSource(agent.socket, timeout_s=20) as source:
        assert source.current().svid.id == CLI


def test_a_process_without_identity_is_refused(authority, private):
    with Agent(authority, private, Rules(trust_domain="td.example")) as agent:
        details = refused(grpc.StatusCode.PERMISSION_DENIED, agent.socket)
        assert f"process {os.getpid()} has registered no identity" in details


def test_an_agent_is_found_by_its_directory_alone(agent, private):
    assert workload_endpoint(private) == agent.socket
    assert admin_path(private) == agent.admin_socket


def test_the_sockets_are_private_and_gone_after_the_agent(agent, private):
    modes = {path.name: path.stat().st_mode & 0o777 for path in private.iterdir()}
    assert modes == {
        "workload.sock": 0o600,
        "admin.sock": 0o600,
        "inner.sock": 0o600,
        "lock": 0o600,
    }
    agent.stop()
    agent.stop()
    assert [path.name for path in private.iterdir()] == ["lock"]


def test_a_process_registers_once_and_is_then_what_it_said(authority, private):
    rules = Rules(trust_domain="td.example", local_ids=(GATEWAY,), default_id=CLI)
    with Agent(authority, private, rules) as agent:
        register(agent.admin_socket, GATEWAY, timeout_s=20)
        assert fetch(agent.socket).svids[0].spiffe_id == GATEWAY
        for second in (CLI, GATEWAY):
            with pytest.raises(IdentityError, match=f"is {GATEWAY} already"):
                register(agent.admin_socket, second, timeout_s=20)
        assert fetch(agent.socket).svids[0].spiffe_id == GATEWAY


def test_a_process_can_ask_who_it_is_and_is_not_named_twice(authority, private):
    rules = Rules(trust_domain="td.example", local_ids=(GATEWAY,), default_id=CLI)
    with Agent(authority, private, rules) as agent:
        assert admin(agent.admin_socket, {"op": "whoami"})["id"] is None
        register_again(agent.admin_socket, GATEWAY, timeout_s=20)
        assert admin(agent.admin_socket, {"op": "whoami"})["id"] == GATEWAY
        register_again(agent.admin_socket, GATEWAY, timeout_s=20)
        with pytest.raises(IdentityError, match=f"is {GATEWAY} already"):
            register_again(agent.admin_socket, CLI, timeout_s=20)


def test_the_status_tells_what_an_operator_wants_to_know(agent):
    fetch(agent.socket)
    status = admin(agent.admin_socket, {"op": "status"})
    assert status["trust_domain"] == "td.example"
    assert status["issued"] == 1
    assert status["registrations"] == [{"pid": os.getpid(), "id": CLI}]
    assert status["pid"] == os.getpid()
    assert status["uptime_s"] >= 0


def test_a_stop_request_calls_back_once_the_answer_is_given(authority, private):
    asked = threading.Event()
    with Agent(authority, private, LOCAL, admin_ids=(CLI,), on_stop=asked.set) as agent:
        assert admin(agent.admin_socket, {"op": "stop"})["ok"]
        assert asked.wait(20)


def test_only_an_admin_may_stop_the_agent_or_ask_for_further_requests(
    authority, private
):
    done = []

    def echo(process, request):
        done.append(process.pid)
        return {"told": request["what"]}

    request = {"op": "echo", "what": "a"}
    ops = {"extra_ops": {"echo": echo}, "on_stop": done.clear}
    with Agent(authority, private, LOCAL, admin_ids=(CLI,), **ops) as agent:
        assert admin(agent.admin_socket, request)["told"] == "a"
        assert done == [os.getpid()]
    with Agent(authority, private, LOCAL, admin_ids=(GATEWAY,), **ops) as agent:
        for refused_one in ({"op": "stop"}, request):
            with pytest.raises(IdentityError, match="is no admin of this agent"):
                admin(agent.admin_socket, refused_one)
    with (
        Agent(authority, private, Rules(trust_domain="td.example"), **ops) as agent,
        pytest.raises(IdentityError, match="has registered no identity"),
    ):
        admin(agent.admin_socket, request)
    assert done == [os.getpid()]


def test_a_further_request_may_refuse_with_any_error_of_ours(authority, private):
    def full(process, request):
        raise AuditError("the disk is full")

    ops = {"full": full}
    with (
        Agent(authority, private, LOCAL, admin_ids=(CLI,), extra_ops=ops) as agent,
        pytest.raises(IdentityError, match="the disk is full"),
    ):
        admin(agent.admin_socket, {"op": "full"})


def test_an_agent_can_stop_itself_when_asked(authority, private):
    stopped = threading.Event()

    def stop():
        agent.stop()
        stopped.set()

    agent = Agent(authority, private, LOCAL, admin_ids=(CLI,), on_stop=stop)
    agent.start()
    admin(agent.admin_socket, {"op": "stop"})
    assert stopped.wait(10)
    assert not agent.admin_socket.exists()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "expected op"),
        ({"op": "nonsense"}, "expected op"),
        ({"op": "register"}, "expected op"),
        ({"op": "register", "id": 7}, "expected op"),
        ({"op": "register", "id": CLI, "pid": 1}, "expected op"),
        ({"op": "register", "id": "nonsense"}, "must begin with spiffe://"),
        ({"op": "register", "id": "spiffe://other/a"}, "is not of the trust domain"),
        ({"op": "register", "id": "spiffe://td.example/ns/x/sa/y"}, "none such may be"),
        ({"op": "whoami", "pid": 1}, "expected op"),
        ({"op": ["stop"]}, "expected op"),
    ],
)
def test_admin_requests_that_are_not_understood_or_allowed_are_refused(
    agent, request_, message
):
    with pytest.raises(IdentityError, match=message):
        admin(agent.admin_socket, request_)


def test_an_agent_that_ends_with_its_process_is_not_stopped(authority, private):
    with (
        Agent(authority, private, LOCAL, admin_ids=(CLI,)) as agent,
        pytest.raises(IdentityError, match="ends with the process that started it"),
    ):
        admin(agent.admin_socket, {"op": "stop"})


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[1]\n", b"\xff\n", b"[" * 4000 + b"\n"]
)
def test_admin_lines_that_are_no_json_object_are_answered_so(agent, line):
    assert "expected one" in exchange(agent, line)["error"]


def test_an_admin_line_without_end_is_refused(agent):
    answer = exchange(agent, b"x" * 10_000)
    assert answer["error"] == "expected one line of JSON, at most 4096 bytes"


def exchange(agent, line):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(agent.admin_socket))
        connection.sendall(line)
        return json.loads(connection.makefile().readline())


@pytest.mark.slow
def test_a_request_to_an_agent_that_is_away_names_the_socket(private):
    with pytest.raises(IdentityError, match=r"no identity agent at .*admin\.sock"):
        admin(private / "admin.sock", {"op": "status"}, timeout_s=0.2)
    with pytest.raises(IdentityError, match="of over 4096 bytes"):
        admin(private / "admin.sock", {"op": "x" * 5000})


def test_an_answer_without_end_is_refused(private):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(private / "admin.sock"))
    listener.listen()

    def flood():
        connection, _ = listener.accept()
        with connection, pytest.raises(OSError):  # noqa: PT012
            while True:
                connection.sendall(b"x" * 65536)

    thread = threading.Thread(target=flood)
    thread.start()
    with pytest.raises(IdentityError, match="cut short or too long"):
        admin(private / "admin.sock", {"op": "status"})
    thread.join()
    listener.close()


def test_a_second_agent_in_one_directory_is_refused(agent, authority, private):
    with pytest.raises(
        IdentityError,
        match=r"already runs in .*: the project is being served already; end that",
    ):
        Agent(authority, private, Rules(trust_domain="td.example")).start()
    assert fetch(agent.socket).svids


def test_the_sockets_of_a_dead_agent_are_replaced(authority, private):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(private / "workload.sock"))
    rules = Rules(trust_domain="td.example", default_id=CLI)
    with Agent(authority, private, rules) as agent:
        assert fetch(agent.socket).svids


def test_an_open_directory_and_rules_of_another_domain_are_refused(authority, tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(IdentityError, match="mode 0755, expected 0700"):
        Agent(authority, tmp_path, Rules(trust_domain="td.example")).start()
    with pytest.raises(IdentityError, match="rules for other, authority of"):
        Agent(authority, tmp_path, Rules(trust_domain="other"))


def test_one_process_cannot_take_all_connections(agent):
    opened = []
    try:
        for _ in range(40):
            opened.append(socket.socket(socket.AF_UNIX))
            opened[-1].connect(agent.socket.removeprefix("unix://"))
            opened[-1].settimeout(5)
        refused_ones = 0
        for connection in opened:
            connection.setblocking(True)
            connection.settimeout(5)
            try:
                refused_ones += connection.recv(1) == b""
            except ConnectionResetError:
                refused_ones += 1
            except TimeoutError:
                pass
        assert refused_ones == 8
    finally:
        for connection in opened:
            connection.close()


@pytest.mark.slow
def test_a_process_that_forgets_to_stop_its_agent_still_ends(private):
    program = f"""
        from pathlib import Path
        from ztserve.identity import Agent, Authority, Rules, WorkloadSource
        rules = Rules(trust_domain="td.example", default_id="{CLI}")
        agent = Agent(Authority("td.example"), Path("{private}"), rules).start()
        source = WorkloadSource(agent.socket, timeout_s=20)
        print(source.current().svid.id)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, CLI, "")


# --- what is written down -----------------------------------------------------------


class Written(list):
    """The events of an agent, as (kind, fields)."""

    def __call__(self, kind, fields):
        self.append((kind, dict(fields)))

    def of(self, kind):
        return [fields for found, fields in self if found == kind]


def test_each_registration_issue_refusal_and_admin_request_is_an_event(
    authority, private
):
    written = Written()
    rules = Rules(trust_domain="td.example", local_ids=(GATEWAY,), default_id=CLI)
    with Agent(
        authority, private, rules, admin_ids=(GATEWAY,), on_event=written
    ) as agent:
        with pytest.raises(IdentityError, match="none such may be"):
            register(agent.admin_socket, "spiffe://td.example/ns/x/sa/y")
        register(agent.admin_socket, GATEWAY)
        svid = fetch(agent.socket).svids[0]
        with pytest.raises(IdentityError, match="already"):
            register(agent.admin_socket, CLI)
        admin(agent.admin_socket, {"op": "status"})
        with pytest.raises(IdentityError, match="ends with the process"):
            admin(agent.admin_socket, {"op": "stop"})
        exchange(agent, b"nonsense\n")
    me = {"pid": os.getpid(), "uid": os.geteuid()}
    leaf = x509.load_der_x509_certificate(svid.x509_svid)
    assert [kind for kind, _ in written] == [
        "identity-refused",
        "identity-registered",
        "svid-issued",
        "identity-alert",
        "admin-request",
        "admin-request",
        "identity-refused",
        "identity-refused",
    ]
    assert written.of("identity-registered") == [{**me, "id": GATEWAY}]
    serial = f"serial {leaf.serial_number:x}"
    assert written.of("svid-issued") == [{**me, "id": GATEWAY, "what": serial}]
    assert "cannot become" in written.of("identity-alert")[0]["reason"]
    assert written.of("admin-request")[1] == {**me, "op": "stop", "id": GATEWAY}
    assert "one line of JSON" in written.of("identity-refused")[-1]["reason"]


def test_what_cannot_be_written_down_is_not_done(authority, private):
    full = []

    def on_event(kind, fields):
        if full and kind in full:
            raise AuditError("the disk is full")

    rules = Rules(trust_domain="td.example", local_ids=(GATEWAY,), default_id=CLI)
    with Agent(
        authority, private, rules, admin_ids=(GATEWAY,), on_event=on_event
    ) as agent:
        full.append("identity-registered")
        with pytest.raises(IdentityError, match="the disk is full"):
            register(agent.admin_socket, GATEWAY)
        assert admin(agent.admin_socket, {"op": "whoami"})["id"] is None
        full.clear()
        register(agent.admin_socket, GATEWAY)  # it was not taken, so it is no second
        full.append("svid-issued")
        assert "cannot be audited: the disk is full" in refused(
            grpc.StatusCode.UNAVAILABLE, agent.socket
        )
        full.append("admin-request")
        with pytest.raises(IdentityError, match="the disk is full"):
            admin(agent.admin_socket, {"op": "stop"})


@pytest.mark.slow
def test_a_withdrawal_is_an_event_of_its_own_and_names_the_identity(authority, private):
    written = Written()
    entries = private / "entries.toml"
    table = "[[entry]]\nspiffe_id = {!r}\nselectors = ['unix:uid:{}']\n"
    both = "".join(table.format(one, os.geteuid()) for one in (CLI, GATEWAY))
    entries.write_text(both)
    folder = private / "agent"
    folder.mkdir(mode=0o700)
    with (
        Agent(
            authority,
            folder,
            Rules(trust_domain="td.example"),
            entries=entries,
            on_event=written,
        ) as agent,
        WorkloadSource(agent.socket) as source,
    ):
        assert source.current().svid.id == CLI
        me = {"pid": os.getpid(), "uid": os.geteuid()}
        entries.write_text(table.format(CLI, os.geteuid()))
        until(lambda: written.of("svid-withdrawn") == [{**me, "id": GATEWAY}])
        assert agent.status()["entries_problem"] == ""
        entries.write_text("[[entry")
        until(lambda: "not valid TOML" in agent.status()["entries_problem"])
        assert agent.status()["entries"] == 1
        entries.write_text("entry = []")
        until(lambda: {**me, "id": CLI} in written.of("svid-withdrawn"))
        until(lambda: agent.status()["entries_problem"] == "")


def test_a_long_audience_is_cut_short_in_the_audit(authority, private):
    written = Written()
    rules = Rules(trust_domain="td.example", default_id=CLI)
    with (
        Agent(authority, private, rules, on_event=written) as agent,
        JwtSource(agent.socket, spiffe_id=SpiffeId.parse(CLI)) as tokens,
    ):
        tokens.fetch("a" * 1000)
    (told,) = written.of("svid-issued")
    assert told["what"].startswith("JWT for ['aaa")
    assert len(told["what"]) == 200


def test_claims_that_wait_for_ray_hold_up_no_other_admin_request(authority, private):
    released = threading.Event()

    def check(_process, _spiffe_id):
        released.wait(10)
        raise CannotTell("Ray does not answer")

    rules = Rules(
        trust_domain="td.example",
        worker_parent=os.getppid(),
        worker_namespaces=("ml",),
    )
    with Agent(authority, private, rules, check=check) as agent:

        def claim():
            with pytest.raises(IdentityError):
                register(agent.admin_socket, "spiffe://td.example/ns/ml/sa/a")

        claims = [threading.Thread(target=claim) for _ in range(20)]
        for one in claims:
            one.start()
        try:
            assert admin(agent.admin_socket, {"op": "whoami"})["id"] is None
        finally:
            released.set()
            for one in claims:
                one.join()
