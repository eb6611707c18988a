"""``ztserve sign`` with an SVID and timestamps, and ``ztserve key`` of an authority."""

import json
import stat

import pytest

from ztserve import config
from ztserve.artifacts import TrustPolicy
from ztserve.artifacts.statements.envelope import parse_envelope

CLI = "spiffe://dev.ztserve.internal/ns/dev/sa/cli"


def envelope(folder):
    return parse_envelope((folder / "model.sig").read_bytes(), what="model.sig")


@pytest.mark.slow
def test_sign_with_the_svid_of_the_agent(ztserve, project, agent, weights):
    """What is printed for the trust policy is all that it takes."""
    done = ztserve("sign", weights, "--svid")
    assert done.code == 0
    assert f"{weights}/model.sig" in done.out
    tables = done.err
    assert len(envelope(weights).chain) == len(envelope(weights).timestamps) == 1
    refused = ztserve("publish", weights, "double:1")
    assert refused.code == 2
    assert "no trust bundle for dev.ztserve.internal" in refused.err
    trust = config.load().artifacts.trust_policy
    trust.write_text(trust.read_text() + tables)
    assert ztserve("publish", weights, "double:1").code == 0
    assert "cli as trainer" in ztserve("verify", "double:1").out
    signed = TrustPolicy.load(trust).verify(envelope(weights), "trainer")
    assert signed.spiffe == CLI
    assert signed.timestamped_by == "development clock"
    # The roots of this day are archived, once.
    (archived,) = (project / ".ztserve/bundles").iterdir()
    assert stat.S_IMODE(archived.stat().st_mode) == 0o644
    again = ztserve("sign", weights, "--svid", "--json")
    assert again.err == ""
    told = json.loads(again.out)
    assert told["spiffe"] == CLI
    proven = TrustPolicy.load(trust).verify(envelope(weights), "trainer")
    assert told["serial"] == proven.serial
    assert told["timestamp"] == f"{proven.signed_at:%Y-%m-%dT%H:%M:%SZ}"
    told = json.loads(ztserve("sign", weights, "--json").out)
    assert not told.keys() & {"spiffe", "serial", "timestamp"}


def test_sign_with_an_svid_needs_an_agent(ztserve, project, weights):
    done = ztserve("sign", weights, "--svid")
    assert done.code == 2
    assert "nothing is running for the project" in done.err
    assert not (weights / "model.sig").exists()


def test_sign_with_an_svid_needs_a_timestamp_authority(
    ztserve, project, agent, weights
):
    (project / ".ztserve/keys/timestamp.pem").unlink()
    done = ztserve("sign", weights, "--svid")
    assert done.code == 2
    assert (
        "make a timestamp authority with `ztserve key timestamp-authority" in done.err
    )


def test_an_svid_and_a_key_are_one_too_many(ztserve, project, weights):
    done = ztserve("sign", weights, "--svid", "--key", "x.pem")
    assert done.code == 2
    assert "--svid and --key: choose what is to sign" in done.err


def test_a_keys_signature_is_stamped_where_it_is_asked_for(ztserve, project, weights):
    clock = project / ".ztserve/keys/timestamp.pem"
    assert ztserve("sign", weights, "--timestamp", clock).code == 0
    trust = TrustPolicy.load(config.load().artifacts.trust_policy)
    signed = trust.verify(envelope(weights), "trainer")
    assert signed.timestamped_by == "development clock"
    away = ztserve("sign", weights, "--timestamp", "http://127.0.0.1:1/")
    assert away.code != 0
    assert "timestamp authority http://127.0.0.1:1/: " in away.err


def test_key_makes_a_timestamp_authority(ztserve, empty):
    done = ztserve("key", "timestamp-authority", "clock.pem", "--name", "our clock")
    assert done.code == 0
    assert stat.S_IMODE((empty / "clock.pem").stat().st_mode) == 0o600
    assert "PRIVATE KEY" not in done.out
    ztserve("key", "new", "team.pem")
    signer = f'[[signers]]\nname="t"\nkey="{empty}/team.pub"\nroles=["trainer"]\n'
    entry = done.out.partition("# for the trust policy:\n")[2]
    (empty / "trust.toml").write_text("version = 1\n" + signer + entry)
    (empty / "trust.toml").chmod(0o644)
    (clock,) = TrustPolicy.load(empty / "trust.toml").timestamp_authorities
    assert clock.name == "our clock"
    again = ztserve("key", "timestamp-authority", "clock.pem")
    assert again.code == 2
    assert "an authority is never overwritten" in again.err


def test_a_timestamp_authority_has_no_role(ztserve, empty):
    done = ztserve("key", "timestamp-authority", "clock.pem", "--role", "trainer")
    assert done.code == 2
    assert "--role: a timestamp authority has none" in done.err
    assert not (empty / "clock.pem").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "role", "file"),
    [
        (
            ("attest", "--metric", "accuracy=1"),
            "evaluator",
            "attestations/evaluation.sig",
        ),
        (("publish", "double:1"), "deployer", "release.sig"),
    ],
)
def test_the_other_stages_sign_with_an_svid_too(
    ztserve, project, agent, weights, words, role, file
):
    assert ztserve("sign", weights).code == 0
    verb, *rest = words
    first = ztserve(verb, weights, *rest, "--svid")
    assert f'roles = ["{role}"]' in first.err
    trust = config.load().artifacts.trust_policy
    tables = first.err.partition("ztserve publish:")[0]
    trust.write_text(trust.read_text() + tables)
    done = ztserve(verb, weights, *rest, "--svid")
    assert (done.code, done.err) == (0, "")
    signed = parse_envelope((weights / file).read_bytes(), what=file)
    assert TrustPolicy.load(trust).verify(signed, role).spiffe == CLI
