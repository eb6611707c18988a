import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ztserve.errors import IdentityError
from ztserve.identity import Rules, SpiffeId
from ztserve.identity.agent.attestation import Process, attest, descends_from

CLI = "spiffe://td.example/ns/dev/sa/cli"
GATEWAY = "spiffe://td.example/ns/ml-api/sa/api-gateway"
DIRECTORY = "spiffe://td.example/ns/ztserve/sa/directory"
REPLICA = "spiffe://td.example/ns/ml-inference/sa/digits"


def myself():
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        return attest(left)


def process_of(pid):
    return Process(pid, _started(pid), os.geteuid(), os.getegid())


def _started(pid):
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])


def test_the_kernel_tells_who_is_at_the_other_end():
    me = myself()
    assert (me.pid, me.uid, me.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert me.started == _started(os.getpid())


def test_a_caller_that_has_ended_is_nobody(tmp_path):
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        subprocess.run([sys.executable, "-c", program, str(tmp_path / "s")], check=True)
        connection, _ = listener.accept()
        with connection, pytest.raises(IdentityError, match=r"gone|ended"):
            attest(connection)


def test_a_socket_that_is_no_unix_socket_has_no_process():
    with socket.socket() as tcp, pytest.raises(IdentityError, match="hides its pid"):
        attest(tcp)


def test_descent_is_read_from_the_process_table(child):
    assert descends_from(child.pid, os.getpid())
    assert descends_from(child.pid, os.getppid())
    assert not descends_from(os.getpid(), child.pid)
    assert not descends_from(child.pid, child.pid)
    with pytest.raises(IdentityError, match="is gone"):
        descends_from(2**22 + 1, 1)


def test_development_rules_tell_workers_from_local_processes(child):
    rules = Rules.development("td.example", worker_parent=os.getpid())
    worker, local = process_of(child.pid), process_of(os.getppid())
    for spiffe_id in (REPLICA, DIRECTORY):
        rules.check_claim(worker, SpiffeId(spiffe_id))
        with pytest.raises(IdentityError, match="is a local process, and none such"):
            rules.check_claim(local, SpiffeId(spiffe_id))
    for spiffe_id in (GATEWAY, CLI):
        rules.check_claim(local, SpiffeId(spiffe_id))
        with pytest.raises(IdentityError, match="is a Ray worker, and none such"):
            rules.check_claim(worker, SpiffeId(spiffe_id))
    assert rules.default(local) == CLI
    with pytest.raises(IdentityError, match="has registered no identity"):
        rules.default(worker)


@pytest.mark.parametrize(
    "path",
    [
        "/ns/ml-inference",
        "/ns/ml-inference/sa",
        "/ns/ml-inference/sa/digits/more",
        "/ns/ml-inference-x/sa/digits",
        "/sa/digits/ns/ml-inference",
        "/x/ml-inference/sa/digits",
    ],
)
def test_a_worker_namespace_holds_services_only(child, path):
    rules = Rules.development("td.example", worker_parent=os.getpid())
    with pytest.raises(IdentityError, match="none such may be"):
        rules.check_claim(process_of(child.pid), SpiffeId("spiffe://td.example" + path))


def test_rules_without_anything_give_nothing():
    rules = Rules(trust_domain="td.example")
    with pytest.raises(IdentityError, match="none such may be"):
        rules.check_claim(myself(), SpiffeId(CLI))
    with pytest.raises(IdentityError, match="has registered no identity"):
        rules.default(myself())


@pytest.mark.parametrize("field", ["worker_ids", "local_ids"])
def test_rules_name_ids_of_their_own_trust_domain_only(field):
    with pytest.raises(IdentityError, match="is not of the trust domain"):
        Rules(trust_domain="td.example", **{field: ("spiffe://other/a",)})
    with pytest.raises(IdentityError, match="is not of the trust domain"):
        Rules(trust_domain="td.example", default_id="spiffe://other/a")
