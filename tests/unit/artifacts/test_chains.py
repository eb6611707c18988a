"""Signers by SPIFFE ID, bundles and timestamp authorities in a trust policy."""

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.unit.artifacts.studio import DAY, MINUTE, PAST, TRAINER, Clock, Studio
from tests.unit.artifacts.workshop import pem, signing_key
from ztserve.artifacts import TrustPolicy, verify_model
from ztserve.artifacts.publish import sign_policy
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.errors import ConfigError, VerificationError
from ztserve.identity.svid import pem as certificates_pem
from ztserve.testing.authority import ThrowAwayAuthority


@pytest.fixture
def studio(tmp_path):
    return Studio(tmp_path)


def load(studio, text):
    studio.policy_path.write_text(text)
    studio.policy_path.chmod(0o644)
    return TrustPolicy.load(studio.policy_path)


SIGNER = (
    f'version = 1\n[[signers]]\nname = "a"\nspiffe = "{TRAINER}"\nroles = ["trainer"]\n'
)
DOMAIN = '[[bundles]]\ntrust_domain = "example.test"\n'


def bundle(certificates):
    return f'{DOMAIN}roots = """{certificates_pem(certificates).decode()}"""\n'


ROOTS = bundle(ThrowAwayAuthority("example.test").bundle)
LEAF = bundle(ThrowAwayAuthority("example.test").issue(TRAINER).chain_der)
CLOCK = f'[[timestamp_authorities]]\nname = "c"\nroot = """{Clock().root_pem}"""\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SIGNER, "'a' is of the trust domain example.test, whose roots no"),
        (SIGNER.replace("/ns/", "/ns//") + ROOTS, "spiffe: "),
        (SIGNER.replace(TRAINER, "spiffe://example.test") + ROOTS, "spiffe: "),
        (SIGNER + 'key = "x"\n' + ROOTS, "has a key and a SPIFFE ID: choose one"),
        (SIGNER.replace("spiffe", "# ") + ROOTS, "needs a name and a key"),
        (SIGNER + SIGNER[12:].replace('"a"', '"b"') + ROOTS, "have the same spiffe"),
        (SIGNER + DOMAIN, "number 1 needs a trust_domain and its roots"),
        (SIGNER + ROOTS + 'until = "x"\n', "unknown key 'until'; known: trust_domain"),
        (SIGNER + DOMAIN + 'roots = "-----BEGIN x"\n', "expected PEM certificates"),
        (SIGNER + DOMAIN + 'roots = "nowhere.pem"\n', "nowhere.pem: cannot be read"),
        (SIGNER + LEAF, "a root: is not a CA"),
        (SIGNER + ROOTS.replace("example.test", "Example"), "Example"),
        (SIGNER + ROOTS + "not_after = 2030-01-01T00:00:00\n", "has no time zone"),
        (SIGNER + ROOTS * 257, r"257 \[\[bundles\]\], at most 256"),
        (SIGNER + "bundles = [1]\n", "number 1 is not a table"),
        (
            SIGNER + ROOTS + CLOCK * 2,
            "two .*timestamp_authorities.* have the same name",
        ),
        (SIGNER + ROOTS + CLOCK * 17, "at most 16"),
        (SIGNER + ROOTS + CLOCK.replace("name", "# "), "needs a name and a root"),
        (SIGNER + ROOTS + CLOCK + "limit = 1\n", "unknown key 'limit'; known: name"),
        (SIGNER + ROOTS + CLOCK + '[revoked]\nserials = ["0xAB"]\n', "in lower-case h"),
    ],
)
def test_a_policy_that_is_not_understood_is_refused(studio, text, message):
    if text.endswith("bundles = [1]\n"):
        text = "bundles = [1]\n" + SIGNER
    with pytest.raises(ConfigError, match=message):
        load(studio, text)


def test_roots_and_clocks_may_be_files_beside(studio):
    (studio.path / "roots.pem").write_bytes(certificates_pem(studio.spire.bundle))
    clock = '[[timestamp_authorities]]\nname = "c"\nroot = "clock.crt"\n'
    trust = load(studio, SIGNER + DOMAIN + 'roots = "roots.pem"\n' + clock)
    assert trust.bundles[0].roots == studio.spire.bundle
    envelope = studio.signer().envelope(b"{}")
    signed = trust.verify(parse_envelope(envelope, what="x"), "trainer")
    assert signed.serial == f"{studio.svid.serial:x}"
    assert f"{TRAINER}, serial {signed.serial}, signed at" in str(signed)
    (studio.path / "roots.pem").chmod(0o666)
    with pytest.raises(ConfigError, match=r"roots.pem may be written by group or oth"):
        TrustPolicy.load(studio.policy_path)


@pytest.mark.parametrize("beside", ["roots", "root"])
def test_under_a_trust_root_certificates_are_within_the_policy(studio, beside):
    root = signing_key()
    sign_policy(studio.policy_path, root)
    assert TrustPolicy.load(studio.policy_path, root=pem(root))
    text = studio.policy_path.read_text()
    start = text.index(f'{beside} = """')
    end = text.index('"""', start + len(beside) + 6) + 3
    studio.policy_path.write_text(f'{text[:start]}{beside} = "x.pem"{text[end:]}')
    sign_policy(studio.policy_path, root)
    with pytest.raises(ConfigError, match=r"file 'x.pem' is not signed"):
        TrustPolicy.load(studio.policy_path, root=pem(root))


def test_a_fresh_svid_needs_no_timestamp(studio):
    trust = studio.write_policy(clocks=[])
    envelope = parse_envelope(studio.signer(at=None).envelope(b"{}"), what="x.sig")
    signed = trust.verify(envelope, "trainer", now=PAST + MINUTE)
    assert (signed.spiffe, signed.signed_at) == (TRAINER, None)
    with pytest.raises(
        VerificationError, match=r"x.sig: the signer's certificate, jud"
    ):
        trust.verify(envelope, "trainer")


def test_an_archive_of_bundles_judges_each_time_by_its_own(studio):
    """A trust domain rotates its root; both years' models verify today."""
    later = ThrowAwayAuthority("example.test", clock=lambda: PAST + 200 * DAY)
    turn = f"{PAST + 100 * DAY:%Y-%m-%dT%H:%M:%SZ}"
    studio.write_policy(
        window=f"not_after = {turn}\n",
        tail=bundle(later.bundle) + f"not_before = {turn}\n",
    )
    assert verify_model(studio.signed(), "digits", studio.trust)
    new = studio.signed(
        "new", svid=later.issue(TRAINER, ttl_s=3600), at=PAST + 200 * DAY
    )
    assert verify_model(new, "digits", studio.trust).signers[0].spiffe == TRAINER


def test_an_svid_under_an_intermediate_verifies(studio):
    svid = studio.spire.intermediate().forge(TRAINER)
    assert verify_model(studio.signed(svid=svid), "digits", studio.trust)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["x509CertificateChain"].update(x=1), "unknown field 'x'"),
        (lambda m: m["x509CertificateChain"].update(certificates=[]), "0 certificates"),
        (
            lambda m: m["x509CertificateChain"]["certificates"].extend(
                m["x509CertificateChain"]["certificates"] * 8
            ),
            "has 9 entries, the limit is 8",
        ),
        (
            lambda m: m["x509CertificateChain"].update(
                certificates=[{"rawBytes": "A" * 43692}]
            ),
            "at most 32768 bytes",
        ),
        (
            lambda m: m["x509CertificateChain"].update(
                certificates=[{"rawBytes": "AAAA"}]
            ),
            "the signer's certificate is malformed",
        ),
        (
            lambda m: m["x509CertificateChain"]["certificates"][0].update(x=1),
            "a certificate has an unknown field",
        ),
        (lambda m: m["timestampVerificationData"].update(x=1), "unknown field 'x'"),
        (
            lambda m: m["timestampVerificationData"]["rfc3161Timestamps"].extend(
                m["timestampVerificationData"]["rfc3161Timestamps"] * 4
            ),
            "has 5 entries, the limit is 4",
        ),
        (
            lambda m: m["timestampVerificationData"]["rfc3161Timestamps"][0].update(
                signedTimestamp="A" * 87_384
            ),
            "a timestamp is larger than 65536 bytes",
        ),
        (
            lambda m: m["timestampVerificationData"]["rfc3161Timestamps"][0].update(
                x=1
            ),
            "a timestamp has an unknown field",
        ),
        (lambda m: m.update(publicKey={}), "expected one of the two"),
        (lambda m: m.update(tlogEntries=[{}]), "tlogEntries is not supported"),
        (lambda m: m.update(certificate={}), "certificate is not supported"),
    ],
)
def test_a_bundle_that_is_not_exactly_the_format_is_refused(studio, change, message):
    raw = json.loads(studio.signer().envelope(b"{}"))
    change(raw["verificationMaterial"])
    with pytest.raises(VerificationError, match=message):
        parse_envelope(json.dumps(raw).encode(), what="x.sig")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    studio = Studio(tmp_path_factory.mktemp("fuzzed"))
    return studio.trust, studio.signer().envelope(b"{}")


@pytest.mark.slow
@given(some.integers(0, 2000), some.integers(0, 255))
@settings(max_examples=500, deadline=None)
def test_whatever_a_byte_of_a_chain_becomes_it_is_judged_or_refused(
    fuzzed, position, value
):
    trust, good = fuzzed
    raw = json.loads(good)
    (entry,) = raw["verificationMaterial"]["x509CertificateChain"]["certificates"]
    der = bytearray(base64.b64decode(entry["rawBytes"]))
    der[position % len(der)] = value
    entry["rawBytes"] = base64.b64encode(der).decode()
    try:
        envelope = parse_envelope(json.dumps(raw).encode(), what="x.sig")
        trust.verify(envelope, "trainer")
    except VerificationError:
        return
    assert entry["rawBytes"] in good.decode()


@pytest.mark.parametrize("kind", ["keys", "serials"])
def test_a_root_that_is_revoked_cannot_stay_in_a_bundle(studio, kind):
    (value,) = getattr(studio.trust.bundles[0], kind)
    with pytest.raises(ConfigError, match=r"in \[\[bundles\]\] and in \[revoked\]: ta"):
        studio.write_policy(tail=f'[revoked]\n{kind} = ["{value}"]\n')


@pytest.mark.slow
def test_a_certificate_with_a_key_that_the_format_lacks_is_refused(studio):
    svid = studio.spire.forge(TRAINER, key=rsa.generate_private_key(65537, 2048))
    raw = json.loads(studio.signer().envelope(b"{}"))
    (entry,) = raw["verificationMaterial"]["x509CertificateChain"]["certificates"]
    entry["rawBytes"] = base64.b64encode(svid.chain_der[0]).decode()
    with pytest.raises(VerificationError, match=r"signer.s certificate is .*RSA"):
        parse_envelope(json.dumps(raw).encode(), what="x.sig")
