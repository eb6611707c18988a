"""Attacks on identity: somebody wants to be who they are not."""

import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store

from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import (
    Agent,
    PeerVerifier,
    Rules,
    SpiffeId,
    WorkloadSource,
    admin,
    register,
    verify_peer,
)
from ztserve.identity import workload_api as wire
from ztserve.identity.attestation import Process
from ztserve.identity.authority import leaf_extensions, sign_certificate, workload_name
from ztserve.identity.front import Front
from ztserve.identity.svid import verified_svid
from ztserve.testing import ThrowAwayAuthority

ROOT = Path(__file__).parents[2]
A = ThrowAwayAuthority("a.example")
B = ThrowAwayAuthority("b.example")
BOTH = A.bundles | B.bundles
A_ID, B_ID = "spiffe://a.example/ns/x/sa/y", "spiffe://b.example/ns/x/sa/y"
CLI = "spiffe://a.example/ns/dev/sa/cli"
GATEWAY = "spiffe://a.example/ns/ml-api/sa/api-gateway"
REPLICA = "spiffe://a.example/ns/ml-inference/sa/digits"
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change uid")


def plain_verify(chain, bundles):
    """What a TLS stack does: any root of the pool, no rule of SPIFFE's."""
    roots = [x509.load_der_x509_certificate(r) for rs in bundles.values() for r in rs]
    leaf, *others = (x509.load_der_x509_certificate(der) for der in chain)
    policy = PolicyBuilder().store(Store(roots)).time(datetime.now(UTC))
    return policy.build_client_verifier().verify(leaf, others)


def assert_refused(chain, bundles=BOTH, now=None):
    moment = now or types.now()
    with pytest.raises(Unauthenticated) as caught:
        verify_peer(chain, bundles, now=moment)
    with pytest.raises(Unauthenticated):
        PeerVerifier(bundles).verify(chain, now=moment)
    assert caught.value.public == "the peer's identity could not be verified"


# --- forged certificates --------------------------------------------------------


@pytest.mark.parametrize(
    ("authority", "spiffe_id"), [(A, B_ID), (B, A_ID)], ids=["A as B", "B as A"]
)
def test_a_federated_authority_cannot_mint_ids_of_another_domain(authority, spiffe_id):
    for forged in (
        authority.forge(spiffe_id),
        authority.intermediate(f"spiffe://{authority.trust_domain}").forge(spiffe_id),
        authority.intermediate(f"spiffe://{SpiffeId(spiffe_id).trust_domain}").forge(
            spiffe_id
        ),
    ):
        assert plain_verify(forged.chain_der, BOTH)  # one pool of roots lets it in
        assert_refused(forged.chain_der)


def test_both_domains_keep_their_own_ids_while_federated():
    for authority, spiffe_id in ((A, A_ID), (B, B_ID)):
        chain = authority.issue(spiffe_id).chain_der
        assert verify_peer(chain, BOTH, now=types.now()).id == spiffe_id


def test_adding_the_true_root_to_the_chain_helps_no_forger():
    assert_refused((*B.forge(A_ID).chain_der, *A.bundle))


def test_a_true_certificate_behind_a_forged_one_helps_no_forger():
    assert_refused((*B.forge(A_ID).chain_der, *A.issue(A_ID).chain_der))


@pytest.mark.parametrize(
    "flaws",
    [
        {"uris": [A_ID, "spiffe://a.example/ns/x/sa/admin"]},
        {"uris": [A_ID + "\n"]},
        {"key_usage": ["digital_signature", "crl_sign"]},
        {"key_usage": []},
        {"key_usage": None},
        {"key_usage_critical": False},
        {"extended": ["client"]},
        {"key": rsa.generate_private_key(65537, 1024)},
    ],
    ids=lambda flaws: " ".join(flaws),
)
def test_leaves_that_a_plain_verifier_accepts_are_refused(flaws):
    chain = A.forge(A_ID, **flaws).chain_der
    assert plain_verify(chain, A.bundles)
    assert_refused(chain)


@pytest.mark.parametrize(
    "flaws",
    [
        {"ca": True},
        {"key_usage": ["digital_signature", "key_cert_sign"]},
        {"extended": ["server"]},
    ],
    ids=lambda flaws: " ".join(flaws),
)
def test_leaves_that_could_sign_or_serve_only_are_refused(flaws):
    assert_refused(A.forge(A_ID, **flaws).chain_der)


def test_a_workload_cannot_sign_another_workloads_certificate():
    thief = A.issue(A_ID)
    stolen = sign_certificate(
        thief.key.public_key(),
        workload_name(),
        (types.now() - timedelta(minutes=1), types.now() + timedelta(minutes=1)),
        leaf_extensions(["spiffe://a.example/ns/x/sa/admin"]),
        issuer=workload_name(),
        issuer_key=thief.key,
    )
    assert_refused((stolen.public_bytes(Encoding.DER), *thief.chain_der))


def test_an_intermediate_that_is_a_workload_vouches_for_nobody():
    forged = A.intermediate("spiffe://a.example/ns/x/sa/signer").forge(A_ID)
    assert plain_verify(forged.chain_der, A.bundles)
    assert_refused(forged.chain_der)


def test_an_identity_out_of_its_time_is_refused_even_from_memory():
    svid = A.issue(A_ID, ttl_s=60)
    verifier = PeerVerifier(A.bundles)
    assert verifier.verify(svid.chain_der).id == A_ID
    for moment in (
        svid.not_after + timedelta(seconds=1),
        svid.not_before - timedelta(seconds=1),
    ):
        assert_refused(svid.chain_der, now=moment)
        with pytest.raises(Unauthenticated):
            verifier.verify(svid.chain_der, now=moment)


def test_a_replayed_certificate_with_another_key_is_no_identity():
    victim, thief = A.issue(A_ID), A.issue(A_ID)
    with pytest.raises(IdentityError, match="the private key is not the certificate's"):
        verified_svid(victim.chain_der, thief.key, A.bundles, now=types.now())


# --- the agent's sockets --------------------------------------------------------


@pytest.fixture
def directory():
    # Not under pytest's own directory, which other uids could not enter anyway.
    made = Path(tempfile.mkdtemp(prefix="zt-attack-"))
    yield made
    shutil.rmtree(made)


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
    with Agent(A, directory, rules()) as agent:
        assert fetch(agent.socket) == CLI
        with pytest.raises(grpc.RpcError) as caught:
            fetch(inner)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "not attested" in caught.value.details()
        # Without the look-up of the attested process, it would be anybody's:
        me = next(iter(agent._claims.living()))
        monkeypatch.setattr(Front, "caller", lambda self, peer: me)
        assert fetch(inner) == CLI


@pytest.mark.slow
def test_a_process_has_one_identity_for_its_whole_life(directory):
    with Agent(A, directory, rules()) as agent:
        said = run_child(agent, GATEWAY, CLI, "fetch", GATEWAY)
        assert said[0] == f"REGISTERED {GATEWAY}"
        assert f"is {GATEWAY} already and cannot become {CLI}" in said[1]
        assert said[2:] == [f"GOT {GATEWAY}", f"REGISTERED {GATEWAY}"]
        first_used = run_child(agent, "fetch", GATEWAY)
        assert first_used[0] == f"GOT {CLI}"
        assert f"is {CLI} already and cannot become {GATEWAY}" in first_used[1]


@pytest.mark.slow
def test_nobody_can_register_another_process(directory):
    with Agent(A, directory, rules()) as agent:
        with pytest.raises(IdentityError, match="expected op register"):
            admin(agent.admin_socket, {"op": "register", "id": GATEWAY, "pid": 1})
        run_child(agent, GATEWAY)
        assert fetch(agent.socket) == CLI  # another's registration is not ours


def test_a_registration_does_not_pass_to_a_process_with_the_same_pid(directory):
    with Agent(A, directory, rules()) as agent:
        register(agent.admin_socket, GATEWAY)
        (me,) = agent._claims.living()
        later = Process(me.pid, me.started + 1, me.uid, me.gid)
        assert agent._claims.identity_of(later) == CLI


@pytest.mark.slow
def test_a_ray_worker_can_be_neither_gateway_nor_developer(directory):
    def ask(worker_parent_known, *steps):
        parent = subprocess.Popen(  # stands for the raylet
            [sys.executable, "-c", PARENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        known = parent.pid if worker_parent_known else None
        with Agent(A, directory, rules(worker_parent=known), on_stop=list) as agent:
            command = "\0".join(child_command(agent, *steps))
            out, _ = parent.communicate(command, timeout=60)
        return out.splitlines()

    refused = ask(True, "fetch", GATEWAY, CLI, "stop", REPLICA, "fetch")
    assert "has registered no identity" in refused[0]
    assert f"a Ray worker, and none such may be {GATEWAY}" in refused[1]
    assert f"a Ray worker, and none such may be {CLI}" in refused[2]
    assert "is a Ray worker: it may not" in refused[3]
    assert refused[4:] == [f"REGISTERED {REPLICA}", f"GOT {REPLICA}"]
    # Where the agent does not know the workers' parent, they are as good as anybody:
    assert ask(False, GATEWAY, "fetch") == [f"REGISTERED {GATEWAY}", f"GOT {GATEWAY}"]


PARENT = """
import subprocess, sys
command = sys.stdin.read().split(chr(0))
grandchild = ["/bin/sh", "-c", '"$@"; exit 0', "sh", *command]
print(subprocess.run(grandchild, capture_output=True, text=True).stdout, end="")
"""


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
