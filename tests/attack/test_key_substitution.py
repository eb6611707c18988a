"""What a timestamp cannot prove once an authority's key is stolen, however old the key.

A timestamp is of a signature's bytes, and for any message there is a key under which
those bytes are its ECDSA signature (Menezes and Smart, "Security of signature schemes
in a multi-user setting", 2004). Who can certify that key for the time of the timestamp
has a signature of that time.
"""

import base64
import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.artifacts.studio import MINUTE, PAST, TRAINER, Studio
from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import model_statement, release_model
from ztserve.artifacts.statements.envelope import IN_TOTO_TYPE, pae
from ztserve.errors import ConfigError, VerificationError
from ztserve.identity.authority.certificates import sign_certificate
from ztserve.testing import authority as spire

# NIST P-256 (SP 800-186, 3.2.1.3): field, order, coefficients, generator.
P = 2**256 - 2**224 + 2**192 + 2**96 - 1
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
A, B = -3, 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B


def generator():
    numbers = ec.derive_private_key(1, ec.SECP256R1()).public_key().public_numbers()
    return numbers.x, numbers.y


def add(one, other):
    """Add two points of the curve; None is the point at infinity."""
    if one is None or other is None:
        return one or other
    (x1, y1), (x2, y2) = one, other
    if x1 == x2:
        if (y1 + y2) % P == 0:
            return None
        slope = (3 * x1 * x1 + A) * pow(2 * y1, -1, P)
    else:
        slope = (y2 - y1) * pow(x2 - x1, -1, P)
    x = (slope * slope - x1 - x2) % P
    return x, (slope * (x1 - x) - y1) % P


def times(number, point):
    found = None
    while number:
        if number & 1:
            found = add(found, point)
        point, number = add(point, point), number >> 1
    return found


def substitute(signature, message):
    """Return a key under which `signature` is one of `message`: (s R - e G) / r."""
    r, s = decode_dss_signature(signature)
    e = int.from_bytes(hashlib.sha256(message).digest())
    y = pow((pow(r, 3, P) + A * r + B) % P, (P + 1) // 4, P)
    inverse = pow(r, -1, N)
    point = add(times(s * inverse % N, (r, y)), times(-e * inverse % N, generator()))
    return ec.EllipticCurvePublicNumbers(*point, ec.SECP256R1()).public_key()


def certified(studio, key):
    """Return a certificate of a year ago for the trainer, by the stolen root's key."""
    validity = (PAST - MINUTE, PAST + 60 * MINUTE)
    made = sign_certificate(
        key,
        spire.workload_name(),
        validity,
        spire._extensions(TRAINER, {}),
        issuer=studio.spire._root.subject,
        issuer_key=studio.spire._key,
    )
    return base64.b64encode(made.public_bytes(Encoding.DER)).decode()


@pytest.fixture
def forged(tmp_path):
    """A workshop, and a model of today signed a year ago by a key that nobody has."""
    studio = Studio(tmp_path)
    bundle = json.loads((studio.signed() / "model.sig").read_bytes())  # anybody can
    root = studio.model("evil", fill=666.0)
    statement = model_statement(
        "digits",
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.iterdir()},
    )
    dsse, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
    signature = base64.b64decode(dsse["signatures"][0]["sig"])
    key = substitute(signature, pae(IN_TOTO_TYPE, statement))
    dsse["payload"] = base64.b64encode(statement).decode()
    chain = material["x509CertificateChain"]["certificates"]
    chain[:] = [{"rawBytes": certified(studio, key)}]
    (root / "model.sig").write_text(json.dumps(bundle))
    release_model(root, studio.keys["deployer"], name="digits", version="1")
    return studio, root


@pytest.mark.slow
@pytest.mark.parametrize("control", ["out of the policy", "revoked", "off"])
def test_a_stolen_authoritys_key_of_any_age_is_stopped_by_its_root(forged, control):
    studio, root = forged
    if control == "off":  # to end its window does not help: it seems signed before
        ended = f"not_after = {PAST + 60 * MINUTE:%Y-%m-%dT%H:%M:%SZ}\n"
        trust = studio.write_policy(window=ended)
        found = dict(verify_model(root, "digits", trust).tensors())
        assert found["layer.bias"][0] == 666
    elif control == "revoked":
        from ztserve.artifacts.trust.chains import key_ids

        (stolen,) = key_ids([studio.spire._root])
        with pytest.raises(ConfigError, match=r"in \[\[bundles\]\] and in \[revoked\]"):
            studio.write_policy(tail=f'[revoked]\nkeys = ["{stolen}"]\n')
    else:
        studio.spire.roll()
        with pytest.raises(VerificationError, match="the signer's certificate, judged"):
            verify_model(root, "digits", others(studio))


def others(studio):
    """The policy with the domain's next root alone."""
    from ztserve.identity.svid import pem

    return studio.write_policy(roots=pem(studio.spire.bundle[-1:]).decode())


@pytest.mark.slow
def test_a_stolen_key_of_an_svid_cannot_be_exchanged(forged):
    """Without the authority's key there is no certificate for the key that it takes."""
    studio, root = forged
    bundle = json.loads((root / "model.sig").read_bytes())
    honest = json.loads((studio.path / "digits/model.sig").read_bytes())
    bundle["verificationMaterial"] = honest["verificationMaterial"]
    (root / "model.sig").write_text(json.dumps(bundle))
    with pytest.raises(VerificationError, match="the signature does not hold"):
        verify_model(root, "digits", studio.trust)
