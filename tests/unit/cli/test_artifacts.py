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
    file, policy = secret(project / "p"), "version = 1\n"
    for role in ("trainer", "deployer"):
        words = ("--role", role, "--passphrase-file", file)
        done = ztserve("key", "new", f"{role}.pem", *words)
        assert "mode 0600, encrypted)" in done.out
        assert "ENCRYPTED" in (project / f"{role}.pem").read_text()
        entry = done.out.partition("# for the trust policy:\n")[2]
        policy += entry.replace(f"{role}.pub", str(project / f"{role}.pub"))
    (project / ".ztserve/trust.toml").write_text(policy)
    words = ("--passphrase-file", file)
    assert ztserve("sign", weights, "--key", "trainer.pem", *words).code == 0
    words += ("--key", "deployer.pem")
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
    first, *aliases = put.out.splitlines()
    name, digest = first.split()
    assert (name, aliases) == ("double:1", ["production: double:1"])
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


def test_publish_of_an_empty_folder_says_to_train_and_sign(ztserve, project):
    (project / "weights").mkdir()
    done = ztserve("publish", "weights", "double:1")
    assert (done.code, done.out) == (2, "")
    assert "weights is empty: save a model there, as safetensors, then" in done.err
    assert "`ztserve sign weights`" in done.err
    assert "ztserve publish`" not in done.err
    done = ztserve("publish", "nowhere", "double:1")
    assert done.code == 2
    assert "there is no folder nowhere" in done.err


def test_publishing_into_a_server_names_push_and_makes_no_folder(
    ztserve, project, weights
):
    ztserve("sign", weights)
    before = sorted(project.iterdir())
    server = "oci+https://me:secret@registry.example/models"
    done = ztserve("publish", weights, "double:1", "--registry", server)
    assert done.code == 2
    assert "`ztserve registry push double:1 --to SERVER`" in done.err
    assert "secret" not in done.err
    assert not (weights / "release.sig").exists()
    assert sorted(project.iterdir()) == before


def test_a_version_is_published_once(ztserve, project, published):
    (published / "note.json").write_text("{}")
    ztserve("sign", published)
    done = ztserve("publish", published, "double:1")
    assert done.code == 2
    assert "double:1" in done.err


def held(folder):
    """Return all that is in a folder, by name."""
    files = filter(Path.is_file, folder.rglob("*"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--key", ".ztserve/keys/trainer.pem"], "is trusted as trainer, not as depl"),
        (["--key", "stranger.pem"], "is none of the trust policy's signers"),
        (["--alias", "best one"], "best one"),
        (["--registry", "full"], "full is neither a registry nor empty"),
    ],
)
def test_a_publish_that_is_refused_leaves_all_as_it_was(
    ztserve, project, published, words, complaint
):
    ztserve("key", "new", "stranger.pem")
    (project / "full").mkdir()
    (project / "full/note").touch()
    before = held(project)
    done = ztserve("publish", published, "double:2", *words)
    assert (done.code, done.out) == (2, "")
    assert complaint in done.err
    assert held(project) == before
    assert ztserve("verify", "double:1", "--from", published).code == 0


def test_a_version_that_is_taken_leaves_the_release_of_another(
    ztserve, project, published
):
    (published / "note.json").write_text("{}")
    ztserve("sign", published)
    assert ztserve("publish", published, "double:2").code == 0
    before = held(project)
    done = ztserve("publish", published, "double:1")
    assert done.code == 2
    assert "double:1 already, with other content" in done.err
    assert held(project) == before
    assert ztserve("verify", "double:2", "--from", published).code == 0


def test_publish_tells_what_each_alias_meant_before(ztserve, published):
    words = ("--alias", "production", "--alias", "canary")
    done = ztserve("publish", published, "double:2", *words)
    assert done.out.splitlines()[0].startswith("double:2 sha256:")
    assert done.out.splitlines()[1:] == [
        "production: double:1 -> double:2",
        "canary: double:2",
    ]
    again = ztserve("publish", published, "double:2", *words)
    assert again.out.splitlines()[1:] == ["production: double:2", "canary: double:2"]
    told = json.loads(ztserve("verify", "double@production", "--json").out)
    assert told["version"] == "2"


def test_the_default_keys_are_those_of_the_project(ztserve, project, weights):
    for key in (config.load().state / "keys").iterdir():
        key.unlink()
    done = ztserve("sign", weights)
    assert done.code == 2
    assert "keys/trainer.pem: cannot be read" in done.err


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_public_key_signs_nothing_and_is_called_so(ztserve, project, weights, mode):
    ztserve("key", "new", "team.pem")
    (project / "team.pub").chmod(mode)
    done = ztserve("sign", weights, "--key", "team.pub")
    assert (done.code, done.out) == (2, "")
    assert "team.pub is a public key, expected a private key" in done.err
    assert "chmod" not in done.err
    assert not (weights / "model.sig").exists()


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
    assert "there is no folder nowhere" in done.err


# --- stages ---------------------------------------------------------------------

REQUIRED = """
[[require]]
predicate = "https://in-toto.io/attestation/test-result/v0.1"
roles = ["evaluator"]
minimum = { accuracy = 0.9 }
"""


@pytest.fixture
def evaluated(ztserve, project, weights):
    """Signed weights, an evaluator's key, and a policy that requires its word."""
    key = project / ".ztserve/keys/evaluator.pem"
    entry = ztserve("key", "new", key, "--role", "evaluator").out.partition(
        "policy:\n"
    )[2]
    policy = config.load().artifacts.trust_policy
    entry = entry.replace("evaluator.pub", "keys/evaluator.pub")
    policy.write_text(policy.read_text() + entry + REQUIRED)
    ztserve("sign", weights)
    return weights


@pytest.mark.slow
def test_a_model_is_deployed_once_it_is_attested(ztserve, evaluated):
    refused = ztserve("publish", evaluated, "double:1")
    assert refused.code == 2
    assert "stage attest (trust policy 1, [[require]] number 1" in refused.err
    assert "Mend: `ztserve attest`" in refused.err
    done = ztserve(
        "attest", evaluated, "--metric", "accuracy=0.97", "--minimum", "accuracy=0.9"
    )
    assert (done.code, done.out) == (0, f"{evaluated}/attestations/evaluation.sig\n")
    words = ("verify", "double:1", "--from", evaluated, "--for", "deploy")
    told = ztserve(*words)
    assert "/test-result/v0.1 PASSED accuracy 0.97\tevaluator as" in told.out
    assert "evaluator as evaluator (sha256:" in told.out
    assert "[[require]] number 1" in told.out
    checks = json.loads(ztserve(*words, "--json").out)["checks"]
    assert [check["stage"] for check in checks] == ["sign", "attest", "load"]
    assert ztserve("publish", evaluated, "double:1").code == 0
    checks = json.loads(ztserve("verify", "double:1", "--json").out)["checks"]
    assert [check["stage"] for check in checks] == ["sign", "deploy", "attest", "load"]


def test_publishing_writes_a_verification_summary(ztserve, published):
    bundle = json.loads(
        (published / "attestations/verification-summary.sig").read_text()
    )
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    summary = statement["predicate"]
    assert statement["predicateType"] == "https://slsa.dev/verification_summary/v1"
    assert summary["resourceUri"] == "urn:ztserve:model:double:1"
    assert summary["verificationResult"] == "PASSED"
    assert summary["policy"]["uri"] == "urn:ztserve:trust-policy:1"
    assert [i["uri"] for i in summary["inputAttestations"]] == [
        "urn:ztserve:statement:model.sig"
    ]


def test_a_poor_metric_is_attested_as_failed_and_refused(ztserve, evaluated):
    said = ztserve(
        "attest", evaluated, "--metric", "accuracy=0.5", "--minimum", "accuracy=1"
    )
    assert (said.code, said.err) == (0, "signed with the result FAILED\n")
    done = ztserve("publish", evaluated, "double:1")
    assert done.code == 2
    assert "its result is FAILED, not PASSED" in done.err


def test_data_and_other_predicates_are_attested(ztserve, evaluated, project):
    (project / "data.csv").write_text("1,2\n")
    (project / "p.json").write_text('{"anything": 1}')
    done = ztserve("attest", evaluated, "--result", "PASSED", "--data", "data.csv")
    assert done.code == 0
    uri = "https://slsa.dev/provenance/v1"
    words = ("--predicate", "p.json", "--predicate-type", uri, "--name", "provenance")
    assert ztserve("attest", evaluated, *words).code == 0
    bundle = json.loads((evaluated / "attestations/provenance.sig").read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert (statement["predicateType"], statement["predicate"]) == (
        uri,
        {"anything": 1},
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to attest: give --metric NAME=VALUE"),
        (("--metric", "accuracy"), "--metric 'accuracy': expected NAME=NUMBER"),
        (("--metric", "a=1", "--metric", "a=2"), "each name once"),
        (("--metric", "a=good"), "expected NAME=NUMBER"),
        (("--metric", "a=nan"), "NaN is not JSON"),
        (("--metric", "a=1", "--minimum", "b=1"), "there is no --metric b=VALUE"),
        (("--predicate", "p.json"), "--predicate-type URI go together"),
        (
            ("--predicate", "p.json", "--predicate-type", "a:b", "--result", "PASSED"),
            "is attested as it is: leave out the metrics",
        ),
        (
            ("--predicate", "ztserve.toml", "--predicate-type", "a:b"),
            "ztserve.toml is no predicate: not JSON",
        ),
        (("--result", "PASSED", "--name", "../x"), "cannot be the name of an attest"),
        (("--result", "PASSED", "--key", "no.pem"), "ztserve key new no.pem --role"),
    ],
)
def test_wrong_use_of_attest_says_what_is_right(ztserve, evaluated, words, message):
    done = ztserve("attest", evaluated, *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


# --- the trust root -------------------------------------------------------------


@pytest.fixture
def rooted(ztserve, project):
    """A policy whose keys stand within it, signed under a root."""
    ztserve("key", "new", "root.pem")
    policy = config.load().artifacts.trust_policy
    toml = project / "ztserve.toml"
    toml.write_text(toml.read_text().replace("# trust_root", "trust_root"))
    assert ztserve("sign", policy, "--key", "root.pem").code == 0
    return policy


def test_a_policy_is_signed_under_its_root(ztserve, rooted, published):
    assert ztserve("verify", "double:1").code == 0
    rooted.write_text(rooted.read_text() + "# edited\n")
    done = ztserve("verify", "double:1")
    assert done.code == 2
    assert "is not signed under the trust root" in done.err


def test_another_key_than_the_trust_root_signs_no_policy(ztserve, project, rooted):
    signature = rooted.with_name("trust.toml.sig")
    before = signature.read_bytes()
    trainer = config.load().state / "keys/trainer.pem"
    done = ztserve("sign", rooted, "--key", trainer)
    assert (done.code, done.out) == (2, "")
    assert f"whose trust_root is {project}/root.pub (sha256:" in done.err
    assert "this key is another (sha256:" in done.err
    assert signature.read_bytes() == before
    # A policy that is not ztserve.toml's may have another root.
    other = project / "other.toml"
    other.write_bytes(rooted.read_bytes())
    assert ztserve("sign", other, "--key", trainer).code == 0


@pytest.mark.parametrize("version", [1, 2])
def test_an_edited_policy_of_no_higher_version_is_not_signed(ztserve, rooted, version):
    text = rooted.read_text()
    rooted.write_text(text.replace("version = 1", "version = 2"))
    assert ztserve("sign", rooted, "--key", "root.pem").code == 0
    before = rooted.with_name("trust.toml.sig").read_bytes()
    edited = text.replace("version = 1", f"version = {version}") + "# edited\n"
    rooted.write_text(edited)
    done = ztserve("sign", rooted, "--key", "root.pem")
    assert (done.code, done.out) == (2, "")
    assert f"is version {version}, and {rooted}.sig signs another text" in done.err
    assert "raise the version, to 3 or more, and sign again" in done.err
    assert rooted.with_name("trust.toml.sig").read_bytes() == before
    rooted.write_text(edited.replace(f"version = {version}", "version = 3"))
    assert ztserve("sign", rooted, "--key", "root.pem").code == 0
    assert ztserve("sign", rooted, "--key", "root.pem").code == 0  # the same text
    assert TrustPolicy.load(rooted, root="root.pub").version == 3


def test_what_another_root_signed_is_signed_anew(ztserve, project, rooted):
    policy = project / "other.toml"
    policy.write_bytes(rooted.read_bytes())
    ztserve("key", "new", "second.pem", "--root")
    assert ztserve("sign", policy, "--key", "root.pem").code == 0
    policy.write_text(policy.read_text() + "# edited\n")
    assert ztserve("sign", policy, "--key", "root.pem").code == 2
    assert ztserve("sign", policy, "--key", "second.pem").code == 0
    (project / "other.toml.sig").write_text("{}")  # nobody's
    assert ztserve("sign", policy, "--key", "second.pem").code == 0


def test_an_older_policy_than_was_seen_is_refused(ztserve, rooted, published):
    config.follow_trust(config.load())  # as a replica does
    newer = rooted.read_text().replace("version = 1", "version = 2")
    old = [rooted.read_bytes(), rooted.with_name("trust.toml.sig").read_bytes()]
    rooted.write_text(newer)
    ztserve("sign", rooted, "--key", "root.pem")
    config.follow_trust(config.load())
    rooted.write_bytes(old[0])
    rooted.with_name("trust.toml.sig").write_bytes(old[1])
    done = ztserve("verify", "double:1")
    assert done.code == 2
    assert "is version 1, and this node has seen version 2" in done.err


def test_a_policy_is_not_signed_with_a_trainers_default_key(ztserve, project):
    done = ztserve("sign", config.load().artifacts.trust_policy)
    assert done.code == 2
    assert "name the root's key with --key" in done.err


def test_a_policy_with_keys_beside_it_is_not_signed(ztserve, project):
    ztserve("key", "new", "root.pem")
    ztserve("key", "new", "team.pem")
    policy = config.load().artifacts.trust_policy
    entry = '[[signers]]\nname = "team"\nkey = "../team.pub"\nroles = ["trainer"]\n'
    policy.write_text(policy.read_text() + entry)
    done = ztserve("sign", policy, "--key", "root.pem")
    assert done.code == 2
    assert "holds its keys as PEM text" in done.err
    assert f"{policy.parent}/../team.pub --role ROLE` prints the entry" in done.err


def test_nonsense_is_not_signed_as_a_policy(ztserve, project):
    (project / "p.toml").write_text("version = 0\n")
    ztserve("key", "new", "root.pem")
    done = ztserve("sign", "p.toml", "--key", "root.pem")
    assert done.code == 2
    assert "version must be a number from 1" in done.err
    assert not (project / "p.toml.sig").exists()


def test_a_folder_in_place_of_a_name_is_told_how_to_be_verified(
    ztserve, project, weights
):
    assert ztserve("sign", weights).code == 0
    done = ztserve("verify", "weights")
    assert done.code == 2
    assert "`ztserve verify NAME --from weights`" in done.err
    assert ztserve("verify", "double", "--from", "weights", "--for", "deploy").code == 0


# --- production, as docs/models.md walks through it --------------------------------


def walk():
    text = (Path(__file__).parents[3] / "docs/models.md").read_text()
    return text.partition("## Production, step by step")[2].split("```")[1][3:]


@pytest.fixture
def shell(empty, weights):
    """Run lines in bash, with ``ztserve`` on the path, in the folder of the weights."""
    program = empty / "bin/ztserve"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ztserve.cli "$@"\n')
    program.chmod(0o755)

    def run(lines):
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            cwd=empty,
            env={
                "PATH": f"{program.parent}:{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(sys.path),
                "HOME": str(empty),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            umask=0o022,
            timeout=120,
        )

    return run


@pytest.mark.slow
def test_the_walk_to_production_works_as_written(shell, empty):
    done = shell(walk())
    assert (done.returncode, done.stderr) == (0, "")
    assert "trainer as trainer" in done.stdout
    assert "deployer as deployer" in done.stdout
    trust = TrustPolicy.load(empty / "trust.toml", root=empty / "keys/root.pub")
    assert {s.name: set(s.roles) for s in trust.signers} == {
        "trainer": {"trainer"},
        "deployer": {"deployer"},
    }
    # What the root signed alone counts.
    done = shell("sed -i s/deployer/evaluator/ trust.toml; ztserve verify price:1")
    assert done.returncode == 2
    assert "is not signed under the trust root" in done.stderr


# --- showing keys ----------------------------------------------------------------


def test_key_show_tells_what_key_new_told(ztserve, empty):
    made = ztserve("key", "new", "team.pem", "--role", "evaluator")
    told = made.out.partition("key id ")[2]
    for file in ("team.pem", "team.pub"):
        shown = ztserve("key", "show", file, "--role", "evaluator")
        assert shown.out.partition("key id ")[2] == told
    entry = ztserve("key", "show", "team.pub", "--role", "evaluator", "--entry").out
    assert told.endswith(entry.strip() + "\n")
    assert entry.startswith("\n[[signers]]\n")


@pytest.mark.parametrize("file", ["evaluator.pem", "evaluator.pub"])
def test_an_entry_of_a_key_that_is_there_needs_its_role(ztserve, empty, file):
    ztserve("key", "new", "evaluator.pem", "--role", "evaluator")
    done = ztserve("key", "show", file, "--entry")
    assert (done.code, done.out) == (2, "")
    assert "say what the key signs as: --role trainer, --role evaluator or" in done.err
    shown = ztserve("key", "show", file)
    assert shown.code == 0
    assert "key id       sha256:" in shown.out
    assert "trust policy's entry, add --role trainer, --role evaluator" in shown.out
    assert "roles" not in shown.out


def test_the_key_of_a_root_has_no_entry_in_a_policy(ztserve, empty):
    done = ztserve("key", "new", "root.pem", "--root")
    assert done.out.endswith('toml:\n[artifacts]\ntrust_root = "root.pub"\n')
    assert "signers" not in done.out
    shown = ztserve("key", "show", "root.pub", "--root")
    assert "key id       sha256:" in shown.out
    assert "signers" not in shown.out
    for words in (("--role", "trainer"), ("--entry",)):
        done = ztserve("key", "show", "root.pub", "--root", *words)
        assert done.code == 2
        assert "a trust root has no role, and no entry in a policy" in done.err


def test_an_entry_is_shown_not_made(ztserve, empty):
    done = ztserve("key", "new", "team.pem", "--entry")
    assert done.code == 2
    assert "`ztserve key show`" in done.err
    assert not (empty / "team.pem").exists()


def test_a_name_that_is_no_text_is_refused(ztserve, empty):
    done = ztserve("key", "new", "team.pem", "--name", "a\udc80")
    assert done.code == 2
    assert "'a\\udc80' is not UTF-8" in done.err
    assert not (empty / "team.pem").exists()


@pytest.mark.parametrize("name", ['a "quoted" \\ name', "Zoë 🔑", "a\x7fb\nc"])
def test_an_entry_holds_any_name(ztserve, empty, name):
    ztserve("key", "new", "team.pem")
    words = ("key", "show", "team.pub", "--role", "trainer")
    entry = ztserve(*words, "--name", name, "--entry").out
    (empty / "trust.toml").write_text("version = 1\n" + entry)
    (empty / "trust.toml").chmod(0o644)
    (signer,) = TrustPolicy.load(empty / "trust.toml").signers
    assert signer.name == name
