"""Attacks on model artifacts: each is refused, and works where its control is off."""

import base64
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import model_signing
import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from tests.unit.artifacts.workshop import Workshop, pem, signing_key
from ztserve.artifacts import TrustPolicy, open_registry, verify_model
from ztserve.artifacts.loading import content, judging, loader
from ztserve.artifacts.publish import (
    model_statement,
    publish,
    release_model,
    release_statement,
    set_alias,
    sign_model,
    sign_policy,
)
from ztserve.artifacts.trust import policy
from ztserve.errors import (
    ArtifactError,
    ConfigError,
    RegistryError,
    VerificationError,
)
from ztserve.types import ModelRef

WEIGHTS = "model.safetensors"


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


@pytest.fixture
def without(monkeypatch):
    """Take a control out: `without("check_closed")`, of the loader and of others."""

    def take_out(name):
        module = next(m for m in (loader, judging, policy, content) if hasattr(m, name))
        monkeypatch.setattr(module, name, lambda *_, **__: None)

    return take_out


def refused(source, trust, message, ref="digits", **more):
    with pytest.raises(VerificationError, match=message):
        verify_model(source, ref, trust, **more)


def bias(model):
    return dict(model.tensors())["layer.bias"][0].item()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tamper(path):
    """Set the last number of a weight file to 666."""
    content = path.read_bytes()
    path.write_bytes(content[:-4] + struct.pack("<f", 666))


def stock_verify(workshop, root, **settings):
    """Verify with the model-signing package; raises ValueError where it refuses."""
    public = workshop.path / "trainer.pub"
    public.write_text(pem(workshop.keys["trainer"]))
    config = model_signing.verifying.Config().use_elliptic_key_verifier(
        public_key=public
    )
    if settings.get("ignore_unsigned"):
        config.set_ignore_unsigned_files(True)
    config.verify(root, root / "model.sig")


# --- who signed -----------------------------------------------------------------


def test_tampered_weights_are_refused(workshop, without):
    root = workshop.signed()
    tamper(root / WEIGHTS)
    refused(root, workshop.trust, r"'model.safetensors' was changed after signing")
    without("check_digests")
    weights = dict(verify_model(root, "digits", workshop.trust).tensors())
    assert max(t.max().item() for t in weights.values()) == 666


def test_an_unsigned_model_is_refused(workshop):
    root = workshop.model()
    refused(root, workshop.trust, r"is not signed: it has no model.sig.*ztserve sign")
    assert load_file(root / WEIGHTS)  # the stock loader asks for no signature


def test_a_model_signed_by_a_stranger_is_refused(workshop):
    root = workshop.model()
    sign_model(root, workshop.stranger)
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    refused(root, workshop.trust, r"none of the trust policy's signers")
    roles = {"stranger": ["trainer"], "deployer": ["deployer"]}
    assert verify_model(root, "digits", workshop.write_policy(roles))


def test_a_stranger_who_names_the_trainers_key_is_refused(workshop, without):
    root, own = workshop.signed(), workshop.model("own", fill=666.0)
    sign_model(own, workshop.stranger)
    bundle = json.loads((own / "model.sig").read_bytes())
    bundle["verificationMaterial"] = json.loads((root / "model.sig").read_bytes())[
        "verificationMaterial"
    ]
    (own / "model.sig").write_text(json.dumps(bundle))
    release_model(own, workshop.keys["deployer"], name="digits", version="1")
    refused(own, workshop.trust, "the signature does not hold")
    without("check_signature")
    assert bias(verify_model(own, "digits", workshop.trust)) == 666


@pytest.mark.parametrize("role", ["evaluator", "deployer"])
def test_a_signer_in_the_wrong_role_is_refused(workshop, role):
    root = workshop.model()
    sign_model(root, workshop.keys[role])
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    refused(root, workshop.trust, f"trusted as {role}, not as trainer")
    other = "evaluator" if role == "deployer" else "deployer"
    release_model(root, workshop.keys[other], name="digits", version="1")
    roles = {other: ["deployer"], role: ["trainer", "deployer"]}
    assert verify_model(root, "digits", workshop.write_policy(roles))


def test_a_trainer_cannot_release_its_own_model(workshop, without):
    root = workshop.model()
    sign_model(root, workshop.keys["trainer"])
    release_model(root, workshop.keys["trainer"], name="digits", version="1")
    refused(root, workshop.trust, "trusted as trainer, not as deployer")
    trust = workshop.write_policy({"trainer": ["trainer", "deployer"]})
    refused(root, trust, "signs as deployer, and acted as trainer for this model")
    without("check_separate")
    assert verify_model(root, "digits", trust)


def test_a_statement_of_another_kind_does_not_pass_for_a_manifest(workshop):
    root = workshop.signed()
    trust = workshop.write_policy(
        {"trainer": ["trainer"], "deployer": ["deployer", "trainer"]}
    )
    shutil.copy(root / "release.sig", root / "model.sig")
    refused(root, trust, r"predicateType is 'https://ztserve.dev/release/v1'")


def test_a_second_signature_is_refused(workshop):
    root = workshop.signed()
    bundle = json.loads((root / "model.sig").read_bytes())
    bundle["dsseEnvelope"]["signatures"].append({"sig": "AAAA", "keyid": ""})
    (root / "model.sig").write_text(json.dumps(bundle))
    stock_verify(workshop, root)  # looks at the first signature only
    refused(root, workshop.trust, "exactly one signature is expected, not 2")


def test_duplicate_keys_are_refused(workshop):
    root = workshop.model()
    good = model_statement("digits", {WEIGHTS: sha256(root / WEIGHTS)}).decode()
    twice = '{"predicate": {}, ' + good[1:]
    assert json.loads(twice) == json.loads(good)  # parsers differ on which one counts
    (root / "config.json").unlink()
    workshop.force_sign(root, {}, statement=twice.encode())
    stock_verify(workshop, root)  # the last one counts
    refused(root, workshop.trust, "duplicate JSON key 'predicate'")


def test_a_revoked_manifest_is_refused(workshop):
    root = workshop.signed()
    digest = verify_model(root, "digits", workshop.trust).digest
    tail = f'[revoked]\nmanifests = ["{digest}"]\n'
    refused(root, workshop.write_policy(tail=tail), f"revokes the model {digest}")


def test_a_revoked_key_is_refused(workshop):
    root = workshop.signed()
    assert verify_model(root, "digits", workshop.trust)
    tail = f'[revoked]\nkeys = ["{workshop.keys["trainer"].id}"]\n'
    refused(root, workshop.write_policy(tail=tail), "the signing key .* is revoked")


def test_an_expired_policy_trusts_nobody(workshop):
    root = workshop.signed()
    trust = workshop.write_policy(head="version = 1\nexpires = 2999-01-01T00:00:00Z")
    assert verify_model(root, "digits", trust)
    later = datetime(2999, 1, 1, tzinfo=UTC)
    refused(root, trust, "expired at 2999-01-01", now=later)
    with pytest.raises(ConfigError, match="expired at 2999-01-01"):
        TrustPolicy.load(workshop.policy_path, now=later)
    assert verify_model(root, "digits", workshop.write_policy(), now=later)  # endless


def test_an_edited_policy_is_refused_under_a_trust_root(workshop):
    root_key = signing_key()
    workshop.write_policy()
    sign_policy(workshop.policy_path, root_key)
    assert TrustPolicy.load(workshop.policy_path, root=pem(root_key))
    workshop.write_policy({"stranger": ["trainer", "deployer"]})
    assert TrustPolicy.load(workshop.policy_path)  # without a root nothing tells
    with pytest.raises(ConfigError, match="signs another text"):
        TrustPolicy.load(workshop.policy_path, root=pem(root_key))


def test_a_signed_policy_cannot_take_its_keys_from_files_beside_it(workshop):
    root_key, beside = signing_key(), workshop.path / "trainer.pub"
    beside.write_text(pem(workshop.keys["trainer"]))
    workshop.policy_path.write_text(
        'version = 1\n[[signers]]\nname = "trainer"\nkey = "trainer.pub"\n'
        'roles = ["trainer"]\n'
    )
    sign_policy(workshop.policy_path, root_key)
    beside.write_text(pem(workshop.stranger))  # signed by nobody, yet it would count
    found = TrustPolicy.load(workshop.policy_path)
    assert found.signers[0].key_id == workshop.stranger.id
    with pytest.raises(ConfigError, match="holds its keys as PEM text"):
        TrustPolicy.load(workshop.policy_path, root=pem(root_key))


# --- which model ----------------------------------------------------------------


def test_another_signed_model_under_this_name_is_refused(workshop, without):
    workshop.published(fill=1.0)
    workshop.published("fraud", "fraud", fill=2.0)
    index = workshop.registry / "index.json"
    nodes = json.loads(index.read_bytes())["manifests"]
    digits, fraud = (node["annotations"] for node in nodes)
    digits["dev.ztserve.model.name"] = "gone"
    fraud["dev.ztserve.model.name"] = "digits"
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": nodes}))
    refused(workshop.registry, workshop.trust, "asked for model 'digits'.*'fraud'")
    without("check_release")
    assert bias(verify_model(workshop.registry, "digits", workshop.trust)) == 2.0


def test_another_version_under_this_version_is_refused(workshop, without):
    workshop.published()
    index = workshop.registry / "index.json"
    index.write_text(index.read_text().replace('version": "1"', 'version": "2"'))
    refused(workshop.registry, workshop.trust, "signed as version '1'", "digits:2")
    without("check_release")
    assert verify_model(workshop.registry, "digits:2", workshop.trust).version == "1"


def test_a_release_of_another_manifest_is_refused(workshop, without):
    first, second = workshop.signed("a"), workshop.signed("b", fill=2.0)
    shutil.copy(first / "release.sig", second / "release.sig")
    refused(second, workshop.trust, "release.sig releases sha256:.*but the manifest")
    without("check_release")
    assert bias(verify_model(second, "digits", workshop.trust)) == 2.0


def test_files_mixed_from_two_signed_models_are_refused(workshop, without):
    first, second = workshop.signed("a"), workshop.signed("b", fill=2.0)
    shutil.copy(first / WEIGHTS, second / WEIGHTS)
    refused(second, workshop.trust, "was changed after signing")
    without("check_digests")
    assert bias(verify_model(second, "digits", workshop.trust)) == 1.0


def test_an_alias_that_flips_between_two_replicas_meets_a_pinned_digest(workshop):
    workshop.published("one", version="1", fill=1.0)
    registry = open_registry(workshop.registry)
    pinned = registry.resolve(ModelRef("digits@production")).ref
    workshop.published("two", version="2", fill=2.0)
    aliased = verify_model(registry, "digits@production", workshop.trust)
    assert bias(aliased) == 2.0  # the second replica alone would serve another model
    assert bias(verify_model(registry, pinned, workshop.trust)) == 1.0
    set_alias(workshop.registry, name="digits", alias="production", version="1")
    assert bias(verify_model(registry, "digits@production", workshop.trust)) == 1.0


# --- which files ----------------------------------------------------------------


def test_an_extra_file_is_refused(workshop, without):
    root = workshop.signed()
    (root / "extra.json").write_text('{"evil": 1}')
    refused(root, workshop.trust, r"extra file 'extra.json' .* is not signed")
    without("check_closed")
    assert b"evil" in verify_model(root, "digits", workshop.trust).read("extra.json")


@pytest.mark.parametrize("name", [".git/hooks/post", ".github/x", ".gitattributes"])
def test_an_extra_file_in_git_is_refused(workshop, name):
    root = workshop.signed()
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("evil")
    stock_verify(workshop, root)  # ignores all of .git, always
    refused(root, workshop.trust, f"extra file '{name}'")


def test_a_file_that_its_signer_left_unsigned_is_refused(workshop):
    root = workshop.model(files={"modeling.txt": b"good"})
    statement = json.loads(
        model_statement(
            "digits", {n: sha256(root / n) for n in (WEIGHTS, "config.json")}
        )
    )
    statement["predicate"]["serialization"]["ignore_paths"].append("modeling.txt")
    workshop.force_sign(root, {}, statement=json.dumps(statement).encode())
    (root / "modeling.txt").write_text("evil")
    stock_verify(workshop, root)
    refused(root, workshop.trust, "ignore_paths leaves 'modeling.txt' unsigned")


def test_a_path_that_leaves_the_model_is_refused(workshop):
    root = workshop.model()
    secret = workshop.path / "secret"
    secret.write_text("password")
    workshop.force_sign(
        root, {WEIGHTS: sha256(root / WEIGHTS), "../secret": sha256(secret)}
    )
    stock_verify(workshop, root, ignore_unsigned=True)  # reads ../secret
    refused(root, workshop.trust, r"the file name '../secret' is not canonical")


def test_a_symbolic_link_is_refused(workshop):
    root = workshop.signed()
    elsewhere = workshop.path / "elsewhere"
    shutil.move(root / WEIGHTS, elsewhere)
    (root / WEIGHTS).symlink_to(elsewhere)
    assert load_file(root / WEIGHTS)  # the stock loader follows it
    refused(root, workshop.trust, "symbolic link or special file")


def test_a_linked_folder_is_refused(workshop):
    root = workshop.signed(files={"sub/labels.txt": b"cat"})
    shutil.move(root / "sub", workshop.path / "sub")
    (root / "sub").symlink_to(workshop.path / "sub")
    refused(root, workshop.trust, "symbolic link or special file")


def test_a_link_in_a_registrys_blobs_is_refused(workshop):
    workshop.published()
    blobs = workshop.registry / "blobs/sha256"
    shutil.move(blobs, workshop.path / "blobs")
    blobs.symlink_to(workshop.path / "blobs")
    refused(workshop.registry, workshop.trust, "symbolic link or special file")


def test_a_fifo_neither_hangs_nor_passes(workshop):
    root = workshop.signed()
    (root / "config.json").unlink()
    os.mkfifo(root / "config.json")
    refused(root, workshop.trust, "symbolic link or special file")


# --- what is in the files -------------------------------------------------------


class Payload:
    """Unpickling it makes a directory: a harmless sign that code ran."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def signed_with(workshop, name, content):
    """A model with one more file that the trainer signed in good faith."""
    root = workshop.model(files={name: content})
    names = [p.name for p in root.iterdir()]
    workshop.force_sign(root, {n: sha256(root / n) for n in names})
    return root


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("extra.pt", r"extra.pt is a pickle \(suffix .pt\)"),
        ("extra.safetensors", r"is a pickle \(pickle .*save_file and sign"),
        ("extra.dat", r"is a pickle \(pickle "),
    ],
)
@pytest.mark.parametrize("before", [b"", b"I0x1\n0"])  # a prologue: push 1, pop it
@pytest.mark.parametrize("protocol", range(6))
def test_a_signed_pickle_is_refused_under_any_name(
    workshop, name, reason, before, protocol
):
    mark = workshop.path / "code-ran"
    root = signed_with(workshop, name, before + pickle.dumps(Payload(mark), protocol))
    refused(root, workshop.trust, reason)
    assert not mark.exists()
    pickle.loads((root / name).read_bytes())
    assert mark.exists()


@pytest.mark.slow
def test_a_configuration_that_leads_to_another_is_refused(workshop, monkeypatch):
    """transformers reads config.4.0.0.json where config.json says that it is newer."""
    transformers = pytest.importorskip("transformers")
    hidden = b'{"auto_map": {"AutoConfig": "evil/repository--config.Evil"}}'
    shown = b'{"configuration_files": ["config.4.0.0.json"]}'
    root = workshop.model(files={"config.json": shown, "config.4.0.0.json": hidden})
    names = [p.name for p in root.iterdir()]
    workshop.force_sign(root, {n: sha256(root / n) for n in names})
    refused(root, workshop.trust, "config.4.0.0.json asks for code by 'auto_map'")
    monkeypatch.setattr(content, "_CONFIGURATION", re.compile(r"config\.json\Z"))
    model = verify_model(root, "digits", workshop.trust)
    found, _ = transformers.PretrainedConfig.get_config_dict(str(model.directory()))
    assert found["auto_map"] == {"AutoConfig": "evil/repository--config.Evil"}


def test_a_torch_archive_renamed_to_safetensors_is_refused(workshop):
    torch.save({"a": torch.ones(2)}, workshop.path / "model.pt")
    archive = (workshop.path / "model.pt").read_bytes()
    root = signed_with(workshop, "other.safetensors", archive)
    refused(root, workshop.trust, r"other.safetensors is a pickle \(zip magic\)")
    taken = torch.load(io.BytesIO((root / "other.safetensors").read_bytes()))
    assert taken["a"].sum() == 2  # it asks for no name


def test_a_signed_configuration_that_fetches_code_is_refused(workshop, without):
    config = b'{"a": [{"auto_map": {"AutoModel": "evil--modeling.Evil"}}]}'
    root = signed_with(workshop, "model_config.json", config)
    refused(root, workshop.trust, "model_config.json asks for code by 'auto_map'")
    without("check_config")
    model = verify_model(root, "digits", workshop.trust)
    assert b"evil--modeling.Evil" in model.read("model_config.json")


@pytest.fixture
def uncontrolled(monkeypatch):
    """Take a control of what a model's JSON may say out: by its name."""
    return lambda name: monkeypatch.setattr(content, name, lambda *_: None)


def test_a_configuration_that_points_at_another_model_is_refused(
    workshop, uncontrolled
):
    beside = workshop.path / "unsigned"
    beside.mkdir()
    (beside / "config.json").write_text('{"hidden_size": 666}')
    adapter = json.dumps({"base_model_name_or_path": str(beside)}).encode()
    root = signed_with(workshop, "adapter_config.json", adapter)
    refused(root, workshop.trust, r"adapter_config.json points out of the model: 'base")
    uncontrolled("check_config")
    model = verify_model(root, "digits", workshop.trust)
    named = json.loads(model.read("adapter_config.json"))["base_model_name_or_path"]
    base = json.loads((Path(named) / "config.json").read_bytes())  # as a library does
    assert base["hidden_size"] == 666


def test_an_index_that_names_another_file_is_refused(workshop, uncontrolled):
    outside = workshop.path / "outside.safetensors"
    save_file({"layer.bias": torch.full((4,), 666.0)}, outside)
    index = {"weight_map": {"layer.bias": "../outside.safetensors"}}
    name = "model.safetensors.index.json"
    root = signed_with(workshop, name, json.dumps(index).encode())
    refused(root, workshop.trust, r"in '../outside.safetensors', which is no weight fi")
    uncontrolled("check_index")
    model = verify_model(root, "digits", workshop.trust)
    place = json.loads(model.read(name))["weight_map"]["layer.bias"]
    assert load_file(root / place)["layer.bias"][0] == 666  # what stock loaders do


def entry(start, end, shape=None, dtype="F32"):
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = json.dumps(entry(0, 16)).encode()
TAKEN_BY_THE_REFERENCE_PARSER = {
    "names twice": (
        safetensors(b'{"a":%b,"a":%b}' % (ONE, ONE), bytes(16)),
        "duplicate JSON key 'a'",
    ),
    "leading space": (safetensors(b"  {}"), "not a JSON object padded"),
    "trailing newline": (safetensors(b"{}\n"), "not a JSON object padded"),
    "extra field": (
        safetensors({"a": {**entry(0, 16), "x": 1}}, bytes(16)),
        "unknown field 'x'",
    ),
    "empty name": (safetensors({"": entry(0, 16)}, bytes(16)), "'' is not plain"),
    "path name": (
        safetensors({"../../x": entry(0, 16)}, bytes(16)),
        "'../../x' is not plain",
    ),
    "NUL in name": (safetensors({"a\0b": entry(0, 16)}, bytes(16)), "not plain"),
    "lookalike name": (
        safetensors({"a": entry(0, 16), "\u0430": entry(16, 32)}, bytes(32)),
        "not plain",
    ),
    "absurd shape": (
        safetensors({"a": entry(0, 0, [0, 1 << 60])}),
        "impossible shape",
    ),
    "BOOL of 2": (
        safetensors({"a": entry(0, 4, [4], "BOOL")}, b"\x02\x07\xff\x00"),
        "is BOOL but holds other bytes",
    ),
}
REFUSED_BY_ALL = {
    "empty": (b"", "of 0 bytes has no header"),
    "no header": (bytes(8), "not a JSON object"),
    "endless header": (struct.pack("<Q", 1 << 63) + b"{}", "a header of 92233"),
    "header > file": (safetensors({}, length=1000), "a header of 1000 bytes in"),
    "not UTF-8": (safetensors(b'{"\xff":1}'), "not UTF-8"),
    "array": (safetensors(b"[]"), "not a JSON object"),
    "deep": (safetensors(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "deep"),
    "overlap": (
        safetensors({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
        "'b' does not begin where",
    ),
    "hole": (
        safetensors({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)),
        "'b' does not begin where",
    ),
    "late start": (safetensors({"a": entry(4, 20)}, bytes(20)), "does not begin"),
    "end > file": (safetensors({"a": entry(0, 16)}, bytes(8)), "end at byte"),
    "trailing data": (safetensors({"a": entry(0, 16)}, bytes(20)), "end at byte"),
    "negative offset": (safetensors({"a": entry(-16, 0, [4])}), "something else"),
    "reversed": (safetensors({"a": entry(16, 0, [4])}, bytes(16)), "do not match"),
    "wrong shape": (safetensors({"a": entry(0, 16, [5])}, bytes(16)), "do not match"),
    "overflow": (
        safetensors({"a": entry(0, 16, [1 << 62, 1 << 62])}, bytes(16)),
        "impossible shape",
    ),
    "float in shape": (
        safetensors({"a": entry(0, 16, [4.0])}, bytes(16)),
        "something else than sizes",
    ),
    "unknown dtype": (
        safetensors({"a": entry(0, 16, dtype="F128")}, bytes(16)),
        "unknown dtype 'F128'",
    ),
    "no shape": (
        safetensors({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
        "'shape' is missing",
    ),
    "nested metadata": (
        safetensors({"__metadata__": {"a": {}}, "a": entry(0, 16)}, bytes(16)),
        "__metadata__ holds",
    ),
}


@pytest.mark.parametrize("case", TAKEN_BY_THE_REFERENCE_PARSER)
def test_a_header_that_the_reference_parser_takes_is_refused(workshop, case):
    content, reason = TAKEN_BY_THE_REFERENCE_PARSER[case]
    load(content)
    root = signed_with(workshop, "x.safetensors", content)
    refused(root, workshop.trust, f"x.safetensors is not sound safetensors: .*{reason}")


@pytest.mark.parametrize("case", REFUSED_BY_ALL)
def test_a_malformed_header_is_refused(workshop, case):
    content, reason = REFUSED_BY_ALL[case]
    root = signed_with(workshop, "x.safetensors", content)
    refused(root, workshop.trust, reason)


@pytest.mark.slow
def test_a_header_of_very_many_tensors_is_refused_quickly(workshop):
    many = safetensors({f"t{n}": entry(0, 0) for n in range((1 << 16) + 1)})
    root = signed_with(workshop, "x.safetensors", many)
    refused(root, workshop.trust, "65537 tensors; the limit is 65536")


def test_a_tensor_in_two_files_is_refused(workshop, without):
    other = (workshop.model("other", fill=2.0) / WEIGHTS).read_bytes()
    root = signed_with(workshop, "other.safetensors", other)
    refused(root, workshop.trust, "is both in .* and in ")
    without("_check_tensor_names")
    model = verify_model(root, "digits", workshop.trust)
    assert bias(model) == 2.0  # of the file that comes last in the alphabet


def test_weights_that_are_not_numbers_are_the_trainers_business(workshop):
    root = workshop.signed(fill=float("nan"))
    assert np.isnan(bias(verify_model(root, "digits", workshop.trust)))


# --- a registry that lies, a disk that changes ----------------------------------


def blob(workshop, name=WEIGHTS):
    source = workshop.path / "digits" / name
    return workshop.registry / "blobs/sha256" / sha256(source)


def test_a_swapped_blob_is_refused(workshop, without):
    workshop.published()
    path = blob(workshop)
    path.chmod(0o644)
    tamper(path)
    refused(workshop.registry, workshop.trust, "was changed after signing")
    without("check_digests")
    assert verify_model(workshop.registry, "digits", workshop.trust)


def test_a_truncated_blob_is_refused(workshop):
    workshop.published()
    path = blob(workshop)
    path.chmod(0o644)
    os.truncate(path, 100)
    refused(workshop.registry, workshop.trust, "has 100 bytes; .* manifest says")


def test_a_missing_blob_is_a_registry_error(workshop):
    workshop.published()
    blob(workshop).unlink()
    with pytest.raises(RegistryError, match=r"model.safetensors.* is missing"):
        verify_model(workshop.registry, "digits", workshop.trust)


def test_an_image_manifest_that_is_not_its_digest_is_a_registry_error(workshop):
    workshop.published()
    index = json.loads((workshop.registry / "index.json").read_bytes())
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    path = workshop.registry / "blobs/sha256" / digest
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"config.json", b"confog.json"))
    with pytest.raises(RegistryError, match="is not what its name says"):
        verify_model(workshop.registry, "digits", workshop.trust)


class Liar:
    """A registry in front of a true one that lies about the sizes of files."""

    def __init__(self, registry, size):
        self._registry, self._size = registry, size

    def __getattr__(self, name):
        return getattr(self._registry, name)

    def files(self, model):
        return dict.fromkeys(self._registry.files(model), self._size)

    def open(self, model, name):
        reader = self._registry.open(model, name)
        reader.size = self._size
        return reader


def test_a_registry_that_promises_more_than_there_is_memory_is_refused(workshop):
    liar = Liar(open_registry(workshop.signed()), 1 << 60)
    with pytest.raises(RegistryError, match="bytes of memory, more than the limit"):
        verify_model(liar, "digits", workshop.trust)


def test_a_registry_that_promises_more_than_it_has_is_refused(workshop):
    liar = Liar(open_registry(workshop.signed()), 1 << 20)
    refused(liar, workshop.trust, "is truncated: it ends after")


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_registry_that_promises_less_than_it_has_is_refused(workshop, size):
    liar = Liar(open_registry(workshop.signed()), size)
    refused(liar, workshop.trust, "was changed after signing|is truncated")


def test_an_endless_file_is_refused_before_it_is_read(workshop):
    root = workshop.signed()
    os.truncate(root / WEIGHTS, 1 << 42)  # sparse: costs the attacker nothing
    with pytest.raises(RegistryError, match="more than the limit"):
        verify_model(root, "digits", workshop.trust)


def test_a_giant_signature_is_refused_before_it_is_parsed(workshop):
    root = workshop.signed()
    os.truncate(root / "model.sig", 1 << 40)
    with pytest.raises(RegistryError, match=r"model.sig has .* more than the"):
        verify_model(root, "digits", workshop.trust)


def test_an_edit_after_loading_does_not_reach_the_tensors(workshop):
    root = workshop.signed()
    ours = dict(verify_model(root, "digits", workshop.trust).tensors())
    stock = load_file(root / WEIGHTS)
    with (root / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 666))
    assert max(t.max().item() for t in stock.values()) == 666  # follows the file
    assert max(t.max().item() for t in ours.values()) == 1


def test_a_check_before_the_load_leaves_a_gap_that_ours_does_not_have(workshop):
    root = workshop.signed()
    stock_verify(workshop, root)
    tamper(root / WEIGHTS)  # between the check and the load
    assert max(t.max().item() for t in load_file(root / WEIGHTS).values()) == 666
    refused(root, workshop.trust, "was changed after signing")


@pytest.mark.slow
def test_a_racing_writer_never_gets_a_wrong_byte_accepted(workshop):
    root = workshop.model()
    save_file({"w": torch.ones(1 << 16)}, root / WEIGHTS)
    sign_model(root, workshop.keys["trainer"])
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    good = (root / WEIGHTS).read_bytes()
    evil = good[: -(1 << 17)] + struct.pack("<f", 666) * (1 << 15)
    trust, stop = workshop.trust, threading.Event()

    def write():
        turn = 0
        while not stop.wait(0.0005):
            content = (good, evil)[turn % 2]
            if turn % 3:
                with (root / WEIGHTS).open("r+b") as file:
                    file.write(content)
            else:
                (workshop.path / "new").write_bytes(content)
                (workshop.path / "new").replace(root / WEIGHTS)
            turn += 1

    writer = threading.Thread(target=write)
    writer.start()
    accepted = 0
    try:
        for _ in range(400):
            with suppress(ArtifactError):
                tensors = dict(verify_model(root, "digits", trust).tensors())
                assert torch.equal(tensors["w"], torch.ones(1 << 16))
                accepted += 1
    finally:
        stop.set()
        writer.join()
    assert accepted < 400  # the writer did get in the way
    (root / WEIGHTS).write_bytes(good)
    assert verify_model(root, "digits", trust)


# --- the writing side -----------------------------------------------------------


def test_a_published_version_cannot_be_replaced(workshop, monkeypatch):
    workshop.published("one", version="1", fill=1.0)
    other = workshop.signed("two", version="1", fill=2.0)
    with pytest.raises(RegistryError, match=r"has digits:1 already, with other"):
        publish(other, workshop.registry, name="digits", version="1")
    monkeypatch.setattr(
        "ztserve.artifacts.publish.registry._check_not_taken", lambda *_: None
    )
    publish(other, workshop.registry, name="digits", version="1")
    assert bias(verify_model(workshop.registry, "digits:1", workshop.trust)) == 2.0


def test_a_tampered_directory_is_not_published(workshop):
    root = workshop.signed()
    tamper(root / WEIGHTS)
    with pytest.raises(VerificationError, match="was changed after signing"):
        publish(root, workshop.registry, name="digits", version="1")
    assert not workshop.registry.exists()


def test_a_signature_rewritten_by_a_stranger_is_the_same_model(workshop):
    """An ECDSA signature (r, s) can be turned into (r, n - s) without the key."""
    from cryptography.hazmat.primitives.asymmetric.utils import (
        decode_dss_signature,
        encode_dss_signature,
    )

    root = workshop.signed()
    before = verify_model(root, "digits", workshop.trust).digest
    raw = (root / "model.sig").read_bytes()
    bundle = json.loads(raw)
    signature = bundle["dsseEnvelope"]["signatures"][0]
    r, s = decode_dss_signature(base64.b64decode(signature["sig"]))
    n = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    signature["sig"] = base64.b64encode(encode_dss_signature(r, n - s)).decode()
    (root / "model.sig").write_text(json.dumps(bundle))
    assert (root / "model.sig").read_bytes() != raw
    assert verify_model(root, "digits", workshop.trust).digest == before


def test_a_release_for_a_name_cannot_be_moved_to_another_name(workshop, without):
    root = workshop.signed()
    digest = verify_model(root, "digits", workshop.trust).digest
    stolen = release_statement("payments", "1", digest)
    bundle = json.loads((root / "release.sig").read_bytes())
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(stolen).decode()
    (root / "release.sig").write_text(json.dumps(bundle))
    refused(
        root, workshop.trust, r"release.sig: the signature does not hold", "payments"
    )
    without("check_signature")
    assert verify_model(root, "payments", workshop.trust).name == "payments"
