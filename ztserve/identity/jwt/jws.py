"""The nine signature algorithms of JWT-SVIDs (section 2.1; RFC 7518, 3.3 to 3.5)."""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS, PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from ztserve.errors import IdentityError
from ztserve.identity.jwk import PublicKey, coordinate_bytes
from ztserve.identity.svid import PrivateKey

_SHA2 = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
_ECDSA = {
    "ES256": ("secp256r1", ec.ECDSA(_SHA2["256"])),
    "ES384": ("secp384r1", ec.ECDSA(_SHA2["384"])),
    "ES512": ("secp521r1", ec.ECDSA(_SHA2["512"])),
}
_RSA = {
    **{f"RS{bits}": (PKCS1v15(), sha) for bits, sha in _SHA2.items()},
    **{f"PS{b}": (PSS(MGF1(sha), sha.digest_size), sha) for b, sha in _SHA2.items()},
}
ALGORITHMS = frozenset(_ECDSA) | frozenset(_RSA)


def default_algorithm(key: PrivateKey) -> str:
    """Return ES256, ES384 or ES512 by the curve of `key`, RS256 if it has none."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        for name, (curve, _) in _ECDSA.items():
            if key.curve.name == curve:
                return name
    return "RS256"


def sign(algorithm: str, key: PrivateKey, signed: bytes) -> bytes:
    """Return the signature of `signed`; IdentityError if `key` is not for `algorithm`.

    That of ECDSA is its two numbers one after the other, as RFC 7518 has it.
    """
    if isinstance(key, ec.EllipticCurvePrivateKey):
        curve, ecdsa = _ECDSA.get(algorithm, ("", None))
        if ecdsa and key.curve.name == curve:
            size = coordinate_bytes(key.curve)
            numbers = decode_dss_signature(key.sign(signed, ecdsa))
            return b"".join(number.to_bytes(size) for number in numbers)
    elif algorithm in _RSA:
        return key.sign(signed, *_RSA[algorithm])
    raise _unfit(algorithm, key)


def check_signature(
    algorithm: str, key: PublicKey, signature: bytes, signed: bytes
) -> None:
    """Raise IdentityError unless `signature` is that of `signed` by `key`.

    The key decides what it is for: a token that names an algorithm of another type or
    curve is refused before any is tried.
    """
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            curve, ecdsa = _ECDSA.get(algorithm, ("", None))
            if ecdsa and key.curve.name == curve:
                return key.verify(_der(signature, key.curve), signed, ecdsa)
        elif algorithm in _RSA:
            return key.verify(signature, signed, *_RSA[algorithm])
    except InvalidSignature as error:
        raise IdentityError("the signature is not the authority's") from error
    raise _unfit(algorithm, key)


def _der(signature: bytes, curve: ec.EllipticCurve) -> bytes:
    size = coordinate_bytes(curve)
    if len(signature) != 2 * size:
        raise InvalidSignature
    numbers = (int.from_bytes(part) for part in (signature[:size], signature[size:]))
    return encode_dss_signature(*numbers)


def _unfit(algorithm: str, key: PublicKey | PrivateKey) -> IdentityError:
    kind = "RSA" if isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey) else "EC"
    return IdentityError(f"alg {algorithm!r:.80} is not for this {kind} key")
