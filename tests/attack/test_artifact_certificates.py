"""Attacks on signatures by SVIDs, and on their time; each works without its control."""

import base64
import hashlib
import json
from datetime import UTC, datetime

import model_signing
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.unit.artifacts.studio import (
    DAY,
    MINUTE,
    PAST,
    TRAINER,
    Clock,
    Studio,
    stamps,
    timestamping,
)
from tests.unit.artifacts.workshop import pem, signing_key
from ztserve.artifacts import TrustPolicy, verify_model
from ztserve.artifacts.publish import (
    SvidKey,
    TimestampedSigner,
    release_model,
    sign_model,
)
from ztserve.artifacts.publish import timestamps as issuing
from ztserve.artifacts.publish.stamping import query
from ztserve.artifacts.statements import cms, der
from ztserve.artifacts.statements import timestamps as statements
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.trust import policy
from ztserve.artifacts.trust import timestamping as clocks
from ztserve.errors import ConfigError, VerificationError
from ztserve.identity.svid import pem as certificates_pem
from ztserve.testing.authority import ThrowAwayAuthority

NOON = PAST + 30 * MINUTE
EVENING = PAST + 120 * MINUTE
"""An hour after the SVID of `Studio` has expired."""


@pytest.fixture
def studio(tmp_path):
    return Studio(tmp_path)


@pytest.fixture
def without(monkeypatch):
    """Take a control out: `without(clocks, "check_purpose")`."""
    return lambda module, name: monkeypatch.setattr(module, name, lambda *_, **__: None)


def refused(root, trust, message):
    with pytest.raises(VerificationError, match=message):
        verify_model(root, "digits", trust)


def accepted(root, trust):
    trainer, _ = verify_model(root, "digits", trust).signers
    return trainer


def stock_accepts(studio, root, roots=None):
    """The model-signing package accepts it: it asks neither who signed nor when."""
    path = studio.path / "roots.pem"
    path.write_bytes(certificates_pem(roots or studio.spire.bundle))
    config = model_signing.verifying.Config()
    config.use_certificate_verifier(certificate_chain=[path])
    config.verify(root, root / "model.sig")


def judged_in_its_life(monkeypatch):
    """Take out the time: judge each chain when its leaf was fresh, as the stock."""
    real = policy.verify_svid
    monkeypatch.setattr(
        policy, "verify_svid", lambda e, b, _, proven: real(e, b, NOON, proven=proven)
    )


# --- the matrix of time -----------------------------------------------------------


def test_an_expired_svid_counts_by_its_timestamp(studio):
    trainer = accepted(studio.signed(at=NOON), studio.trust)
    assert (trainer.spiffe, trainer.signed_at) == (TRAINER, NOON)
    assert trainer.timestamped_by == "clock-0"


def test_an_expired_svid_without_a_timestamp_is_refused(studio, monkeypatch):
    root = studio.signed(at=None)
    stock_accepts(studio, root)
    refused(
        root,
        studio.trust,
        r"\(now, as no timestamp .* says when it was\): .*not valid at",
    )
    judged_in_its_life(monkeypatch)
    assert accepted(root, studio.trust)


def test_a_timestamp_proves_nothing_where_no_authority_is_named(studio):
    root = studio.signed(at=NOON)
    assert accepted(root, studio.trust)
    refused(root, studio.write_policy(clocks=[]), "the signer's certificate, judged at")


def test_a_stolen_key_stamped_after_the_svid_expired_is_refused(studio, monkeypatch):
    root = studio.signed(at=EVENING)
    stock_accepts(studio, root)
    refused(
        root,
        studio.trust,
        rf"judged at {EVENING:%Y-%m-%d %H:%M:%S} UTC \(the time of its timestamp\)",
    )
    judged_in_its_life(monkeypatch)
    assert accepted(root, studio.trust)


def test_an_svid_of_another_id_is_refused(studio):
    replica = "spiffe://example.test/ns/ml/sa/replica"
    root = studio.signed(svid=studio.spire.issue(replica, ttl_s=3600))
    stock_accepts(studio, root)
    refused(root, studio.trust, f"signed by {replica}, which is none of the trust pol")
    assert accepted(root, studio.write_policy(who=replica))


def test_a_timestamp_of_another_signature_is_refused(studio, without):
    root = studio.signed(at=EVENING)
    bundle, other = (
        json.loads(path.read_bytes())
        for path in (
            root / "model.sig",
            studio.signed("other", at=NOON) / "model.sig",
        )
    )
    stamp = other["verificationMaterial"]["timestampVerificationData"]
    bundle["verificationMaterial"]["timestampVerificationData"] = stamp
    (root / "model.sig").write_text(json.dumps(bundle))
    stock_accepts(studio, root)
    refused(root, studio.trust, "the timestamp is that of another signature")
    without(statements, "check_imprint")
    assert accepted(root, studio.trust)


def test_a_timestamp_of_the_future_is_refused(studio, without):
    ahead = datetime.now(UTC) + 30 * DAY
    starts_s = (ahead - PAST).total_seconds() - 60
    roots = ThrowAwayAuthority("example.test", root_ttl_s=1e9, clock=lambda: PAST)
    svid = roots.forge(TRAINER, starts_s=starts_s, ends_s=starts_s + 3600)
    root = studio.signed(svid=svid, at=ahead)
    trust = studio.write_policy(roots=certificates_pem(roots.bundle).decode())
    refused(root, trust, "which is yet to come: the authority's clock, or ours, is wro")
    without(clocks, "check_not_ahead")
    assert accepted(root, trust)


@pytest.mark.parametrize(
    "extensions",
    [
        timestamping(()),
        timestamping([ExtendedKeyUsageOID.CODE_SIGNING]),
        timestamping(critical=False),
        timestamping(
            [ExtendedKeyUsageOID.TIME_STAMPING, ExtendedKeyUsageOID.CLIENT_AUTH]
        ),
    ],
    ids=["no use", "another use", "not critical", "a use beside"],
)
def test_a_certificate_that_is_not_for_timestamping_is_refused(
    studio, without, extensions
):
    clock = Clock(extensions=extensions)
    root = studio.signed(authority=clock.authority)
    trust = studio.write_policy(clocks=[clock.root_pem])
    refused(root, trust, "not for timestamping: expected the critical extended key")
    without(clocks, "check_purpose")
    assert accepted(root, trust)


def test_a_signer_who_stamps_its_own_time_is_refused(studio, without):
    clock = Clock(key=studio.svid.key)  # its root certified the trainer's own key
    root = studio.signed(authority=clock.authority)
    trust = studio.write_policy(clocks=[clock.root_pem])
    refused(root, trust, "under a key of the signer's own: .* from another principal")
    without(policy, "check_apart")
    assert accepted(root, trust)


def test_who_certifies_the_signers_cannot_be_the_clock(studio, without):
    roots = certificates_pem(studio.spire.bundle).decode()
    with pytest.raises(ConfigError, match="who signs must not say when"):
        studio.write_policy(clocks=[roots])
    without(policy, "check_authorities_apart")
    assert studio.write_policy(clocks=[roots])


def test_a_clock_of_ones_own_is_refused(studio):
    clock = Clock()
    root = studio.signed(authority=clock.authority)
    refused(root, studio.trust, r"is by none of the trust policy's \[\[timestamp_auth")
    assert accepted(root, studio.write_policy(clocks=[clock.root_pem]))


def test_a_clock_whose_certificate_had_expired_is_refused(studio, monkeypatch):
    clock = Clock(until=PAST - DAY)
    root = studio.signed(authority=clock.authority)
    trust = studio.write_policy(clocks=[clock.root_pem])
    refused(root, trust, "is by none of the trust policy's")
    monkeypatch.setattr(clocks, "find_authority", lambda t, c, a: (a[0], (c,)))
    assert accepted(root, trust)


def test_a_timestamp_with_its_time_edited_is_refused(studio, without):
    root = studio.signed(at=EVENING)
    bundle = json.loads((root / "model.sig").read_bytes())
    stamp = bundle["verificationMaterial"]["timestampVerificationData"]
    (raw,) = parse_envelope((root / "model.sig").read_bytes(), what="x").timestamps
    edited = raw.replace(*(f"{t:%Y%m%d%H%M%SZ}".encode() for t in (EVENING, NOON)))
    stamp["rfc3161Timestamps"][0]["signedTimestamp"] = b64(edited)
    (root / "model.sig").write_text(json.dumps(bundle))
    refused(root, studio.trust, "the timestamp was changed after its authority signed")
    without(clocks, "check_timestamp")
    assert accepted(root, studio.trust).signed_at == NOON


def b64(raw):
    return base64.b64encode(raw).decode()


def test_a_timestamp_over_sha1_is_refused(studio, monkeypatch):
    def weakly(message):
        sha1 = der.sequence(der.oid("1.3.14.3.2.26"))
        imprint = der.sequence(
            sha1, der.element(der.OCTETS, hashlib.sha1(message).digest())
        )
        monkeypatch.setattr(issuing, "parse_query", lambda _: (imprint, None))
        return studio.clock.answer(query(message, 1), now=NOON)

    root = studio.model()
    sign_model(root, TimestampedSigner(SvidKey(studio.svid), weakly))
    release_model(root, studio.keys["deployer"], name="digits", version="1")
    refused(root, studio.trust, r"uses hash 1.3.14.3.2.26; expected SHA-256")
    monkeypatch.setitem(cms._HASHES, "1.3.14.3.2.26", cms.hashes.SHA1)
    assert accepted(root, studio.trust)


def test_a_timestamp_that_does_not_name_its_certificate_is_refused(studio, monkeypatch):
    monkeypatch.setattr(issuing, "SIGNING_CERTIFICATE_V2", "1.2.3.4")
    root = studio.signed()
    refused(root, studio.trust, "signed attribute signingCertificateV2 is missing")
    monkeypatch.setattr(cms, "SIGNING_CERTIFICATE_V2", "1.2.3.4")
    assert accepted(root, studio.trust)


@pytest.mark.parametrize("order", [0, 1])
def test_of_two_timestamps_both_must_hold(studio, monkeypatch, order):
    root = studio.signed(at=NOON)
    good = json.loads((root / "model.sig").read_bytes())
    stamp = good["verificationMaterial"]["timestampVerificationData"]
    (one,) = stamp["rfc3161Timestamps"]
    signature = parse_envelope((root / "model.sig").read_bytes(), what="x").signature

    def both(authority):
        raw = stamps(authority, NOON - MINUTE)(signature)
        two = {"signedTimestamp": b64(raw)}
        stamp["rfc3161Timestamps"] = [two, one] if order else [one, two]
        (root / "model.sig").write_text(json.dumps(good))

    both(studio.clock)
    assert accepted(root, studio.trust).signed_at == NOON - MINUTE  # the earlier
    both(Clock().authority)
    refused(root, studio.trust, "is by none of the trust policy's")
    certificate = studio.clock.certificates[-1]  # any authority for any timestamp:
    found = (clocks.TimestampAuthority("any", certificate), ())
    monkeypatch.setattr(clocks, "find_authority", lambda *_: found)
    assert accepted(root, studio.trust).signed_at == NOON - MINUTE


# --- windows, revocation, archives ------------------------------------------------


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (None, "was trusted until .* no timestamp .* proves that it signed before"),
        (EVENING, "was trusted until"),
        (PAST - 5 * MINUTE, "is trusted only from"),
        (NOON, None),
    ],
    ids=["no timestamp", "after", "before", "within"],
)
def test_a_keys_window_is_held_against_the_proven_time(studio, at, message):
    key = signing_key()
    start, end = (f"{t:%Y-%m-%dT%H:%M:%SZ}" for t in (PAST, PAST + 60 * MINUTE))
    studio.policy_path.write_text(
        f'version = 1\n[[signers]]\nname = "a"\nkey = """{pem(key)}"""\n'
        f'roles = ["trainer"]\nnot_before = {start}\nnot_after = {end}\n'
        f'[[timestamp_authorities]]\nname = "c"\nroot = """{studio.clock_pem}"""\n'
    )
    signer = key if at is None else TimestampedSigner(key, stamps(studio.clock, at))
    root = studio.model()
    sign_model(root, signer)
    envelope = parse_envelope((root / "model.sig").read_bytes(), what="model.sig")
    trust = TrustPolicy.load(studio.policy_path)
    if message is None:
        assert trust.verify(envelope, "trainer").signed_at == NOON
        return
    with pytest.raises(VerificationError, match=message):
        trust.verify(envelope, "trainer")
    # Without the window the signature counts.
    text = studio.policy_path.read_text()
    studio.policy_path.write_text(
        text.replace("not_before", "# ").replace("not_after", "# ")
    )
    assert TrustPolicy.load(studio.policy_path).verify(envelope, "trainer")


@pytest.mark.parametrize("kind", ["keys", "serials"])
@pytest.mark.parametrize("whose", ["signer", "clock"])
def test_what_is_revoked_is_refused_whenever_it_signed(studio, kind, whose):
    root = studio.signed(at=NOON)
    assert accepted(root, studio.trust)
    leaf = studio.clock.certificates[0]
    key, serial = {
        "signer": (SvidKey(studio.svid).id, studio.svid.serial),
        "clock": (policy.key_ids([leaf]), leaf.serial_number),
    }[whose]
    (value,) = (
        [f"{serial:x}"] if kind == "serials" else [key] if whose == "signer" else key
    )
    trust = studio.write_policy(tail=f'[revoked]\n{kind} = ["{value}"]\n')
    refused(root, trust, f"{value} is revoked")


@pytest.mark.parametrize(
    "window",
    [
        f"not_after = {PAST:%Y-%m-%dT%H:%M:%SZ}",
        f"not_before = {NOON + DAY:%Y-%m-%dT%H:%M:%SZ}",
    ],
    ids=["ended", "not begun"],
)
def test_roots_count_only_while_they_were_in_force(studio, window):
    root = studio.signed(at=NOON)
    assert accepted(root, studio.write_policy())
    trust = studio.write_policy(window=window + "\n")
    refused(root, trust, "no trust bundle for example.test")


def test_a_forged_authority_is_refused(studio):
    rogue = ThrowAwayAuthority("example.test", clock=lambda: PAST)
    root = studio.signed(svid=rogue.issue(TRAINER, ttl_s=3600))
    refused(root, studio.trust, "no valid path to the trust domain's roots")
    trust = studio.write_policy(roots=certificates_pem(rogue.bundle).decode())
    assert accepted(root, trust)


def test_an_authority_of_another_trust_domain_is_refused(studio):
    other = ThrowAwayAuthority("other.test", clock=lambda: PAST)
    root = studio.signed(svid=other.forge(TRAINER))
    tail = (
        '[[bundles]]\ntrust_domain = "other.test"\n'
        f'roots = """{certificates_pem(other.bundle).decode()}"""\n'
    )
    refused(root, studio.write_policy(tail=tail), "no valid path to the trust domain's")
    tail = tail.replace("other.test", "example.test")
    assert accepted(root, studio.write_policy(tail=tail))


@pytest.mark.parametrize(
    ("flaws", "message", "stock"),
    [
        ({"uris": [TRAINER, TRAINER + "2"]}, "2 URI names, exactly one", True),
        ({"uris": ["https://example.test"]}, "not a SPIFFE ID|spiffe://", True),
        ({"uris": []}, "no SPIFFE ID|0 URI names", True),
        ({"ca": True}, "leaf is a CA", True),
        ({"key_usage": ["key_agreement"]}, "digitalSignature is not set", False),
        ({"key_usage": ["digital_signature", "key_cert_sign"]}, "keyCertSign", True),
        ({"starts_s": -50, "ends_s": 60}, "judged at", True),
    ],
    ids=["two IDs", "no SPIFFE ID", "no ID", "a CA", "no KU", "signs others", "old"],
)
def test_a_certificate_that_is_no_svid_is_refused(studio, flaws, message, stock):
    root = studio.signed(svid=studio.spire.forge(TRAINER, **flaws))
    if stock:
        stock_accepts(studio, root)
    refused(root, studio.trust, message)
    good = studio.signed("good", svid=studio.spire.forge(TRAINER))
    assert accepted(good, studio.trust)


def test_a_signature_by_another_key_than_the_certificates_is_refused(studio, without):
    root = studio.signed(at=NOON)
    bundle = json.loads((root / "model.sig").read_bytes())
    own = json.loads(
        studio.signed("other", svid=studio.spire.issue(TRAINER))
        .joinpath("model.sig")
        .read_bytes()
    )
    bundle["dsseEnvelope"] = own["dsseEnvelope"]
    bundle["verificationMaterial"]["timestampVerificationData"] = own[
        "verificationMaterial"
    ]["timestampVerificationData"]
    (root / "model.sig").write_text(json.dumps(bundle))
    refused(root, studio.trust, "the signature does not hold")
    without(policy, "check_signature")
    release_model(root, studio.keys["deployer"], name="digits", version="1")
    assert accepted(root, studio.trust).spiffe == TRAINER
