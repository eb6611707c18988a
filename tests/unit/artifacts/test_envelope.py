import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.artifacts.workshop import signing_key
from ztserve.artifacts.statements.envelope import (
    check_signature,
    pae,
    parse_envelope,
    parse_statement,
    subject_digest,
)
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import VerificationError

KEY = signing_key()


def bundle(**changes):
    """A bundle with fields replaced by path: ``{"dsseEnvelope.payload": ...}``."""
    node = json.loads(KEY.envelope(b'{"a": 1}'))
    for path, value in changes.items():
        *parents, last = path.split("__")
        here = node
        for parent in parents:
            here = here[parent]
        here[last] = value
    return json.dumps(node).encode()


def test_the_pre_authentication_encoding_is_that_of_the_dsse_standard():
    # The example of the DSSE protocol document.
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_an_envelope_of_each_curve_is_read_back_and_its_signature_holds(curve):
    key = signing_key(curve)
    envelope = parse_envelope(key.envelope(b"{}"), what="x.sig")
    assert envelope.payload == b"{}"
    assert envelope.key_id == key.id
    check_signature(envelope, key._key.public_key())


def test_the_key_id_is_the_hint_of_model_signing_bundles():
    hint = json.loads(bundle())["verificationMaterial"]["publicKey"]["hint"]
    assert KEY.id == f"sha256:{hint}"


def test_a_signature_by_another_key_does_not_hold():
    envelope = parse_envelope(bundle(), what="x.sig")
    with pytest.raises(VerificationError, match=r"x.sig: the signature does not hold"):
        check_signature(envelope, signing_key()._key.public_key())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mediaType": "other"}, "mediaType is 'other'"),
        ({"extra": 1}, "the bundle has an unknown field 'extra'"),
        ({"dsseEnvelope__payloadType": "text"}, "payloadType is 'text'"),
        ({"dsseEnvelope__payload": "e30"}, "'payload' is not base64"),
        ({"dsseEnvelope__payload": "e3 0="}, "'payload' is not base64"),
        ({"dsseEnvelope__payload": "e31="}, "'payload' is not canonical base64"),
        ({"dsseEnvelope__payload": 1}, "'payload' is of kind int, not str"),
        ({"dsseEnvelope__signatures": []}, "exactly one signature .* not 0"),
        ({"dsseEnvelope__signatures": ["x"]}, "'signatures' is not an object"),
        ({"dsseEnvelope__x": 1}, "dsseEnvelope has an unknown field 'x'"),
        ({"verificationMaterial": {}}, "field 'publicKey' is missing"),
        ({"verificationMaterial__publicKey__hint": "AB"}, "64 lower-case hex digits"),
        ({"verificationMaterial__tlogEntries": [1]}, "tlogEntries is not supported"),
        ({"verificationMaterial__certificate": {}}, "certificate is not supported"),
        (
            {"verificationMaterial__x509CertificateChain": {}},
            "a key and a certificate chain: expected one of the two",
        ),
    ],
)
def test_a_bundle_that_is_not_exactly_the_format_is_refused(changes, message):
    with pytest.raises(VerificationError, match=r"x.sig: .*" + message):
        parse_envelope(bundle(**changes), what="x.sig")


def test_a_signature_longer_than_any_curves_is_refused():
    raw = json.loads(bundle())
    raw["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(b"x" * 300).decode()
    with pytest.raises(VerificationError, match="of 300 bytes is too long"):
        parse_envelope(json.dumps(raw).encode(), what="x.sig")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "is not an object"),
        (b"\xff", "not UTF-8"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1, "a": 2}', "duplicate JSON key 'a'"),
        (b'{"a":' + b"[" * 4000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" + b"{}," * 4000 + b"{}]", "over 4096 fields and entries"),
        (b" " * ((16 << 20) + 1), "more than the limit"),
    ],
)
def test_text_that_is_not_strict_json_is_refused(raw, message):
    with pytest.raises(VerificationError, match=message):
        parse_envelope(raw, what="x.sig")


def statement(**changes):
    node = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "m", "digest": {"sha256": "0" * 64}}],
        "predicateType": "kind",
        "predicate": {},
        **changes,
    }
    payload = json.dumps(node).encode()
    return parse_envelope(KEY.envelope(payload), what="x.sig")


def test_a_statement_gives_its_subject_and_predicate():
    subject, predicate = parse_statement(statement(unknown=1), "kind")
    assert subject_digest(subject) == "0" * 64
    assert predicate == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_type": "https://in-toto.io/Statement/v0.1"}, "_type is"),
        ({"predicateType": "other"}, "predicateType is 'other', expected 'kind'"),
        ({"subject": []}, "exactly one subject is expected, not 0"),
        ({"subject": [{"name": "m", "x": 1}]}, "subject has an unknown field"),
        ({"predicate": []}, "'predicate' is of kind list"),
    ],
)
def test_a_statement_of_another_shape_is_refused(changes, message):
    with pytest.raises(Malformed, match=message):
        parse_statement(statement(**changes), "kind")


@pytest.mark.parametrize("digest", [{}, {"sha512": "00"}, {"sha256": "AB"}])
def test_a_subject_without_exactly_one_sha256_is_refused(digest):
    with pytest.raises(Malformed):
        subject_digest({"name": "m", "digest": digest})
