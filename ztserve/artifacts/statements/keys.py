"""Public keys of signers: which are strong enough, and what they are called.

The floor is NIST P-256; the curves and their hashes are those that OpenSSF Model
Signing v1.0 allows for its `key` method.
"""

import hashlib
from typing import TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ztserve.errors import ConfigError

PublicKey: TypeAlias = ec.EllipticCurvePublicKey

_HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
    "secp521r1": hashes.SHA512,
}


def strong_curve(key: object, where: str) -> ec.EllipticCurve:
    """Return the curve of a (public or private) key if it is strong enough.

    Raises ConfigError for any key but one on P-256, P-384 or P-521.
    """
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        curve = key.curve
        if curve.name in _HASHES:
            return curve
        kind = f"an elliptic-curve key on {curve.name}"
    else:
        title = type(key).__name__.removesuffix("PublicKey").removesuffix("PrivateKey")
        kind = f"a key of kind {title}, which OpenSSF Model Signing does not have"
    raise ConfigError(
        f"{where} is {kind}; signers need a key on P-256, P-384 or P-521: "
        "make one with `ztserve key new`"
    )


def load_public_key(pem: bytes, where: str) -> PublicKey:
    """Parse a PEM public key; raises ConfigError on anything but a strong one."""
    if b"PRIVATE KEY-----" in pem:
        raise ConfigError(
            f"{where} is a private key: it belongs to its signer alone; give the "
            "public half (-----BEGIN PUBLIC KEY-----) here, and make a new key if "
            "others could read this one"
        )
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{where} is not a PEM public key (-----BEGIN PUBLIC KEY-----) on a curve "
            "known by its name"
        ) from error
    strong_curve(key, where)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{where} is not an elliptic-curve key")
    return key


def public_pem(key: PublicKey) -> bytes:
    """Return the key as PEM SubjectPublicKeyInfo."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def key_id(key: PublicKey) -> str:
    """Return ``sha256:`` and the hex SHA-256 of the key's PEM text.

    The hex digits are the `hint` of OpenSSF Model Signing bundles.
    """
    return "sha256:" + hashlib.sha256(public_pem(key)).hexdigest()


def curve_hash(curve: ec.EllipticCurve) -> hashes.HashAlgorithm:
    """Return the hash that belongs to the curve (SHA-256, -384, -512)."""
    return _HASHES[curve.name]()


def signature_algorithm(curve: ec.EllipticCurve) -> ec.ECDSA:
    """Return ECDSA with the curve's hash."""
    return ec.ECDSA(curve_hash(curve))
