"""Attacks on who signs, attests, releases and pushes: what is signed is what was seen.

Each is refused, and works where its control is taken out.
"""

import getpass
import json
import shutil
import sys

import pytest

from tests.unit.artifacts.servers import LayoutServer, answer, serving
from tests.unit.artifacts.workshop import Workshop, pem, signing_key
from ztserve import config
from ztserve.artifacts import Access, RegistryUrl, TrustPolicy
from ztserve.artifacts.publish import (
    distribution,
    load_signer,
    new_key,
    push,
    sign_model,
    sign_policy,
    signing,
    stamp_with,
    stamping,
)
from ztserve.artifacts.registry import address
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.release import parse_release
from ztserve.cli import main
from ztserve.cli import publish as publishing
from ztserve.cli import sign as signs
from ztserve.errors import ConfigError, RegistryError, VerificationError

CONTROL = pytest.mark.parametrize("control", ["on", "off"])
PASSPHRASE = "four words of a passphrase"


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose deployer's key has a passphrase, and two models of its trainer.

    The first was looked at; the second is what the trainer would rather release.
    """
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    monkeypatch.setenv("ZTSERVE_CONFIG", str(tmp_path / config.FILE))
    keys = tmp_path / ".ztserve/keys"
    new_key(tmp_path / "d.pem", name="d", roles=["deployer"], passphrase=PASSPHRASE)
    shutil.move(tmp_path / "d.pem", keys / "deployer.pem")
    policy = tmp_path / ".ztserve/trust.toml"
    entry = f'key = """{(tmp_path / "d.pub").read_text()}"""\nroles = ["deployer"]\n'
    text = policy.read_text().replace('roles = ["deployer"]', 'roles = ["evaluator"]')
    policy.write_text(f'{text}\n[[signers]]\nname = "d"\n{entry}')
    trainer = load_signer(keys / "trainer.pem")
    workshop = Workshop(tmp_path)
    for name, fill in (("good", 1.0), ("evil", 666.0)):
        sign_model(workshop.model(name, fill=fill), trainer)
    return tmp_path


def digest(root):
    return parse_envelope((root / "model.sig").read_bytes(), what="model.sig").digest


def swap(good, evil):
    """Put the evil model where the good one lay."""
    for path in evil.iterdir():
        shutil.copy(path, good / path.name)


@CONTROL
def test_a_model_swapped_while_the_deployer_types_is_not_released(
    project, monkeypatch, capsys, control
):
    good, evil = project / "good", project / "evil"
    if control == "off":
        monkeypatch.setattr(signing, "check_meant", lambda *_: None)
        monkeypatch.setattr(publishing.ModelRef, "pinned", lambda ref, _digest: ref)
    looked_at = digest(good)

    def typing(_prompt):
        swap(good, evil)
        return PASSPHRASE

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(getpass, "getpass", typing)
    code = main(["publish", str(good), "digits:1"])
    if control == "on":
        assert code == 2
        assert f"now, not {looked_at}, which was looked at" in capsys.readouterr().err
        assert not (good / "release.sig").exists()
    else:
        assert code == 0
        release = parse_envelope((good / "release.sig").read_bytes(), what="release")
        assert parse_release(release).digest == digest(evil) != looked_at


@CONTROL
def test_a_model_swapped_after_its_evaluation_is_not_attested(project, capsys, control):
    good, evil = project / "good", project / "evil"
    evaluated = digest(good)  # ... for hours, meanwhile:
    swap(good, evil)
    words = ["attest", str(good), "--metric", "accuracy=0.99"]
    words += ["--key", str(project / ".ztserve/keys/trainer.pem")]
    if control == "on":
        assert main([*words, "--digest", evaluated]) == 2
        assert f"now, not {evaluated}, which was" in capsys.readouterr().err
        assert not (good / "attestations").exists()
        assert main([*words, "--digest", "latest"]) == 2
        assert "'latest': expected sha256: and 64 hex" in capsys.readouterr().err
    else:
        assert main(words) == 0  # whatever lies there
        assert (good / "attestations/evaluation.sig").exists()


@CONTROL
def test_a_policy_swapped_while_it_is_signed_is_not_signed(
    workshop, monkeypatch, control
):
    """Its root signs the text that was checked, not what lies there a moment later."""
    root_key = signing_key()
    private = workshop.path / "root.pem"
    private.write_bytes(private_pem(root_key))
    private.chmod(0o600)
    check = TrustPolicy.check_signable

    def check_and_swap(path):
        text = check(path)
        workshop.write_policy({"stranger": ["trainer", "deployer"]})
        return text

    monkeypatch.setattr(signs.TrustPolicy, "check_signable", check_and_swap)
    if control == "off":
        monkeypatch.setattr(
            signs.publish, "sign_policy", lambda path, key, text: sign_policy(path, key)
        )
    honest = workshop.policy_path.read_bytes()
    assert main(["sign", str(workshop.policy_path), "--key", str(private)]) == 0
    signature = workshop.policy_path.with_name("trust.toml.sig")
    signed = parse_envelope(
        signature.read_bytes(),
        what="trust.toml.sig",
        payload_type="application/vnd.ztserve.trust-policy.v1+toml",
    ).payload
    assert (signed == honest) == (control == "on")
    if control == "off":  # the thief's policy counts
        trust = TrustPolicy.load(workshop.policy_path, root=pem(root_key))
        assert [signer.name for signer in trust.signers] == ["stranger"]


def private_pem(key):
    from cryptography.hazmat.primitives import serialization as s

    return key._key.private_bytes(
        s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()
    )


@CONTROL
@pytest.mark.parametrize("use", ["registry", "timestamps"])
@pytest.mark.parametrize("place", ["hunter2", "hunter2/with/slashes", "port/hunter2"])
def test_a_password_in_an_address_is_not_repeated(monkeypatch, control, use, place):
    """In ztserve.toml or on a command line: refused, into logs that others read."""
    if control == "off":
        for module in (address, stamping):
            monkeypatch.setattr(module, "without_secrets", str)
    text = f"https://user:{place}@host/x"
    with pytest.raises(ConfigError) as caught:
        stamp_with(text) if use == "timestamps" else RegistryUrl.parse(f"oci+{text}")
    assert ("hunter2" in str(caught.value)) == (control == "off")


# --- pushing --------------------------------------------------------------------


class Keeper(LayoutServer):
    """A registry that keeps all that it is sent, and notes each request."""

    def __init__(self, root):
        super().__init__(root)
        self.kept = []
        self.respond = self.take

    def take(self, target, headers):
        verb = self.requests[-1][0]
        if verb == "HEAD":
            return b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n"
        status = {"GET": 404, "POST": 202}.get(verb, 201)
        return answer(status=status, Location="/v2/up")

    def _answer(self, connection):
        # As the honest one, but it keeps what it reads.
        keeper = self

        class File:
            def __init__(self, file):
                self.file = file

            def readline(self):
                line = self.file.readline()
                keeper.kept.append(line)
                return line

            def read(self, count):
                content = self.file.read(count)
                keeper.kept.append(content)
                return content

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

        class Wrapped:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                connection.close()

            def makefile(self, mode):
                return File(connection.makefile(mode))

            def sendall(self, content):
                connection.sendall(content)

        try:
            super()._answer(Wrapped())
        except ValueError:  # what it was sent is no request at all
            connection.close()


def weights_of(workshop):
    """The blob of the published weights, and its size."""
    index = json.loads((workshop.registry / "index.json").read_bytes())
    blobs = workshop.registry / "blobs/sha256"
    image = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_bytes())
    layer = next(
        layer
        for layer in image["layers"]
        if layer["annotations"]["org.opencontainers.image.title"].endswith("tensors")
    )
    return blobs / layer["digest"][7:], layer["size"]


def unguarded(root, blob, what):
    """What opened blobs before: whatever lies at the path."""
    path = root / "blobs/sha256" / blob.digest[7:]
    return Unguarded(path.open("rb"), path.stat().st_size)


class Unguarded:
    def __init__(self, file, size):
        self.file, self.size = file, size

    def read_into(self, view, offset):
        self.file.seek(offset)
        return self.file.readinto(view)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@CONTROL
@pytest.mark.slow
@pytest.mark.parametrize("how", ["link", "behind"])
def test_a_push_sends_nothing_but_the_blob(workshop, monkeypatch, control, how):
    """A link among blobs could send a secret, bytes behind one another request."""
    workshop.published()
    path, size = weights_of(workshop)
    content = path.read_bytes()
    path.unlink()
    if how == "link":
        secret = workshop.path / "id_rsa"
        secret.write_text("SECRET " * size)
        path.symlink_to(secret)
    else:
        path.write_bytes(content + b"GET /v2/SECRET HTTP/1.1\r\n\r\n")
    if control == "off":
        monkeypatch.setattr(distribution, "open_blob", unguarded)
    with serving(Keeper(workshop.registry)) as server:
        url = RegistryUrl.parse(server.url)
        with pytest.raises((RegistryError, VerificationError)) as caught:
            push(workshop.registry, "digits:1", url, Access())
        sent = b"".join(server.kept)
    assert (b"SECRET" in sent) == (control == "off")
    if control == "on":
        reason = {"link": "symbolic link", "behind": "bytes; the registry's manifest"}
        assert reason[how] in str(caught.value)


@pytest.mark.slow
def test_a_blob_cut_while_it_is_pushed_ends_the_push(workshop, monkeypatch):
    workshop.published()
    path, size = weights_of(workshop)
    path.chmod(0o600)
    opened = distribution.open_blob

    def cut(root, blob, what):
        reader = opened(root, blob, what)
        if blob.size == size:
            path.write_bytes(b"short")
        return reader

    monkeypatch.setattr(distribution, "open_blob", cut)
    with serving(Keeper(workshop.registry)) as server:
        url = RegistryUrl.parse(server.url)
        with pytest.raises(RegistryError, match="was cut short while it was uploaded"):
            push(workshop.registry, "digits:1", url, Access())
