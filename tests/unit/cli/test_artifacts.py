import base64
import json
import os
import pty
import re
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ztserve import config
from ztserve.artifacts import TrustPolicy
from ztserve.cli import signer


def test_key_new_writes_both_halves_and_prints_the_entry(ztserve, empty):
    done = ztserve("key", "new", "team.pem", "--role", "trainer", "--role", "evaluator")
    assert done.code == 0
    assert stat.S_IMODE((empty / "team.pem").stat().st_mode) == 0o600
    assert "key id       sha256:" in done.out
    entry = done.out.partition("# for the trust policy:\n")[2]
    (empty / "trust.toml").write_text("version = 1\n" + entry)
    (empty / "trust.toml").chmod(0o644)
    (signer,) = TrustPolicy.load(empty / "trust.toml").signers
    assert (signer.name, set(signer.roles)) == ("team", {"trainer", "evaluator"})
    assert "PRIVATE KEY" not in done.out


SECRET = "correct horse battery"


def secret(path, text=SECRET + "\n"):
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_key_with_a_passphrase_signs_and_publishes(ztserve, project, weights):
    file, words = secret(project / "p"), ("--role", "trainer", "--role", "deployer")
    done = ztserve("key", "new", "k.pem", *words, "--passphrase-file", file)
    assert "mode 0600, encrypted)" in done.out
    assert "ENCRYPTED" in (project / "k.pem").read_text()
    entry = done.out.partition("# for the trust policy:\n")[2]
    entry = entry.replace("k.pub", str(project / "k.pub"))
    (project / ".ztserve/trust.toml").write_text("version = 1\n" + entry)
    words = ("--key", "k.pem", "--passphrase-file", file)
    assert ztserve("sign", weights, *words).code == 0
    assert ztserve("publish", weights, "double:1", *words).code == 0
    assert ztserve("verify", "double:1").code == 0


@pytest.mark.parametrize("curve", ["P-384", "P-521"])
def test_key_new_takes_a_curve(ztserve, empty, curve):
    done = ztserve("key", "new", "k.pem", "--curve", curve)
    assert "not encrypted: no passphrase" in done.out
    pem = load_pem_private_key((empty / "k.pem").read_bytes(), None)
    assert pem.key_size == int(curve.removeprefix("P-"))


def test_a_passphrase_that_does_not_open_the_key_is_refused(ztserve, project, weights):
    ztserve("key", "new", "k.pem", "--passphrase-file", secret(project / "p"))
    wrong = secret(project / "wrong", "another passphrase")
    words = ("sign", weights, "--key", "k.pem", "--passphrase-file")
    done = ztserve(*words, wrong)
    assert done.code == 2
    assert "the passphrase is wrong" in done.err
    assert "another" not in done.err
    done = ztserve(*words, secret(project / "short", "short"), "--name", "x")
    assert "the passphrase is wrong" in done.err
    assert not (weights / "model.sig").exists()


def test_without_a_terminal_nothing_is_asked(ztserve, project, weights, monkeypatch):
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        done = ztserve("key", "new", "k.pem", "--ask-passphrase")
        assert done.code == 2
        assert "no terminal to ask for it on; give --passphrase-file" in done.err
        assert not (project / "k.pem").exists()
        ztserve("key", "new", "k.pem", "--passphrase-file", secret(project / "p"))
        done = ztserve("sign", weights, "--key", "k.pem")
    assert done.code == 2
    assert "passphrase of k.pem: there is no terminal" in done.err


def test_a_passphrase_comes_from_one_place(ztserve, empty):
    words = ("--ask-passphrase", "--passphrase-file", secret(empty / "p"))
    done = ztserve("key", "new", "k.pem", *words)
    assert done.code == 2
    assert "one is enough" in done.err


@pytest.mark.parametrize("words", [("key",), ("sign",), ("publish",)])
def test_no_passphrase_is_taken_from_the_command_line(ztserve, capsys, words):
    """Every process of the machine may read the words of a command."""
    with pytest.raises(SystemExit):
        ztserve(*words, "--help")
    offered = set(re.findall(r"--[a-z-]*pass[a-z-]*", capsys.readouterr().out))
    assert "--passphrase-file" in offered
    assert offered <= {"--passphrase-file", "--ask-passphrase"}


def on_terminal(cwd, answers, *words):
    """Run ztserve on a terminal of its own; return its code and all that it showed."""
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "ztserve.cli", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    for answer in answers:
        while not shown.endswith(b": "):
            shown += os.read(ours, 4096)  # EIO where it ended instead
        os.write(ours, answer.encode() + b"\n")
        shown += b"|"
    with suppress(OSError):  # EIO: the other end has gone
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    return running.wait(60), shown.decode()


@pytest.mark.slow
def test_a_passphrase_is_asked_for_on_the_terminal_and_not_shown(
    ztserve, project, weights
):
    make = ("key", "new", "k.pem", "--ask-passphrase")
    code, shown = on_terminal(project, [SECRET, SECRET + "x"], *make)
    assert code == 2
    assert "the two differ; nothing was made" in shown
    code, shown = on_terminal(project, [SECRET, SECRET], *make)
    assert code == 0
    assert "new passphrase of k.pem, again: " in shown
    code, more = on_terminal(project, [SECRET], "sign", str(weights), "--key", "k.pem")
    assert code == 0
    assert "passphrase of k.pem: " in more
    assert (weights / "model.sig").exists()
    assert "horse" not in shown + more


def test_key_new_never_overwrites_a_key(ztserve, empty):
    ztserve("key", "new", "team.pem")
    before = (empty / "team.pem").read_bytes()
    done = ztserve("key", "new", "team.pem")
    assert done.code == 2
    assert "a key is never overwritten" in done.err
    assert (empty / "team.pem").read_bytes() == before


def test_sign_publish_verify(ztserve, project, weights):
    signed = ztserve("sign", weights)
    assert signed.code == 0
    assert signed.out.startswith(f"signature\t{weights}/model.sig\ndigest\tsha256:")
    put = ztserve("publish", weights, "double:1", "--alias", "production")
    assert put.code == 0
    name, digest = put.out.split()
    assert name == "double:1"
    assert digest.startswith("sha256:")
    for ref in ("double", "double:1", "double@production", f"double@{digest}"):
        told = json.loads(ztserve("verify", ref, "--json").out)
        assert (told["model"], told["version"], told["digest"]) == (
            "double",
            "1",
            digest,
        )
        assert told["signers"] == [
            "development trainer as trainer",
            "development deployer as deployer",
        ]
        assert told["files"] == ["model.safetensors"]


def test_verify_prints_what_was_proved(ztserve, published):
    done = ztserve("verify", "double:1")
    assert done.code == 0
    assert "model\tdouble\n" in done.out
    assert "digest\tsha256:" in done.out


def test_verify_takes_a_signed_directory_for_deploying(ztserve, project, weights):
    ztserve("sign", weights)
    done = ztserve("verify", "double:1", "--from", weights, "--for", "deploy")
    assert done.code == 0
    assert ztserve("verify", "double:1", "--from", weights).code == 2  # not released


def tamper(project):
    """Flip a bit of the largest blob: the weights."""
    blobs = (project / ".ztserve/registry/blobs/sha256").iterdir()
    weights = max(blobs, key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(content)


def test_a_tampered_model_is_code_2_and_one_sentence(ztserve, project, published):
    tamper(project)
    done = ztserve("verify", "double:1")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("ztserve verify: ")
    assert "model.safetensors" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("ref", "complaint"),
    [
        ("other:1", "other"),
        ("double:2", "double:2"),
        ("double@staging", "staging"),
        ("double@sha256:" + "0" * 64, "0000"),
        ("Double", "model reference 'Double'"),
    ],
)
def test_what_is_not_there_is_refused(ztserve, published, ref, complaint):
    done = ztserve("verify", ref)
    assert (done.code, done.out) == (2, "")
    assert complaint in done.err


def test_a_strangers_signature_is_refused(ztserve, project, weights):
    ztserve("key", "new", "stranger.pem")
    ztserve("sign", weights, "--key", "stranger.pem")
    done = ztserve("publish", weights, "double:1")
    assert done.code == 2
    assert "none of the trust policy's signers" in done.err
    assert not (project / ".ztserve/registry").exists()


def test_another_trust_policy_may_trust_the_stranger(ztserve, project, weights):
    entry = ztserve("key", "new", "stranger.pem").out.partition("policy:\n")[2]
    (project / "trust.toml").write_text("version = 1\n" + entry)
    (project / "trust.toml").chmod(0o600)
    ztserve("sign", weights, "--key", "stranger.pem")
    words = ("verify", "double:1", "--from", weights, "--for", "deploy")
    assert ztserve(*words).code == 2
    assert ztserve(*words, "--trust", project / "trust.toml").code == 0


@pytest.mark.parametrize("ref", ["double", "double@production"])
def test_publish_without_a_version_is_refused(ztserve, project, weights, ref):
    ztserve("sign", weights)
    done = ztserve("publish", weights, ref)
    assert done.code == 2
    assert "a release needs a version: name:version" in done.err


def test_publish_of_unsigned_weights_is_refused(ztserve, project, weights):
    done = ztserve("publish", weights, "double:1")
    assert done.code == 2
    assert "is not signed" in done.err


def test_a_version_is_published_once(ztserve, project, published):
    (published / "note.json").write_text("{}")
    ztserve("sign", published)
    done = ztserve("publish", published, "double:1")
    assert done.code == 2
    assert "double:1" in done.err


def test_the_default_keys_are_those_of_the_project(ztserve, project, weights):
    for key in (config.load().state / "keys").iterdir():
        key.unlink()
    done = ztserve("sign", weights)
    assert done.code == 2
    assert "keys/trainer.pem: cannot be read" in done.err


def signed_as(weights):
    bundle = json.loads((weights / "model.sig").read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    said = statement["predicate"]["serialization"]
    return said["method"], said["hash_type"], said.get("shard_size")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ("files", "sha256", None)),
        (["--hash", "blake3"], ("files", "blake3", None)),
        (["--method", "shards"], ("shards", "sha256", 64 << 20)),
        (["--shard-size", "4MiB"], ("shards", "sha256", 4 << 20)),
        (["--method", "shards", "--shard-size", "100"], ("shards", "sha256", 100)),
        (["--method", "files"], ("files", "sha256", None)),
    ],
)
def test_sign_hashes_as_it_is_told(ztserve, project, weights, words, said):
    assert ztserve("sign", weights, *words).code == 0
    assert signed_as(weights) == said
    assert ztserve("verify", "d:1", "--from", weights, "--for", "deploy").code == 0


@pytest.mark.parametrize("words", [[], ["--method", "shards"]])
def test_sign_tells_what_it_signed(ztserve, project, weights, words):
    told = json.loads(ztserve("sign", weights, "--json", *words).out)
    size = (weights / "model.safetensors").stat().st_size
    verified = ("verify", "d:1", "--from", weights, "--for", "deploy", "--json")
    assert told == {
        "signature": f"{weights}/model.sig",
        "digest": json.loads(ztserve(*verified).out)["digest"],
        "key": signer.load(project / ".ztserve/keys/trainer.pem", None).id,
        "files": 1,
        "bytes": size,
        "method": "shards" if words else "files",
        "shard_size": 64 << 20 if words else None,
        "hash": "sha256",
    }
    lines = ztserve("sign", weights, *words).out.splitlines()
    assert f"bytes\t{size}" in lines
    assert ("shard size\t67108864" in lines) == bool(words)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--shard-size", "4MB"], "--shard-size '4MB': expected bytes, or a number"),
        (["--shard-size", "0"], "--shard-size '0': expected bytes"),
        (["--shard-size", "-1"], "--shard-size '-1': expected bytes"),
        (["--shard-size", "9999999GiB"], "expected a whole number of bytes from 1 to"),
        (["--method", "files", "--shard-size", "8"], "belongs to --method shards"),
    ],
)
def test_sign_says_what_it_cannot_hash(ztserve, project, weights, words, complaint):
    done = ztserve("sign", weights, *words)
    assert done.code == 2
    assert complaint in done.err
    assert not (weights / "model.sig").exists()


def test_sign_names_a_directory_that_is_not_there(ztserve, project):
    done = ztserve("sign", "nowhere")
    assert done.code == 2
    assert "nowhere" in done.err
