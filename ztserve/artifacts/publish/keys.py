"""Signing keys in files: made once, never overwritten, readable by their owner only."""

import base64
import json
import os
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ztserve.artifacts.publish.atomic import create
from ztserve.artifacts.publish.entries import key_entry
from ztserve.artifacts.statements.envelope import BUNDLE_TYPE, IN_TOTO_TYPE, pae
from ztserve.artifacts.statements.keys import (
    key_id,
    public_pem,
    signature_algorithm,
    strong_curve,
)
from ztserve.artifacts.trust.signers import Role
from ztserve.errors import ConfigError

Curve: TypeAlias = Literal["P-256", "P-384", "P-521"]
CURVES: tuple[Curve, ...] = get_args(Curve)
MIN_PASSPHRASE = 12
"""Characters: a stolen file can be tried fast (PKCS #8 as OpenSSL writes it: PBKDF2
with 2048 rounds)."""
_MAX_KEY_BYTES = 1 << 16
MAX_PASSPHRASE_BYTES = 1023
_CURVES: dict[Curve, type[ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1,
    "P-384": ec.SECP384R1,
    "P-521": ec.SECP521R1,
}


@dataclass(frozen=True, slots=True)
class NewKey:
    """What `new_key` made."""

    private: Path
    public: Path
    id: str
    """``sha256:<hex>``: names the key in messages and in a policy's `revoked`."""
    entry: str
    """A ``[[signers]]`` table of the trust policy; empty where it has no roles."""


class SigningKey:
    """A private key that signs statements; the key itself stays inside."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._curve = strong_curve(key, "the signing key")
        self._key = key
        self.public = key.public_key()
        self.id = key_id(self.public)

    def __repr__(self) -> str:
        return f"SigningKey({self.id})"

    def envelope(self, payload: bytes, *, payload_type: str = IN_TOTO_TYPE) -> bytes:
        """Sign a payload; return the bundle (see `artifacts.envelope`)."""
        return bundle(
            self.id,
            payload,
            payload_type,
            lambda message: self._key.sign(message, signature_algorithm(self._curve)),
        )


def bundle(
    key: str, payload: bytes, payload_type: str, sign: Callable[[bytes], bytes]
) -> bytes:
    """Return the OpenSSF bundle of a payload that `sign` signs (see `envelope`).

    `key`: the id of the key with which `sign` makes an ECDSA signature (DER) of a
    message.
    """
    signature = sign(pae(payload_type, payload))
    node = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": key.removeprefix("sha256:")},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(node).encode()


def new_key(
    path: str | os.PathLike[str],
    *,
    name: str,
    roles: Collection[Role],
    passphrase: str | None = None,
    curve: Curve = "P-256",
) -> NewKey:
    """Make a key: the private half at `path` (0600), the public beside (.pub).

    `name` and `roles` are for the entry of the trust policy alone; no roles: a key that
    is in none, such as its root's. A `passphrase` has at least `MIN_PASSPHRASE`
    characters. Raises ConfigError where either file exists already, or cannot be
    written.
    """
    private = Path(path)
    public = private.with_suffix(".pub")
    if private == public:
        raise ConfigError(f"{private}: the private key needs another suffix than .pub")
    if curve not in _CURVES:
        raise ConfigError(f"curve {curve!r}: expected one of {', '.join(CURVES)}")
    for file in (private, public):
        if file.exists():
            raise ConfigError(f"{file} exists; a key is never overwritten")
    key = ec.generate_private_key(_CURVES[curve]())
    entry = key_entry(name, key.public_key(), roles) if roles else ""
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        _encryption(passphrase),
    )
    try:
        create(private, pem, mode=0o600)
        create(public, public_pem(key.public_key()), mode=0o644)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    return NewKey(private, public, key_id(key.public_key()), entry)


def _encryption(
    passphrase: str | None,
) -> serialization.KeySerializationEncryption:
    if passphrase is None:
        return serialization.NoEncryption()
    if len(passphrase) < MIN_PASSPHRASE:
        raise ConfigError(
            f"a passphrase of {len(passphrase)} characters is soon guessed by whoever "
            f"has the file: at least {MIN_PASSPHRASE} are expected, say four words"
        )
    if len(passphrase.encode()) > MAX_PASSPHRASE_BYTES:
        raise ConfigError(
            f"a passphrase of {len(passphrase.encode())} bytes is longer than PKCS #8 "
            f"in OpenSSL takes: at most {MAX_PASSPHRASE_BYTES}"
        )
    return serialization.BestAvailableEncryption(passphrase.encode())


def load_signer(
    path: str | os.PathLike[str], passphrase: str | Callable[[], str] | None = None
) -> SigningKey:
    """Read a private key; raises ConfigError.

    `passphrase`: a text, or what asks somebody for it, which is called only for a key
    that has one. Refused: a file that group or others may read, a wrong or missing
    passphrase, and keys that no trust policy would take.
    """
    path = Path(path)
    pem = _read_private(path, "a private key", _MAX_KEY_BYTES)
    key = _load(pem, path, passphrase)
    strong_curve(key, str(path))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key")
    return SigningKey(key)


def _load(pem: bytes, path: Path, passphrase: str | Callable[[], str] | None) -> object:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except TypeError as error:  # it has a passphrase
        if passphrase is None:
            raise ConfigError(f"{path} needs its passphrase") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no PEM private key") from error
    else:
        if isinstance(passphrase, str):
            raise ConfigError(f"{path} needs no passphrase")
        return key
    text = passphrase if isinstance(passphrase, str) else passphrase()
    try:
        return serialization.load_pem_private_key(pem, text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} cannot be opened: the passphrase is wrong, or the file damaged"
        ) from error


def read_passphrase(path: str | os.PathLike[str], what: str = "passphrase") -> str:
    """Read a passphrase from a file of one line that only its owner may read.

    The line's end is not part of it. `what`: what messages call it. Raises ConfigError.
    """
    path = Path(path)
    raw = _read_private(path, f"a {what}", MAX_PASSPHRASE_BYTES + 2)
    try:
        text = raw.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the {what} is not UTF-8") from error
    if not text or not text.isprintable():
        raise ConfigError(
            f"{path}: expected the {what} as the one line of the file, without "
            "control characters"
        )
    return text


def _read_private(path: Path, what: str, limit: int) -> bytes:
    """Read a small file that its owner alone may read or write; ConfigError."""
    try:
        # Not blocking: a pipe that nobody writes to would else hold us for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(limit + 1) if stat.S_ISREG(mode) else None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if raw is None:
        raise ConfigError(f"{path} is no regular file, expected {what} in one")
    if b"-----BEGIN PUBLIC KEY-----" in raw:
        raise ConfigError(
            f"{path} is a public key, expected {what}: of the two halves that `ztserve "
            "key new` writes, NAME.pem is private and signs, NAME.pub is public"
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{path} is {what} that others may use (mode {mode & 0o777:o}): "
            f"run chmod 600 {path}"
        )
    if len(raw) > limit:
        raise ConfigError(f"{path} is larger than {limit} bytes, too large for {what}")
    return raw
