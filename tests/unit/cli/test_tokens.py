"""Verbs that sign with a key in a token (SoftHSM 2)."""

import json
import subprocess
import sys

import pytest

from tests.unit.artifacts.softhsm import PIN, soft_hsm
from tests.unit.cli.test_artifacts import on_terminal
from ztserve import config
from ztserve.artifacts import TrustPolicy
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.keys import public_pem

pytestmark = pytest.mark.slow


@pytest.fixture
def hsm():
    return soft_hsm()


@pytest.fixture
def trusted(ztserve, project, hsm):
    """A project that trusts the token's keys and no other."""
    text = "version = 1\n"
    for role in ("trainer", "evaluator", "deployer"):
        done = ztserve("key", "show", hsm.uri(role), "--role", role, "--entry")
        text += done.out
    config.load().artifacts.trust_policy.write_text(text)
    return project


def test_all_stages_sign_with_keys_of_a_token(ztserve, trusted, weights, hsm):
    signed = ztserve("sign", weights, "--key", hsm.uri("trainer"), "--json")
    assert (signed.code, signed.err) == (0, "")
    assert json.loads(signed.out)["key"] == hsm.key("trainer").id
    words = ("--metric", "accuracy=1", "--key", hsm.uri("evaluator"))
    assert ztserve("attest", weights, *words).code == 0
    bundle = (weights / "attestations/evaluation.sig").read_bytes()
    assert parse_envelope(bundle, what="it").key_id == hsm.key("evaluator").id
    key = ("--key", hsm.uri("deployer"))
    assert ztserve("publish", weights, "double:1", *key).code == 0
    shown = ztserve("verify", "double:1")
    assert "trainer as trainer" in shown.out
    assert "deployer as deployer" in shown.out


def test_a_policy_is_signed_with_a_roots_key_in_a_token(ztserve, trusted, hsm):
    policy = config.load().artifacts.trust_policy
    shown = ztserve("key", "show", hsm.uri("careful"), "--root")
    assert "signers" not in shown.out
    assert ztserve("sign", policy, "--key", hsm.uri("careful")).code == 0
    root = public_pem(hsm.key("careful").public).decode()
    assert len(TrustPolicy.load(policy, root=root).signers) == 3


def test_key_show_tells_the_key_id_and_the_entry(ztserve, project, hsm):
    done = ztserve("key", "show", hsm.uri("trainer"), "--role", "trainer")
    assert f"key id       {hsm.key('trainer').id}\n" in done.out
    assert 'name = "trainer"\n' in done.out
    assert "BEGIN PUBLIC KEY" in done.out


def test_a_pin_is_asked_for_on_the_terminal_and_not_shown(
    ztserve, trusted, weights, hsm
):
    uri = hsm.uri("trainer").partition("&pin-source")[0]
    code, shown = on_terminal(trusted, [PIN], "sign", str(weights), "--key", uri)
    assert code == 0
    assert "PIN of the token signing: |" in shown
    assert PIN not in shown
    assert (weights / "model.sig").exists()


def test_without_a_terminal_no_pin_is_asked_for(ztserve, trusted, weights, hsm):
    uri = hsm.uri("trainer").partition("&pin-source")[0]
    command = [sys.executable, "-m", "ztserve.cli", "sign", str(weights), "--key", uri]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "there is no terminal" in done.stderr
    assert "give pin-source=file:/path in the URI" in done.stderr


def test_a_passphrase_file_is_none_of_a_token(ztserve, trusted, weights, hsm):
    words = ("--key", hsm.uri("trainer"), "--passphrase-file", hsm.pin)
    done = ztserve("sign", weights, *words)
    assert done.code == 2
    assert "a token's PIN is in the file that pin-source=" in done.err


@pytest.mark.parametrize("action", ["new", "timestamp-authority"])
def test_a_key_in_a_token_is_made_by_its_own_tool(ztserve, empty, action):
    done = ztserve("key", action, "pkcs11:token=a;object=b?module-path=/x.so")
    assert done.code == 2
    assert "is made with the token's own tool, such as `pkcs11-tool" in done.err


def test_a_scheme_in_capitals_is_no_file(ztserve, project, weights):
    done = ztserve("sign", weights, "--key", "PKCS11:token=a;object=b")
    assert done.code == 2
    assert "a PKCS#11 URI begins with pkcs11: (RFC 7512)" in done.err


@pytest.mark.parametrize("verb", ["sign", "attest", "publish"])
def test_a_pin_on_the_command_line_is_refused(ztserve, project, published, verb):
    uri = "pkcs11:token=a;object=b?module-path=/x.so&pin-value=of-the-token"
    words = {
        "sign": (published,),
        "attest": (published, "--metric", "a=1"),
        "publish": (published, "double:2"),
    }
    done = ztserve(verb, *words[verb], "--key", uri)
    assert done.code == 2
    assert "pin-value would show the PIN to every process" in done.err
    assert "of-the-token" not in done.err
