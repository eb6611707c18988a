"""Attacks that hold up, fill up or flood whoever verifies: so that nothing is refused.

Each is answered, and works where its control is taken out.
"""

import base64
import fcntl
import json
import os
import resource
import threading
import time
import tracemalloc
from hashlib import sha256
from http.client import BadStatusLine
from urllib.request import urlopen

import pytest

from tests.unit.artifacts.servers import HttpServer, LayoutServer, serving
from tests.unit.artifacts.studio import Studio
from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts import Floor, FollowedPolicy, TrustPolicy, verify_model
from ztserve.artifacts.loading import judging
from ztserve.artifacts.publish import attestation_statement
from ztserve.artifacts.registry import files, layout
from ztserve.artifacts.statements import der, envelope, strict
from ztserve.artifacts.statements.attestation import TEST_RESULT
from ztserve.artifacts.trust import floor as floors
from ztserve.artifacts.trust import requirements, signers
from ztserve.errors import ConfigError, RegistryError, VerificationError

CONTROL = pytest.mark.parametrize("control", ["on", "off"])
NEEDS = f'[[require]]\npredicate = "{TEST_RESULT}"\nroles = ["evaluator"]\n'
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change uid")


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


# --- the trust policy -----------------------------------------------------------


@CONTROL
@pytest.mark.parametrize("suffix", ["", ".sig"])
@pytest.mark.slow
def test_a_pipe_in_place_of_the_policy_does_not_hold_up_its_follower(
    workshop, monkeypatch, control, suffix
):
    """Who waits for a pipe sees no revocation, nor that the policy expires."""
    followed = FollowedPolicy(workshop.policy_path, Floor(workshop.path / "state"))
    if control == "off":
        monkeypatch.setattr(
            "ztserve.artifacts.trust.following.read_guarded",
            type(workshop.path).read_bytes,
        )
    path = workshop.policy_path.with_name(workshop.policy_path.name + suffix)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    told = []

    def look():
        try:
            told.append(followed.look())
        except (ConfigError, OSError) as error:
            told.append(str(error))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(0.5)
    if control == "on":
        said = [f"{path} is not a regular file"] if suffix == "" else [None]
        assert told == said
    else:
        assert looking.is_alive()
        path.open("wb").close()  # let it go
        looking.join()


@ROOT_ONLY
@CONTROL
def test_a_policy_that_belongs_to_somebody_else_is_refused(
    workshop, monkeypatch, control
):
    """Whoever owns a file may write it, whatever its mode says."""
    os.chown(workshop.policy_path, 12345, 12345)
    if control == "on":
        with pytest.raises(ConfigError, match=r"belongs to uid 12345.*run chown 0 "):
            TrustPolicy.load(workshop.policy_path)
    else:
        monkeypatch.setattr(signers, "check_owned", lambda *_: None)
        assert TrustPolicy.load(workshop.policy_path)


@CONTROL
@pytest.mark.parametrize("rule", ["models", "min_versions"])
def test_a_rule_for_a_name_that_no_model_has_is_refused(
    workshop, monkeypatch, control, rule
):
    """One letter wrong, and what was to be required is required of nothing."""
    root = workshop.signed()
    tail = {
        "models": NEEDS + 'models = ["Digits"]\n',
        "min_versions": '[min_versions]\nDigits = "9"\n',
    }[rule]
    if control == "on":
        with pytest.raises(ConfigError, match="'Digits' is no name of a model"):
            workshop.write_policy(tail=tail)
    else:
        monkeypatch.setattr(requirements, "check_model_names", lambda *_: None)
        assert verify_model(root, "digits", workshop.write_policy(tail=tail))


@CONTROL
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_floor_that_others_can_remove_is_refused(
    workshop, monkeypatch, control, mode
):
    floor = Floor(workshop.path / "state")
    floor.keep(workshop.write_policy(head="version = 2"))
    floor.path.parent.chmod(mode)
    floor.path.unlink()  # as somebody else may
    old = workshop.write_policy(head="version = 1")
    if control == "on":
        with pytest.raises(ConfigError, match=rf"mode {mode:o}\): run chmod go-w"):
            floor.check(old)
    else:
        monkeypatch.setattr(floors, "check_folder", lambda _: None)
        floor.check(old)
    floor.path.parent.chmod(mode | 0o1000)  # sticky: nobody removes what is another's
    floor.check(old)


class Forgetful(FollowedPolicy):
    """Takes no policy that its node cannot remember."""

    def _take(self):
        policy = TrustPolicy.load(self._path)
        self._floor.keep(policy)
        self.policy = policy


def held_up(floor, how):
    """Keep the node from writing its floor; return how to end that."""
    if how == "locked":
        held = os.open(floor.path.with_suffix(".lock"), os.O_RDWR)
        fcntl.flock(held, fcntl.LOCK_EX)
        return lambda: os.close(held)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no byte more
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@CONTROL
@pytest.mark.parametrize("how", ["locked", "full"])
def test_a_full_disk_or_a_held_lock_does_not_undo_a_revocation(
    workshop, monkeypatch, control, how
):
    monkeypatch.setattr(floors, "LOCK_S", 0.01)
    floor = Floor(workshop.path / "state")
    kind = FollowedPolicy if control == "on" else Forgetful
    followed = kind(workshop.policy_path, floor)
    newer = workshop.write_policy(head="version = 2")
    let_go = held_up(floor, how)
    try:
        if control == "off":
            with pytest.raises(ConfigError):
                followed.look()
            let_go()
            assert followed.look() is None
            assert followed.policy.version == 1  # for good: the file is as it was
            return
        assert followed.look() == newer
        assert floor.seen().version == 1
        with pytest.raises(ConfigError, match=r"is locked by|too large: .*make room"):
            followed.look()
        assert followed.look() is None  # told once
    finally:
        if control == "on":
            let_go()
    assert followed.look() is None
    assert floor.seen().version == 2


# --- statements that nobody signed ----------------------------------------------


def littered(workshop, count, **predicate):
    """A good model, beside whose attestation lie others, by a stranger."""
    root = workshop.signed()
    workshop.evaluate(root)
    digest = envelope.parse_envelope(
        (root / "model.sig").read_bytes(), what="model.sig"
    ).digest
    litter = workshop.stranger.envelope(
        attestation_statement(
            digest, TEST_RESULT, {"result": "PASSED", "configuration": [], **predicate}
        )
    )
    assert len(litter) < 1 << 20
    for number in range(count):
        (root / f"attestations/stranger-{number}.sig").write_bytes(litter)
    return root


@CONTROL
@pytest.mark.slow
def test_attestations_that_nobody_signed_are_not_parsed(workshop, monkeypatch, control):
    """Each costs whoever parses it a second: a revocation would come minutes late."""
    root = littered(workshop, 6, x=[[]] * 180_000)
    trust = workshop.write_policy(tail=NEEDS)
    if control == "off":
        monkeypatch.setattr(judging, "check_signer", lambda *_: None)
    begun = time.process_time()
    assert verify_model(root, "digits", trust)
    spent = time.process_time() - begun
    assert spent < 0.5 if control == "on" else spent > 0.5


@pytest.mark.slow
@CONTROL
@pytest.mark.parametrize("signed", [True, False])
def test_an_attestation_does_not_flood_who_reads_the_refusal(
    workshop, monkeypatch, control, signed
):
    root = littered(workshop, 20, failedTests="\n\x1b[2J" + "A" * 300_000)
    (root / "attestations/evaluation.sig").unlink()
    roles = {"trainer": ["trainer"], "deployer": ["deployer"]}
    roles["stranger" if signed else "evaluator"] = ["evaluator"]
    trust = workshop.write_policy(roles, tail=NEEDS)
    if control == "off":
        monkeypatch.setattr(strict, "MAX_MESSAGE", 1 << 30)
        monkeypatch.setattr(requirements, "MAX_REASONS", 1 << 30)
    with pytest.raises(VerificationError, match="is not met: none by any") as caught:
        verify_model(root, "digits", trust)
    if control == "on":
        assert len(str(caught.value)) < 10_000
        assert "and 12 more that do not count" in str(caught.value)
    else:
        assert len(str(caught.value)) > (6_000_000 if signed else 3_000)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.slow
@CONTROL
def test_a_bundle_of_a_million_parts_takes_no_memory(workshop, monkeypatch, control):
    root = workshop.signed()
    (root / "model.sig").write_bytes(b'{"a":[' + b"{}," * 1_000_000 + b"{}]}")
    if control == "off":
        monkeypatch.setattr(envelope, "check_parts", lambda _: None)
    tracemalloc.start()
    with pytest.raises(VerificationError, match=r"no bundle|unknown field 'a'"):
        verify_model(root, "digits", workshop.trust)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20 if control == "on" else peak > 64 << 20


@pytest.mark.slow
@CONTROL
@pytest.mark.parametrize("where", ["status", "accuracy"])
def test_a_timestamp_with_a_giant_number_is_refused(
    tmp_path, monkeypatch, control, where
):
    """Python writes no number of over 4,300 digits: the refusal itself would fail."""
    studio = Studio(tmp_path)
    root = studio.signed()
    bundle = json.loads((root / "model.sig").read_bytes())
    kept = bundle["verificationMaterial"]["timestampVerificationData"]
    stamp = kept["rfc3161Timestamps"][0]
    raw = base64.b64decode(stamp["signedTimestamp"])
    giant = der.integer(1 << 20_000)
    if where == "status":
        raw = der.sequence(der.sequence(giant))
    else:
        raw = coarser(raw, giant)
    stamp["signedTimestamp"] = base64.b64encode(raw).decode()
    (root / "model.sig").write_text(json.dumps(bundle))
    if control == "on":
        with pytest.raises(VerificationError, match="an integer of 2501 bytes, the l"):
            verify_model(root, "digits", studio.trust)
    else:
        monkeypatch.setattr(der, "MAX_INTEGER_BYTES", 1 << 20)
        with pytest.raises(ValueError, match="Exceeds the limit") as caught:
            verify_model(root, "digits", studio.trust)
        assert not isinstance(caught.value, VerificationError)


def coarser(raw, seconds):
    """A timestamp whose authority's clock is as exact as `seconds`, an INTEGER."""

    def edit(element, path):
        if not path:
            parts = der.read_all(element.content, "TSTInfo")
            parts = [p.raw for p in parts]
            parts[5] = der.sequence(seconds)
            return der.element(element.tag, *parts)
        parts = der.read_all(element.content, "x")
        rest = [part.raw for part in parts]
        rest[path[0]] = edit(parts[path[0]], path[1:])
        return der.element(element.tag, *rest)

    return edit(der.read(raw, "x"), [1, 1, 0, 2, 1, 0, 0])


@pytest.mark.slow
@CONTROL
def test_an_attestation_under_an_impossible_name_is_no_reason_to_refuse(
    workshop, monkeypatch, control
):
    """Whoever may attach to an image could else keep it from being loaded."""
    workshop.published()
    trust = workshop.write_policy(tail=NEEDS)
    with serving(LayoutServer(workshop.registry)) as server:
        image = server.image("digits", "1")
        server.refer(image, "attestations/UPPER CASE.sig", b"{}")
        if control == "on":
            with pytest.raises(VerificationError, match="'UPPER CASE' cannot be the"):
                verify_model(server.url, "digits", trust)
        else:
            monkeypatch.setattr(judging, "Malformed", VerificationError)
            with pytest.raises(strict.Malformed):
                verify_model(server.url, "digits", trust)


@CONTROL
@pytest.mark.slow
def test_folders_without_files_are_counted(workshop, monkeypatch, control):
    """They are in no manifest, and cost whoever lists them as much as files."""
    root = workshop.signed()
    for number in range(200):
        (root / f"f/{number}").mkdir(parents=True)
    if control == "on":
        monkeypatch.setattr(files, "MAX_ENTRIES", 100)
        with pytest.raises(VerificationError, match="more than 100 files and folders"):
            verify_model(root, "digits", workshop.trust)
    else:
        assert verify_model(root, "digits", workshop.trust)


@CONTROL
def test_sizes_whose_sum_cannot_be_written_are_refused(workshop, monkeypatch, control):
    """Two of 4,300 digits: what adds them up could not say that they are too many."""
    workshop.published()
    if control == "off":
        monkeypatch.setattr(layout, "MAX_BLOB_BYTES", 10**4300)
    index = json.loads((workshop.registry / "index.json").read_bytes())
    (entry,) = index["manifests"]
    blobs = workshop.registry / "blobs/sha256"
    image = json.loads((blobs / entry["digest"][7:]).read_bytes())
    for layer in image["layers"][:2]:
        layer["size"] = 9 * 10**4299
    raw = json.dumps(image).encode()
    entry["digest"], entry["size"] = f"sha256:{sha256(raw).hexdigest()}", len(raw)
    (blobs / entry["digest"][7:]).write_bytes(raw)
    (workshop.registry / "index.json").write_text(json.dumps(index))
    if control == "on":
        with pytest.raises(RegistryError, match="is not usable: of 9000"):
            verify_model(workshop.registry, "digits", workshop.trust)
    else:
        with pytest.raises(ValueError, match="Exceeds the limit"):
            verify_model(workshop.registry, "digits", workshop.trust)


FAKE = "x\x1b[2J\nztserve verify: all is well"


@pytest.mark.parametrize("where", ["deep", "link", "extra", "index"])
def test_names_cannot_write_lines_of_their_own(workshop, where):
    """Into a terminal, or a log of plain lines."""
    root = workshop.signed()
    if where == "deep":
        (root / FAKE / ("a/" * 17)).mkdir(parents=True)
    elif where == "link":
        (root / FAKE).symlink_to("config.json")
    elif where == "extra":
        (root / FAKE).touch()
    else:
        root = workshop.registry
        workshop.published("other", name="other")
        index = json.loads((root / "index.json").read_bytes())
        index["manifests"][0]["annotations"]["dev.ztserve.model.name"] = FAKE
        (root / "index.json").write_text(json.dumps(index))
    with pytest.raises((VerificationError, RegistryError)) as caught:
        verify_model(root, "digits", workshop.trust)
    assert "all is well" in str(caught.value)  # quoted
    assert str(caught.value).isprintable()


# --- answers --------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_speaks_no_http_does_not_flood_the_log(workshop):
    said = b"\x1b[2Jx" * 10_000 + b"\r\n"
    with serving(HttpServer(lambda *_: said)) as server:
        with pytest.raises(RegistryError, match="no HTTP: BadStatusLine") as caught:
            verify_model(f"oci+http://{server.authority}", "digits", workshop.trust)
        assert len(str(caught.value)) < 500
        assert "\x1b" not in str(caught.value)
        with pytest.raises(BadStatusLine) as stock:
            urlopen(f"http://{server.authority}")
        assert len(str(stock.value)) > 40_000  # the stock client tells it all
