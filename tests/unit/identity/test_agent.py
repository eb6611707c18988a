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
import spiffe
from cryptography.hazmat.primitives.serialization import Encoding

from ztserve.errors import IdentityError
from ztserve.identity import (
    Agent,
    Rules,
    WorkloadSource,
    admin,
    admin_path,
    register,
    workload_endpoint,
)
from ztserve.identity import workload_api as wire

CLI = "spiffe://td.example/ns/dev/sa/cli"
GATEWAY = "spiffe://td.example/ns/ml-api/sa/api-gateway"
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


def test_the_stock_client_is_content_with_our_agent(agent, authority):
    with spiffe.WorkloadApiClient(agent.socket) as client:
        context = client.fetch_x509_context()
        bundles = client.fetch_x509_bundles()
    assert str(context.default_svid.spiffe_id) == CLI
    trust_domain = spiffe.TrustDomain("td.example")
    for found in (context.x509_bundle_set, bundles):
        bundle = found.get_bundle_for_trust_domain(trust_domain)
        (root,) = bundle.x509_authorities
        assert root.public_bytes(Encoding.DER) == authority.bundle[0]


def test_bundles_alone_can_be_fetched(agent, authority):
    answer = call(
        agent.socket,
        wire.FETCH_BUNDLES,
        wire.X509BundlesRequest,
        wire.X509BundlesResponse,
    )
    assert dict(answer.bundles) == {"spiffe://td.example": authority.bundle[0]}


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        ((wire.HEADER[0], "True"),),
        ((wire.HEADER[0], "false"),),
        (wire.HEADER, wire.HEADER),
    ],
)
def test_a_call_without_the_security_header_is_refused(agent, metadata):
    code = grpc.StatusCode.INVALID_ARGUMENT
    assert "workload.spiffe.io" in refused(code, agent.socket, metadata=metadata)


@pytest.mark.parametrize("method", ["FetchJWTSVID", "FetchJWTBundles", "Nonsense"])
def test_calls_of_other_profiles_are_unimplemented(agent, method):
    with pytest.raises(grpc.RpcError) as caught:
        call(agent.socket, method, wire.X509SVIDRequest, wire.X509SVIDResponse)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


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
        register(agent.admin_socket, GATEWAY, timeout_s=20)
        assert fetch(agent.socket).svids[0].spiffe_id == GATEWAY
        with pytest.raises(IdentityError, match=f"is {GATEWAY} already"):
            register(agent.admin_socket, CLI, timeout_s=20)


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
    rules = Rules(trust_domain="td.example")
    with Agent(authority, private, rules, on_stop=asked.set) as agent:
        assert admin(agent.admin_socket, {"op": "stop"})["ok"]
        assert asked.wait(20)


def test_an_agent_can_stop_itself_when_asked(authority, private):
    stopped = threading.Event()

    def stop():
        agent.stop()
        stopped.set()

    agent = Agent(authority, private, Rules(trust_domain="td.example"), on_stop=stop)
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
        ({"op": "stop"}, "ends with the process that started it"),
    ],
)
def test_admin_requests_that_are_not_understood_or_allowed_are_refused(
    agent, request_, message
):
    with pytest.raises(IdentityError, match=message):
        admin(agent.admin_socket, request_)


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[1]\n", b"\xff\n", b"[" * 4000 + b"\n"]
)
def test_admin_lines_that_are_no_json_object_are_answered_so(agent, line):
    assert "expected one" in exchange(agent, line)["error"]


def test_an_admin_line_without_end_is_refused(agent):
    assert exchange(agent, b"x" * 10_000)["ok"] is False


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
    with pytest.raises(IdentityError, match="already runs in"):
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
