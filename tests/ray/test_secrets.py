"""What Ray keeps of us: no key, no request, no weights.

Whoever can read Ray's tables, its object store, its logs or a process listing is told
nothing there. Each search also finds what is put there on purpose: it does look.
"""

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ray.processes import family
from ztserve import transport
from ztserve.artifacts import TrustPolicy, verify_model
from ztserve.identity.process import is_dumpable
from ztserve.serving.cluster import deploy

OPTIONS = {
    "ray_actor_options": {"num_cpus": 0.1},
    "graceful_shutdown_timeout_s": 2,
    "graceful_shutdown_wait_loop_s": 0.1,
}
KEY_HOLDERS = (
    "ray::SERVE_REPLICA",
    "ray::ServeReplica",
    "ray::AgentActor",
    "ray::DirectoryActor",
)
PEM = re.compile(rb"-----BEGIN (?:EC )?PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}")
# RFC 5915 inside RFC 5208, as the Workload API hands keys over; the curve's public
# point follows, which tells a key from the bare template in a library.
DER = re.compile(rb"(?s)\x02\x01\x01\x04\x20.{32}\xa1\x44\x03\x42\x00\x04")


@pytest.fixture(scope="module")
def marker():
    return f"marker-{secrets.token_hex(16)}"


@pytest.fixture(scope="module")
def pixels():
    """An input whose bytes appear nowhere else."""
    chosen = np.random.default_rng(secrets.randbits(64)).uniform(0, 16, (1, 64))
    return chosen.astype(np.float32)


@pytest.fixture(scope="module")
def weights(digits):
    trust = TrustPolicy.load(digits.artifacts.trust_policy)
    model = verify_model(digits.artifacts.registry, "digits:1", trust)
    content = max((t.numpy().tobytes() for _, t in model.tensors()), key=len)
    return [content[at : at + 48] for at in range(1024, len(content) - 1024, 12288)]


@pytest.fixture(scope="module")
def used(digits, models, developer, marker, pixels):
    """Both deployments, after calls with what must not be found."""
    from ray import serve

    deploy(models.Listener.options(**OPTIONS).bind(), name="listener")

    def client(service):
        return transport.Client(
            f"ml-inference/{service}",
            source=developer,
            directory=f"{digits.directory.host}:{digits.directory.port}",
            directory_id=digits.directory_id,
        )

    with client("listener") as listener, client("inference-service") as inference:
        for _ in range(20):
            assert listener.infer({"said": marker})["length"][0] == len(marker)
            inference.infer({"pixels": pixels})
    yield digits
    serve.delete("listener")


@pytest.fixture(scope="module")
def needles(marker, pixels, weights, developer):
    """What to look for, by what it would be."""
    key = developer.current().svid.key.private_numbers().private_value
    data = pixels.tobytes()
    return {
        "the developer's key": [key.to_bytes(32, "big")],
        "a request's text": [marker.encode()],
        "a request's tensor": [data[:32], data[-32:]],
        "weights": weights,
    }


def found(needles, pieces):
    """The names of what occurs in any of these bytes, and of keys of any owner."""
    names = set()
    for piece in pieces:
        names |= {"a key as PEM"} if PEM.search(piece) else set()
        names |= {"a P-256 key as DER"} if DER.search(piece) else set()
        names |= {
            name
            for name, looked_for in needles.items()
            if any(needle in piece for needle in looked_for)
        }
    return names


def ray_processes():
    """What Ray has started for this session, by command."""
    return {p: p.command() for p in family(os.getpid()) if p.pid != os.getpid()}


def control_plane():
    """Ray's processes, without those of ours that hold keys."""
    return {
        process: command
        for process, command in ray_processes().items()
        if not command.startswith(KEY_HOLDERS)
    }


def the_one(part):
    (process,) = [p for p, c in ray_processes().items() if part in c.split(" ")[0]]
    return process


def decoy(needles):
    """A text that is looked for, and was put somewhere on purpose."""
    text = f"decoy-{secrets.token_hex(16)}"
    return text, {"decoy": [text.encode()], **needles}


def readable(process):
    try:
        return next(process.memory(), None) is not None
    except PermissionError:
        pytest.skip("the kernel lets nobody here read other processes' memory")


def test_the_patterns_know_a_key_when_they_see_one(developer, needles):
    svid = developer.current().svid
    assert found(needles, [svid.key_pem()]) == {"a key as PEM"}
    assert found(needles, [svid.key_der()]) == {
        "a P-256 key as DER",
        "the developer's key",
    }


def test_rays_tables_hold_no_secret(used, needles):
    import ray

    gcs = the_one("gcs_server")
    assert readable(gcs)
    text, wanted = decoy(needles)
    ray.experimental.internal_kv._internal_kv_put(text, b"there")
    assert found(wanted, gcs.memory()) == {"decoy"}


def test_no_process_of_rays_holds_a_secret(used, needles):
    """Controller, raylet, dashboard, log monitor, idle workers: in memory neither."""
    planes = control_plane()
    assert {"ray::ServeController", "ray::IDLE"} & {
        c[:20].strip() for c in planes.values()
    }
    assert readable(the_one("raylet"))
    held = {}
    for process, command in planes.items():
        names = found(needles, process.memory())
        if names:
            held[command[:60].strip()] = names
    assert held == {}


def test_a_replicas_memory_holds_what_is_looked_for(used, needles):
    """The search is able to find it: in the one place where it belongs."""
    replicas = [
        process
        for process, command in ray_processes().items()
        if command.startswith("ray::ServeReplica:digits:") and readable(process)
    ]
    assert replicas
    for replica in replicas[:1]:
        pieces = replica.memory()
        assert any(needle in piece for piece in pieces for needle in needles["weights"])


def test_the_object_store_holds_no_secret(used, needles):
    import ray

    raylet = the_one("raylet")
    text, wanted = decoy(needles)
    kept = ray.put(np.frombuffer(text.encode() * 20_000, np.uint8))
    try:
        pieces = raylet.object_store()
        assert found(wanted, pieces) == {"decoy"}
    except PermissionError:
        pytest.skip("the kernel lets nobody here read what the raylet has open")
    finally:
        del kept


def test_command_lines_and_environments_hold_no_secret(used, needles):
    text, wanted = decoy(needles)
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "input()"],
        stdin=subprocess.PIPE,
        env={"DECOY": text},
    )
    try:
        (of_the_sleeper,) = family(sleeper.pid)
        shown = {}
        for process, command in {**ray_processes(), of_the_sleeper: ""}.items():
            try:
                shown[process] = [command.encode(), process.environment()]
            except PermissionError:
                shown[process] = [command.encode()]  # closed to its own user, even
        assert found(wanted, shown.pop(of_the_sleeper)) == {"decoy"}
        assert len(shown) > 5
        assert (
            found(wanted, [piece for pieces in shown.values() for piece in pieces])
            == set()
        )
    finally:
        sleeper.communicate(b"\n", timeout=10)


def test_rays_logs_hold_no_secret(used, needles):
    command = the_one("gcs_server").command()
    session = Path(re.search(r"--log_dir=(\S+)/logs", command)[1])
    files = [path for path in session.rglob("*") if path.is_file()]
    assert len(files) > 10
    text, wanted = decoy(needles)
    (session / "logs" / "decoy.txt").write_text(text)
    files.append(session / "logs" / "decoy.txt")
    assert found(wanted, map(Path.read_bytes, files)) == {"decoy"}


def test_our_audit_holds_no_secret_either(used, needles):
    files = list(used.audit.directory.glob("*.jsonl"))
    assert len(files) >= 4
    assert found(needles, map(Path.read_bytes, files)) == set()


def test_processes_that_hold_keys_are_closed_to_others(used):
    import ray

    dumpable = {}
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["name"].startswith(("SERVE_REPLICA::", "ztserve-")):
            actor = ray.get_actor(entry["name"], namespace=entry["namespace"])
            asked = actor.__ray_call__.remote(lambda _: (os.getpid(), is_dumpable()))
            pid, answer = ray.get(asked, timeout=30)
            dumpable[entry["name"]] = answer
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"Max core file size +0 +0 ", limits)
            if os.geteuid() != 0:
                with pytest.raises(PermissionError):
                    Path(f"/proc/{pid}/mem").read_bytes()
    kinds = {name.split("::")[0].rsplit("-", 2)[0] for name in dumpable}
    assert kinds == {"SERVE_REPLICA", "ztserve-agent", "ztserve-directory"}
    assert len(dumpable) == 2 + 1 + 2
    assert set(dumpable.values()) == {False}
