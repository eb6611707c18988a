"""Reading and judging RFC 3161 timestamps; rfc3161-client and openssl are oracles."""

import shutil
import subprocess

import pytest
import rfc3161_client
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as some

from tests.unit.artifacts.studio import MINUTE, PAST, Clock, stamps, timestamping
from ztserve import types
from ztserve.artifacts.publish import LocalAuthority, load_authority, new_authority
from ztserve.artifacts.publish import timestamps as issuing
from ztserve.artifacts.publish.stamping import query
from ztserve.artifacts.statements import cms, der
from ztserve.artifacts.statements import timestamps as statements
from ztserve.artifacts.statements.envelope import Envelope
from ztserve.artifacts.statements.strict import Malformed
from ztserve.artifacts.statements.timestamps import (
    check_timestamp,
    parse_timestamp,
    signing_certificate,
)
from ztserve.artifacts.trust.timestamping import TimestampAuthority, proven_time
from ztserve.errors import ConfigError, VerificationError
from ztserve.identity.authority.certificates import key_usage, sign_certificate

CLOCK = Clock()
STAMP = stamps(CLOCK.authority, PAST)(b"message")


def judge(raw, message=b"message"):
    timestamp = parse_timestamp(raw)
    check_timestamp(timestamp, message, signing_certificate(timestamp))
    return timestamp


def test_our_timestamps_are_what_we_read():
    timestamp = judge(STAMP)
    assert (timestamp.time, timestamp.nonce) == (PAST, 7)
    assert signing_certificate(timestamp) == CLOCK.authority.certificates[0]
    with pytest.raises(Malformed, match="is that of another signature"):
        judge(STAMP, b"other")


def test_rfc3161_client_verifies_our_timestamps():
    verifier = rfc3161_client.VerifierBuilder().add_root_certificate(CLOCK.root).build()
    response = rfc3161_client.decode_timestamp_response(STAMP)
    assert verifier.verify_message(response, b"message")
    with pytest.raises(rfc3161_client.VerificationError):
        verifier.verify_message(response, b"other")


def test_rfc3161_client_is_answered_by_our_authority():
    asked = (
        rfc3161_client.TimestampRequestBuilder()
        .data(b"message")
        .hash_algorithm(rfc3161_client.HashAlgorithm.SHA256)
        .build()
    )
    timestamp = judge(CLOCK.authority.answer(asked.as_bytes(), now=PAST))
    assert timestamp.nonce == asked.nonce


# --- openssl --------------------------------------------------------------------


@pytest.fixture
def openssl(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (Debian: openssl)")

    def run(*arguments):
        command = ["openssl", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=30
        )

    return run


def test_openssl_verifies_our_timestamps(openssl, tmp_path):
    (tmp_path / "root.crt").write_text(CLOCK.root_pem)
    (tmp_path / "stamp").write_bytes(STAMP)
    (tmp_path / "data").write_bytes(b"message")
    ask = ("ts", "-verify", "-in", "stamp", "-CAfile", "root.crt", "-data")
    assert "Verification: OK" in openssl(*ask, "data").stdout
    assert openssl(*ask, "root.crt").returncode != 0


def test_our_authority_answers_openssls_query(openssl, tmp_path):
    (tmp_path / "data").write_bytes(b"message")
    openssl("ts", "-query", "-data", "data", "-sha256", "-cert", "-out", "query")
    answer = CLOCK.authority.answer((tmp_path / "query").read_bytes(), now=PAST)
    assert judge(answer).time == PAST


CONFIG = """
[tsa]
default_tsa = it
[it]
serial = serial
default_policy = 1.2.3.4
digests = sha256, sha384, sha512
accuracy = secs:1, millisecs:500, microsecs:100
ess_cert_id_chain = no
ess_cert_id_alg = {ess}
signer_digest = {digest}
clock_precision_digits = 3
ordering = yes
tsa_name = yes
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rsa", "p384"])
@pytest.mark.parametrize("digest", ["sha256", "sha512"])
def test_we_read_and_judge_openssls_timestamps(openssl, tmp_path, kind, digest):
    key = (
        rsa.generate_private_key(65537, 2048)
        if kind == "rsa"
        else ec.generate_private_key(ec.SECP384R1())
    )
    clock = Clock()
    answer = openssl_stamp(openssl, tmp_path, clock, key, digest, "sha256")
    assert judge(answer).hash.name == "sha256"
    proven = proven_time(stamped(answer), [of(clock)], now=types.now())
    assert proven.path[-1] == clock.root
    with pytest.raises(Malformed, match="signingCertificateV2 is missing"):
        parse_timestamp(openssl_stamp(openssl, tmp_path, clock, key, digest, "sha1"))


def of(clock):
    return TimestampAuthority("clock", clock.root)


def stamped(*timestamps):
    return Envelope("x.sig", b"", "", b"message", "", timestamps=timestamps)


def openssl_stamp(openssl, folder, clock, key, digest, ess):
    certificate = certify(clock, key)
    (folder / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "config").write_text(CONFIG.format(ess=ess, digest=digest))
    (folder / "query").write_bytes(query(b"message", 7))
    sign = ("-config", "config", "-signer", "crt", "-inkey", "key", "-out", "stamp")
    done = openssl("ts", "-reply", "-queryfile", "query", *sign)
    assert done.returncode == 0, done.stderr
    return (folder / "stamp").read_bytes()


def certify(clock, key):
    """A certificate for timestamping, from a clock's root."""
    return sign_certificate(
        key.public_key(),
        x509.Name.from_rfc4514_string("CN=another clock"),
        clock.validity,
        timestamping(),
        issuer=clock.root.subject,
        issuer_key=clock.root_key,
    )


# --- what is not exactly the format -----------------------------------------------


def edited(monkeypatch, name, value):
    monkeypatch.setattr(issuing, name, value)
    return stamps(CLOCK.authority, PAST)(b"message")


def test_a_refused_query_is_no_timestamp():
    rejection = der.sequence(der.sequence(der.integer(2)))
    with pytest.raises(Malformed, match=r"did not grant a timestamp \(status 2\)"):
        parse_timestamp(rejection)


def test_a_timestamp_that_is_too_large_is_refused():
    with pytest.raises(Malformed, match="the limit is 65536"):
        parse_timestamp(b"\x30" * 65537)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SIGNED_DATA", "1.2.3", "timestamp token is of type 1.2.3, expected"),
        ("TST_INFO", "1.2.3", "is of type 1.2.3, expected 1.2.840.113549.1.9.16.1.4"),
        ("ECDSA_SHA256", "1.2.3", "signature algorithm 1.2.3 is not supported"),
        ("ECDSA_SHA256", "1.2.840.10045.4.3.3", "algorithm .* is not supported"),
        ("MESSAGE_DIGEST", "1.2.3", "attribute 1.2.840.113549.1.9.4 is missing"),
        ("CONTENT_TYPE", "1.2.840.113549.1.9.4", "is there twice"),
        ("SIGNING_CERTIFICATE_V2", "1.2.3", "signingCertificateV2 is missing"),
        ("SHA256", "1.2.3", "uses hash 1.2.3; expected SHA-256, SHA-384 or SHA-512"),
    ],
)
def test_a_timestamp_of_another_form_is_refused(monkeypatch, name, value, message):
    if name == "SHA256":
        monkeypatch.setattr(
            issuing, "parse_query", lambda q: (der.read(q, "q").content[3:56], None)
        )
    with pytest.raises(Malformed, match=message):
        parse_timestamp(edited(monkeypatch, name, value))


@pytest.mark.parametrize(
    ("seconds", "message"), [(59, None), (60, "is exact to 61 s only"), (-2, "exact")]
)
def test_a_time_that_is_too_coarse_is_refused(seconds, message):
    def check():
        node = der.read(der.sequence(der.integer(seconds)), "x")
        statements._check_accuracy(node)

    if message is None:
        check()
    else:
        with pytest.raises(Malformed, match=message):
            check()


def test_a_timestamp_without_its_certificates_is_refused():
    raw = STAMP
    signed_data = der.read(raw, "x").items(0x30, "x").rest()[1]
    name, wrapped = signed_data.items(0x30, "x").rest()
    parts = der.read(wrapped.content, "x").items(0x30, "x").rest()

    def rebuilt(*parts):
        content = der.element(0xA0, der.sequence(*(each.raw for each in parts)))
        token = der.sequence(name.raw, content)
        return der.sequence(der.sequence(der.integer(0)), token)

    assert rebuilt(*parts) == raw
    with pytest.raises(Malformed, match=r"lacks its authority's certificate \(certR"):
        parse_timestamp(rebuilt(*parts[:3], parts[4]))
    two = der.read(der.element(0x31, parts[4].content * 2), "x")
    with pytest.raises(Malformed, match="2 signers, exactly one is expected"):
        parse_timestamp(rebuilt(*parts[:4], two))
    other = der.read(
        der.element(0xA0, cms.der_of(Clock().authority.certificates[0])), "x"
    )
    with pytest.raises(Malformed, match="lacks the certificate that its authority"):
        judge(rebuilt(*parts[:3], other, parts[4]))
    many = der.read(der.element(0xA0, other.content * 9), "x")
    with pytest.raises(Malformed, match="with 9 certificates, the limit is 8"):
        parse_timestamp(rebuilt(*parts[:3], many, parts[4]))


def test_a_changed_signature_is_refused():
    raw = bytearray(STAMP)
    raw[-1] ^= 1
    with pytest.raises(Malformed, match="the timestamp's signature does not hold"):
        judge(bytes(raw))


@pytest.mark.slow
@given(some.integers(0, len(STAMP) - 1), some.integers(0, 255))
@settings(max_examples=1000, deadline=None)
def test_whatever_a_byte_becomes_the_time_is_proven_or_refused(position, value):
    raw = bytearray(STAMP)
    raw[position] = value
    try:
        proven = proven_time(stamped(bytes(raw)), [of(CLOCK)], now=types.now())
    except VerificationError:
        return
    assert proven.at == PAST


@pytest.mark.slow
@given(some.integers(0, len(STAMP) - 1), some.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_a_byte_that_is_changed_never_counts_as_another_time(position, change):
    raw = bytearray(STAMP)
    raw[position] ^= change
    try:
        timestamp = judge(bytes(raw))
    except Malformed:
        return
    # What nobody signed (the root beside the certificate, say) may change.
    assert timestamp.info == parse_timestamp(STAMP).info


@given(some.integers(0, len(STAMP) - 1))
@settings(max_examples=100, deadline=None)
def test_a_timestamp_cut_short_is_refused(length):
    with pytest.raises(Malformed):
        parse_timestamp(STAMP[:length])


# --- the authority ----------------------------------------------------------------


def test_an_authority_is_made_once_and_read_again(tmp_path):
    made = new_authority(tmp_path / "clock.pem", name="our clock")
    assert made.private.stat().st_mode & 0o777 == 0o600
    assert made.root.name == "clock.crt"
    assert b"PRIVATE" not in made.root.read_bytes()
    assert made.root.read_text() in made.entry
    authority = load_authority(made.private)
    assert judge(stamps(authority, PAST + MINUTE)(b"message")).time == PAST + MINUTE
    with pytest.raises(ConfigError, match=r"exists; an authority is never overwritten"):
        new_authority(tmp_path / "clock.pem", name="x")
    with pytest.raises(ConfigError, match=r"another suffix than .crt"):
        new_authority(tmp_path / "x.crt", name="x")
    with pytest.raises(ConfigError, match="No such file"):
        new_authority(tmp_path / "nowhere/x.pem", name="x")


def test_an_authority_that_cannot_be_used_is_refused(tmp_path):
    path = tmp_path / "clock.pem"
    with pytest.raises(ConfigError, match="make a timestamp authority with `ztserve k"):
        load_authority(path)
    made = new_authority(path, name="x")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 640\): run chmod 600"):
        load_authority(path)
    path.chmod(0o600)
    pem = path.read_bytes()
    path.write_bytes(made.root.read_bytes())
    with pytest.raises(ConfigError, match="is no timestamp authority"):
        load_authority(path)
    path.write_bytes(pem[: pem.index(b"-----BEGIN CERT")] + made.root.read_bytes())
    with pytest.raises(ConfigError, match="key is not its certificate's"):
        load_authority(path)
    key = ed25519.Ed25519PrivateKey.generate()
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.root.read_bytes()
    )
    with pytest.raises(ConfigError, match="is not an elliptic-curve key"):
        load_authority(path)
    with pytest.raises(ConfigError, match="key is not its certificate's"):
        LocalAuthority(ec.generate_private_key(ec.SECP256R1()), (CLOCK.root,))


ALGORITHM = der.sequence(der.oid(cms.SHA256))
IMPRINT = der.sequence(ALGORITHM, der.element(der.OCTETS, b"x" * 32))
WANTED = der.element(der.BOOLEAN, b"\xff")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((der.integer(2), IMPRINT, WANTED), "not of version 1"),
        ((der.integer(1), IMPRINT), "expected certReq"),
        ((der.integer(1), IMPRINT, der.oid("1.2.3"), WANTED), "a policy that is not"),
        ((der.integer(1), der.sequence(ALGORITHM, der.element(4)), WANTED), "SHA-256"),
        ((der.integer(1), IMPRINT, WANTED, der.integer(1)), "more than it should"),
        ((der.element(4, b"x" * 5000),), "is too long"),
    ],
)
def test_a_query_that_is_not_understood_is_not_answered(parts, message):
    with pytest.raises(Malformed, match=message):
        CLOCK.authority.answer(der.sequence(*parts))


# --- certificates that cost, or are weak ------------------------------------------


def with_certificates(*others):
    """A timestamp with further certificates that nobody signed."""
    authority = LocalAuthority(
        CLOCK.authority._key, (*CLOCK.authority.certificates, *others)
    )
    return stamped(stamps(authority, PAST)(b"message"))


def test_certificates_that_would_cost_seconds_are_refused():
    weak = certify(CLOCK, ec.generate_private_key(ec.SECP224R1()))
    with pytest.raises(VerificationError, match="key below the floor or too costly"):
        proven_time(with_certificates(weak), [of(CLOCK)], now=types.now())
    twin = Clock().root  # of the same name as ours
    with pytest.raises(VerificationError, match=r"two certificates .* have one name"):
        proven_time(with_certificates(twin), [of(CLOCK)], now=types.now())
    other = certify(CLOCK, ec.generate_private_key(ec.SECP256R1()))
    assert proven_time(with_certificates(other), [of(CLOCK)], now=types.now())


def test_a_certificate_of_a_ca_or_for_no_signatures_does_not_stamp():
    uses = (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), True)
    ca = (x509.BasicConstraints(ca=True, path_length=0), True)
    for extensions, message in (
        ((uses, ca), "certificate is that of a CA"),
        ((uses, (key_usage("key_agreement"), True)), "lacks digitalSignature"),
    ):
        clock = Clock(extensions=extensions)
        raw = stamps(clock.authority, PAST)(b"message")
        with pytest.raises(VerificationError, match=message):
            proven_time(stamped(raw), [of(clock)], now=types.now())


def test_without_timestamps_or_authorities_nothing_is_proven():
    assert proven_time(stamped(), [of(CLOCK)], now=types.now()) is None
    assert proven_time(stamped(b"anything"), [], now=types.now()) is None
