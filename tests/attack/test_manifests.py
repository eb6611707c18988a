"""Attacks on what a manifest says, each with its control in place and taken out.

Where the reference implementation takes what is refused here, it is shown to.
"""

import base64
import json
from contextlib import contextmanager

import model_signing
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.artifacts.test_interop import stock_key, stock_sign
from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts import open_registry, verify_model
from ztserve.artifacts.loading import loader
from ztserve.artifacts.publish import (
    model_statement,
    release_model,
    release_statement,
    sign_model,
    signing,
)
from ztserve.artifacts.statements import envelope, manifest, serialization
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import VerificationError

EIGHT = Serialization("sha256", 8)
LABELS = b"catcatcadogdogdohenhenhe"
"""Three shards of eight bytes."""


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


CONTROLS = {
    "closed world": (loader, "check_closed"),
    "digests": (loader, "check_digests"),
    "sizes": (loader, "check_sizes"),
    "names": (manifest, "check_names"),
    "ignored paths": (manifest, "check_ignored"),
    "tiling": (manifest, "check_tile"),
    "links": (serialization, "check_links"),
    "shards": (signing, "check_shards"),
}


@pytest.fixture
def without(monkeypatch):
    """Take controls out, by their names in `CONTROLS`."""

    def take_out(*controls):
        for control in controls:
            module, name = CONTROLS[control]
            monkeypatch.setattr(module, name, lambda *_, **__: None)

    return take_out


@contextmanager
def outcome(message):
    """The body is refused with this message; with None, it is not refused."""
    if message is None:
        yield
    else:
        with pytest.raises(VerificationError, match=message):
            yield


def stock_verify(workshop, root, hashing=None, *, ignore_unsigned=False):
    """Verify with the model-signing package; raises where it refuses."""
    _, public = stock_key(workshop, workshop.keys["trainer"])
    config = model_signing.verifying.Config().use_elliptic_key_verifier(
        public_key=public
    )
    config.set_ignore_unsigned_files(ignore_unsigned)
    if hashing is not None:
        config.set_hashing_config(hashing)
    config.verify(root, root / "model.sig")


def signed(workshop, how=EIGHT, folder="digits", **files):
    """A released model with labels.txt, signed as `how` says."""
    root = workshop.model(folder, files={"labels.txt": LABELS, **files})
    sign_model(root, workshop.keys["trainer"], serialization=how)
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    return root


def careless(workshop, root, change):
    """Sign and release again what `change` makes of the predicate and its root."""
    bundle = json.loads((root / "model.sig").read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement["predicate"])
    digests = [r["digest"] for r in statement["predicate"]["resources"]]
    digest = manifest.root_digest(digests)
    statement["subject"][0]["digest"]["sha256"] = digest
    workshop.force_sign(root, {}, statement=json.dumps(statement).encode())


# --- shards ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken_out", "message"),
    [
        ((), "'labels.txt' was changed.*: it has 30 bytes, its signed shards have 24"),
        (("sizes",), r"'labels.txt' was changed.*: it has 4 shards, signed were 3"),
        (("sizes", "digests"), None),
    ],
)
def test_bytes_behind_the_last_signed_shard(workshop, without, taken_out, message):
    root = signed(workshop)
    (root / "labels.txt").write_bytes(LABELS + b"poison")
    without(*taken_out)
    with outcome(message):
        model = verify_model(root, "digits", workshop.trust)
        assert model.read("labels.txt").endswith(b"poison")


@pytest.mark.parametrize("cut", [8, 12])
@pytest.mark.parametrize(
    ("taken_out", "message"),
    [
        ((), "its signed shards have 24"),
        (("sizes",), r"'labels.txt' was changed after signing"),
        (("sizes", "digests"), None),
    ],
)
def test_a_file_cut_at_or_within_a_shard(workshop, without, taken_out, message, cut):
    root = signed(workshop)
    (root / "labels.txt").write_bytes(LABELS[:cut])
    without(*taken_out)
    with outcome(message):
        model = verify_model(root, "digits", workshop.trust)
        assert model.read("labels.txt") == LABELS[:cut]


@pytest.mark.parametrize(
    ("taken_out", "message"),
    [((), "SHA-256 of its bytes 0 to 8 is .*signed was"), (("digests",), None)],
)
def test_shards_that_change_places(workshop, without, taken_out, message):
    root = signed(workshop)
    moved = LABELS[8:16] + LABELS[:8] + LABELS[16:]
    (root / "labels.txt").write_bytes(moved)
    without(*taken_out)
    with outcome(message):
        model = verify_model(root, "digits", workshop.trust)
        assert model.read("labels.txt") == moved


@pytest.mark.parametrize(
    ("taken_out", "message"),
    [
        ((), "'labels.txt:16:24' leaves a gap.* end at byte 8"),
        (("tiling",), "it has 3 shards, signed were 2"),
        (("tiling", "digests"), None),
    ],
)
def test_a_gap_between_shards_that_nobody_signed(workshop, without, taken_out, message):
    root = signed(workshop)

    def leave_out_the_middle(predicate):
        predicate["resources"] = [
            r for r in predicate["resources"] if r["name"] != "labels.txt:8:16"
        ]

    careless(workshop, root, leave_out_the_middle)
    (root / "labels.txt").write_bytes(LABELS[:8] + b"poisoned" + LABELS[16:])
    without(*taken_out)
    with outcome(message):
        model = verify_model(root, "digits", workshop.trust)
        assert b"poisoned" in model.read("labels.txt")


@pytest.mark.parametrize(
    "number", ["+8:16", "08:16", "8:1_6", " 8:16", "8:\u0661\u0666"]
)
def test_numbers_that_two_readers_read_differently(workshop, number):
    root = signed(workshop)

    def rewrite(predicate):
        for resource in predicate["resources"]:
            if resource["name"] == "labels.txt:8:16":
                resource["name"] = f"labels.txt:{number}"

    careless(workshop, root, rewrite)
    stock_verify(workshop, root)  # Python's int() takes them all
    with outcome("is not named path:start:end"):
        verify_model(root, "digits", workshop.trust)


@pytest.mark.parametrize(
    ("taken_out", "message"),
    [((), "extra file 'empty.txt'"), (("closed world",), None)],
)
def test_an_extra_empty_file_beside_shards(workshop, without, taken_out, message):
    root = signed(workshop)
    (root / "empty.txt").touch()
    stock_verify(workshop, root)  # an empty file has no shard
    without(*taken_out)
    with outcome(message):
        model = verify_model(root, "digits", workshop.trust)
        assert model.read("empty.txt") == b""


@pytest.mark.parametrize(
    ("taken_out", "message"),
    [((), "'empty.txt' is empty, and an empty file has no shard"), (("shards",), None)],
)
def test_an_empty_file_that_vanishes(workshop, without, taken_out, message):
    without(*taken_out)
    with outcome(message):
        root = workshop.model(files={"empty.txt": b""})
        sign_model(root, workshop.keys["trainer"], serialization=EIGHT)
        (root / "empty.txt").unlink()  # it was there when the trainer signed
        stock_verify(workshop, root)
        release_model(root, workshop.keys["deployer"], name="digits", version="1")
        assert "empty.txt" not in verify_model(root, "digits", workshop.trust).names


def test_an_empty_file_that_another_signer_left_out_of_its_shards(workshop):
    root = workshop.model(files={"empty.txt": b""})
    config = model_signing.hashing.Config().set_ignored_paths(
        paths=[root / "model.sig", root / "release.sig"]
    )
    stock_sign(workshop, root, config.use_shard_serialization(shard_size=8))
    bundle = parse_envelope((root / "model.sig").read_bytes(), what="model.sig")
    release = release_statement("digits", "1", bundle.digest)
    (root / "release.sig").write_bytes(workshop.keys["deployer"].envelope(release))
    with outcome("extra file 'empty.txt' .* is not signed"):
        verify_model(root, "digits", workshop.trust)


class Liar:
    """A registry before a true one that names other sizes, and counts what is read."""

    def __init__(self, registry, sizes):
        self._registry, self._sizes, self.opened = registry, sizes, 0

    def __getattr__(self, name):
        return getattr(self._registry, name)

    def files(self, model):
        return {**self._registry.files(model), **self._sizes}

    def open(self, model, name):
        self.opened += 1
        reader = self._registry.open(model, name)
        reader.size = self._sizes.get(name, reader.size)
        return reader


@pytest.mark.parametrize(
    ("taken_out", "message"),
    [((), "it has 65536 bytes, its signed shards have 24"), (("sizes",), "truncated")],
)
def test_a_registry_that_promises_endless_shards(workshop, without, taken_out, message):
    liar = Liar(open_registry(signed(workshop)), {"labels.txt": 1 << 16})
    without(*taken_out)
    with outcome(message):
        verify_model(liar, "digits", workshop.trust)
    assert bool(liar.opened) == bool(taken_out)  # refused before anything is opened


# --- which files ----------------------------------------------------------------


@pytest.mark.parametrize("how", [Serialization(), EIGHT], ids=lambda how: how.method)
@pytest.mark.parametrize("name", [".git/hook", ".github/x.yml", ".gitignore"])
@pytest.mark.parametrize(
    ("taken_out", "message"),
    [((), r"extra file '.git"), (("closed world",), None)],
)
def test_unsigned_files_of_git(workshop, without, how, name, taken_out, message):
    root = signed(workshop, how)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("evil")
    stock_verify(workshop, root)  # ignores all of git, always
    without(*taken_out)
    with outcome(message):
        assert verify_model(root, "digits", workshop.trust).read(name) == b"evil"


@pytest.mark.parametrize("how", [Serialization(), EIGHT], ids=lambda how: how.method)
@pytest.mark.parametrize(
    ("taken_out", "message"),
    [
        ((), "ignore_paths leaves 'labels.txt' unsigned: sign every file"),
        (("ignored paths",), "extra file 'labels.txt'"),
        (("ignored paths", "closed world"), None),
    ],
)
def test_a_file_on_the_signed_list_of_ignored(
    workshop, without, how, taken_out, message
):
    root = signed(workshop, how)

    def ignore(predicate):
        predicate["serialization"]["ignore_paths"].append("labels.txt")
        predicate["resources"] = [
            r for r in predicate["resources"] if "labels" not in r["name"]
        ]

    careless(workshop, root, ignore)
    (root / "labels.txt").write_bytes(b"evil")
    stock_verify(workshop, root)
    without(*taken_out)
    with outcome(message):
        model = verify_model(root, "digits", workshop.trust)
        assert model.read("labels.txt") == b"evil"


@pytest.mark.parametrize("how", [Serialization(), EIGHT], ids=lambda how: how.method)
@pytest.mark.parametrize(
    ("taken_out", "message"),
    [((), "the file name '../secret' is not canonical"), (("names",), None)],
)
def test_a_signed_path_that_leaves_the_model(
    workshop, without, how, taken_out, message
):
    root, secret = workshop.model(), workshop.path / "secret"
    secret.write_bytes(b"password")
    names = [*(p.name for p in root.iterdir()), "../secret"]
    digests = {}
    for name in names:
        content = (root / name).read_bytes()
        for start, end in how.spans(len(content)):
            made = how.new_hash()
            made.update(content[start:end])
            digests[how.resource(name, (start, end))] = made.hexdigest()
    statement = model_statement("digits", digests, serialization=how)
    workshop.force_sign(root, {}, statement=statement)
    if how.method == "files":
        stock_verify(workshop, root, ignore_unsigned=True)  # it reads ../secret
    listing = Liar(open_registry(root), {"../secret": 8})
    without(*taken_out)
    with outcome(message):
        model = verify_model(listing, "digits", workshop.trust)
        assert model.read("../secret") == b"password"


@pytest.mark.parametrize(
    ("taken_out", "message"),
    [
        ((), "allow_symlinks must be false: a link's target is not signed"),
        (("links",), "'.*sub' is, or leads through, a symbolic link"),
    ],
)
def test_a_linked_folder_that_its_signer_allowed(workshop, without, taken_out, message):
    root = workshop.model()
    (workshop.path / "sub").mkdir()
    (workshop.path / "sub/labels.txt").write_text("good")
    (root / "sub").symlink_to(workshop.path / "sub")

    def hashing():
        config = model_signing.hashing.Config().set_ignored_paths(
            paths=[root / "model.sig"]
        )
        return config.set_allow_symlinks(True).use_file_serialization(  # both count
            allow_symlinks=True
        )

    stock_sign(workshop, root, hashing())
    (workshop.path / "sub/labels.txt").write_text("evil")
    stock_verify(workshop, root, hashing())  # what is behind the link is not hashed
    without(*taken_out)
    with outcome(message):
        verify_model(root, "digits", workshop.trust, purpose="deploy")


def test_one_models_leave_to_ignore_does_not_reach_the_next(workshop):
    """The reference's Config keeps what the last bundle told it to ignore."""
    first, second = signed(workshop), signed(workshop, folder="second")
    careless(
        workshop,
        first,
        lambda p: p["serialization"]["ignore_paths"].append("junk.txt"),
    )
    _, public = stock_key(workshop, workshop.keys["trainer"])
    config = model_signing.verifying.Config().use_elliptic_key_verifier(
        public_key=public
    )
    (second / "junk.txt").write_text("evil")
    config.verify(first, first / "model.sig")
    config.verify(second, second / "model.sig")  # a fresh Config refuses it
    with pytest.raises(ValueError, match="Extra files found"):
        stock_verify(workshop, second)
    trust = workshop.trust
    with outcome("ignore_paths leaves 'junk.txt' unsigned"):
        verify_model(first, "digits", trust)
    with outcome("extra file 'junk.txt'"):
        verify_model(second, "digits", trust)


# --- what was signed, before v1.0 -----------------------------------------------


def test_a_statement_of_the_format_before_v1(workshop):
    """It has no list of what was hashed how; the reference still takes it."""
    root = workshop.model()
    subjects = []
    for path in sorted(root.iterdir()):
        made = Serialization().new_hash()
        made.update(path.read_bytes())
        subjects.append({"name": path.name, "digest": {"sha256": made.hexdigest()}})
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subjects,
        "predicateType": "https://model_signing/Digests/v0.1",
        "predicate": {"unused": ""},
    }
    payload = json.dumps(statement).encode()
    (root / "model.sig").write_bytes(workshop.keys["trainer"].envelope(payload))
    config = model_signing.hashing.Config().set_ignored_paths(
        paths=[root / "model.sig"]
    )
    stock_verify(workshop, root, config)
    with outcome(r"predicateType is 'https://model_signing/Digests/v0.1', expected"):
        verify_model(root, "digits", workshop.trust, purpose="deploy")


def old_pae(payload_type, payload):
    """What model-signing 0.2 signed, by mistake: the text that Python shows."""
    text = f"DSSEV1 {len(payload_type)} {payload_type} {len(payload)} {payload}"
    return text.encode()


@pytest.mark.parametrize(
    ("encode", "message"),
    [(envelope.pae, "the signature does not hold"), (old_pae, None)],
    ids=["ours", "the old one"],
)
def test_a_signature_over_another_encoding(workshop, monkeypatch, encode, message):
    root = signed(workshop)
    bundle = json.loads((root / "model.sig").read_bytes())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    signature = workshop.keys["trainer"]._key.sign(
        old_pae(envelope.IN_TOTO_TYPE, payload), ec.ECDSA(hashes.SHA256())
    )
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(
        signature
    ).decode()
    (root / "model.sig").write_text(json.dumps(bundle))
    stock_verify(workshop, root)
    monkeypatch.setattr(envelope, "pae", encode)
    with outcome(message):
        verify_model(root, "digits", workshop.trust, purpose="deploy")


# --- which model ----------------------------------------------------------------


@pytest.mark.parametrize("how", [Serialization(), EIGHT], ids=lambda how: how.method)
def test_files_that_change_names_are_another_model(workshop, how):
    """The format's own root digest is over contents alone: it stays the same."""
    first = signed(workshop, how, **{"a.txt": b"allow---", "b.txt": b"deny----"})
    second = signed(
        workshop, how, folder="second", **{"a.txt": b"deny----", "b.txt": b"allow---"}
    )

    def same_order(predicate):
        """The order of the first: only the names have changed."""
        by_name = {r["name"]: r for r in predicate["resources"]}
        names = list(by_name)
        a, b = (names.index(n) for n in names if n[:5] in ("a.txt", "b.txt"))
        names[a], names[b] = names[b], names[a]
        predicate["resources"] = [by_name[name] for name in names]

    careless(workshop, second, same_order)
    roots, digests = set(), set()
    for root in (first, second):
        bundle = parse_envelope((root / "model.sig").read_bytes(), what="model.sig")
        subject = json.loads(bundle.payload)["subject"][0]
        roots.add(subject["digest"]["sha256"])
        digests.add(verify_model(root, "digits", workshop.trust).digest)
    assert (len(roots), len(digests)) == (1, 2)
