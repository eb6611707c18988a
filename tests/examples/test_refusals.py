"""Every attack of `examples.refusals` is refused, and would be told if it were not."""

import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from examples.digits import Digits
from examples.refusals import Door, LetInError, tamper, weights, wire
from ztserve.artifacts import publish
from ztserve.artifacts.loading import judging, loader
from ztserve.errors import VerificationError
from ztserve.testing import serve

pytestmark = pytest.mark.slow

POLICIES = Path(__file__).parents[2] / "examples/policies"
SEED, DEVELOPER = POLICIES / "seed.yaml", POLICIES / "developer.yaml"
DOMAIN = "spiffe://dev.ztserve.internal"
ANYBODY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: anybody
  namespace: ml-inference
spec:
  rules:
    - from:
        - source:
            principals: ["*"]
"""

SAW = {
    wire.plain_tcp: ("connection closed", "not TLS"),
    wire.no_certificate: (
        "TLS alert: CERTIFICATE_REQUIRED",
        "no client certificate",
    ),
    wire.foreign_authority: ("TLS alert: INTERNAL_ERROR", "certificate not trusted"),
    wire.wrong_identity: ("Denied: this identity may not do this", "Denied"),
    wire.path_not_allowed: (
        "PERMISSION_DENIED: this identity may not do this",
        "Denied",
    ),
    wire.forged_caller: ("Denied: this identity may not do this", "Denied"),
    wire.malformed_tensor: (
        "InvalidInput: input 'pixels': expected 256 bytes for shape [1, 64], got 7",
        "InvalidInput",
    ),
    wire.not_a_number: (
        "InvalidInput: input 'pixels': element 7 is NaN; expected 0 to 16",
        "InvalidInput",
    ),
    wire.oversized_message: ("InvalidInput: the message has", "InvalidInput"),
    wire.denied_giant_body: ("Denied: this identity may not do this (", "Denied"),
}


def door_of(served) -> Door:
    return Door(
        served.address,
        served.server_id,
        gateway=served.authority.source(f"{DOMAIN}/ns/ml-api/sa/api-gateway"),
        stranger=served.authority.source(f"{DOMAIN}/ns/ml-inference/sa/batch-job"),
    )


@pytest.fixture(scope="module")
def served(trained_digits):
    with serve(
        Digits, model=trained_digits.directory, policies=(SEED, DEVELOPER)
    ) as running:
        yield running


def test_every_attack_on_the_wire_is_in_the_table():
    assert SAW.keys() == set(wire.ALL)


@pytest.mark.parametrize("attack", wire.ALL, ids=lambda attack: attack.__name__)
def test_the_attack_is_refused_with(served, attack):
    saw, audited = SAW[attack]
    refusal = attack(door_of(served))
    assert refusal.saw.startswith(saw)
    assert refusal.audited == audited
    assert len(refusal.title) < 40


def test_refused_calls_leave_a_record_with_the_error(served):
    before = len(served.records())
    expected = [attack(door_of(served)).audited for attack in wire.ALL[3:]]
    calls = [r for r in served.records()[before:] if r["class_uid"] == 6003]
    assert [r["status_code"] for r in calls] == expected
    assert {r["status"] for r in calls} == {"refused"}


def test_strangers_leave_a_record_with_cause_and_address(served):
    last = served.records()[-1]["seq"]
    causes = {attack(door_of(served)).audited for attack in wire.ALL[:3]}
    found, until = [], time.monotonic() + 5
    while {r["status_detail"].partition(":")[0] for r in found} != causes:
        assert time.monotonic() < until, found
        time.sleep(0.05)
        found = [r for r in served.records() if r["seq"] > last]
    assert {r["status_code"] for r in found} == {"handshake"}
    assert {r["src_endpoint"]["ip"] for r in found} == {"127.0.0.1"}


def test_what_a_stranger_claims_about_its_caller_is_dropped(served):
    wire.forged_caller(door_of(served))
    record = served.records()[-1]
    assert record["unmapped"]["caller"] is None
    assert "caller header dropped" in str(record)


@pytest.mark.parametrize(
    "attack",
    [wire.wrong_identity, wire.path_not_allowed, wire.forged_caller],
    ids=lambda attack: attack.__name__,
)
def test_an_attack_that_policy_lets_in_is_told(trained_digits, tmp_path, attack):
    policy = tmp_path / "anybody.yaml"
    policy.write_text(ANYBODY)
    policy.chmod(0o600)
    wide_open = serve(Digits, model=trained_digits.directory, policies=(policy,))
    with wide_open as served, pytest.raises(LetInError, match="was not refused"):
        attack(door_of(served))


def test_a_server_without_tls_is_told(served):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        door = door_of(served)
        plain = Door(f"127.0.0.1:{port}", door.server_id, door.gateway, door.stranger)
        with pytest.raises(LetInError, match="began to speak HTTP/2"):
            wire.plain_tcp(plain)
    finally:
        server.stop(0).wait(5)


@pytest.mark.parametrize("attack", [wire.no_certificate, wire.foreign_authority])
def test_a_server_that_asks_for_no_certificate_is_told(served, attack):
    door = door_of(served)
    svid = door.gateway.current().svid
    credentials = grpc.ssl_server_credentials([(svid.key_pem(), svid.chain_pem())])
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        open_to_all = Door(
            f"127.0.0.1:{port}", door.server_id, door.gateway, door.stranger
        )
        with pytest.raises(LetInError, match="began to speak HTTP/2"):
            attack(open_to_all)
    finally:
        server.stop(0).wait(5)


def test_a_server_that_is_away_has_refused_nothing(served):
    door = door_of(served)
    away = Door("127.0.0.1:1", door.server_id, door.gateway, door.stranger)
    with pytest.raises(ConnectionRefusedError):
        wire.plain_tcp(away)


# --- weights --------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory, trained_digits, trained_chat):
    """A registry with both models, and a trust policy."""
    base = tmp_path_factory.mktemp("project")
    new = [
        publish.new_key(base / f"{role}.pem", name=role, roles=[role])
        for role in ("trainer", "deployer")
    ]
    trainer, deployer = (publish.load_signer(key.private) for key in new)
    policy = base / "trust.toml"
    policy.write_text("version = 1\n" + "".join(key.entry for key in new))
    policy.chmod(0o600)
    for name, trained in (("digits", trained_digits), ("chat", trained_chat)):
        folder = base / name
        folder.mkdir()
        for file in ("model.safetensors", "config.json"):
            (folder / file).write_bytes((trained.directory / file).read_bytes())
        publish.sign_model(folder, trainer, name=name)
        publish.release_model(folder, deployer, name=name, version="1")
        publish.publish(folder, base / "registry", name=name, version="1")
    return base / "registry", policy


def test_tampered_weights_are_refused(project):
    registry, trust = project
    refusal = weights.tampered_weights(registry, "digits", trust)
    assert "'model.safetensors' was changed after signing" in refusal.saw
    assert refusal.audited == "VerificationError"


def test_tampered_weights_would_load_without_the_digests(project, monkeypatch):
    registry, trust = project
    monkeypatch.setattr(loader, "check_digests", lambda _manifest, _buffers: None)
    with pytest.raises(LetInError, match="tampered weights: was not refused"):
        weights.tampered_weights(registry, "digits", trust)


def test_an_unsigned_model_is_refused(project):
    registry, trust = project
    assert "is not signed" in weights.unsigned_model(registry, "digits", trust).saw


def test_another_signed_model_under_this_name_is_refused(project):
    registry, trust = project
    refusal = weights.another_signed_model(registry, "digits", "chat", trust)
    assert "asked for model 'digits'" in refusal.saw
    assert "signed as 'chat'" in refusal.saw


def test_another_signed_model_would_load_without_the_release(project, monkeypatch):
    registry, trust = project
    monkeypatch.setattr(judging, "check_release", lambda *_: None)
    with pytest.raises(LetInError, match="another signed model"):
        weights.another_signed_model(registry, "digits", "chat", trust)


def test_a_pickle_is_refused_though_it_is_signed():
    assert "model.pt is a pickle" in weights.pickle("digits").saw


def test_a_pickle_would_load_without_the_look_at_contents(monkeypatch):
    monkeypatch.setattr(loader, "check_suffixes", lambda _: None)
    monkeypatch.setattr(loader, "check_contents", lambda _: {})
    with pytest.raises(LetInError, match="pickle"):
        weights.pickle("digits")


def test_the_registry_that_is_attacked_is_a_copy(project):
    registry, trust = project
    for attack in (weights.tampered_weights, weights.unsigned_model):
        attack(registry, "digits", trust)
    assert weights.verify(registry, "digits@production", trust).version == "1"


def test_tampering_in_place_breaks_that_version_and_no_other(project, tmp_path):
    registry, trust = project
    tamper(registry, "chat", "1")
    with pytest.raises(VerificationError, match=r"'model\.safetensors' was changed"):
        weights.verify(registry, "chat:1", trust)
    assert weights.verify(registry, "digits:1", trust).name == "digits"
