"""Signing keys in files: made once, never overwritten, readable by their owner only."""

import base64
import json
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ztserve.artifacts.publish.atomic import create
from ztserve.artifacts.statements.envelope import BUNDLE_TYPE, IN_TOTO_TYPE, pae
from ztserve.artifacts.statements.keys import (
    key_id,
    public_pem,
    signature_algorithm,
    strong_curve,
)
from ztserve.artifacts.trust.signers import ROLES, Role
from ztserve.errors import ConfigError

_MAX_KEY_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class NewKey:
    """What `new_key` made."""

    private: Path
    public: Path
    id: str
    """``sha256:<hex>``: names the key in messages and in a policy's `revoked`."""
    entry: str
    """A ``[[signers]]`` table for the trust policy, ready to paste."""


class SigningKey:
    """A private key that signs statements; the key itself stays inside."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._curve = strong_curve(key, "the signing key")
        self._key = key
        self.id = key_id(key.public_key())

    def __repr__(self) -> str:
        return f"SigningKey({self.id})"

    def envelope(self, payload: bytes, *, payload_type: str = IN_TOTO_TYPE) -> bytes:
        """Sign a payload; return the bundle (see `artifacts.envelope`)."""
        signature = self._key.sign(
            pae(payload_type, payload), signature_algorithm(self._curve)
        )
        bundle = {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": self.id.removeprefix("sha256:")},
                "tlogEntries": [],
            },
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": payload_type,
                "signatures": [
                    {"sig": base64.b64encode(signature).decode(), "keyid": ""}
                ],
            },
        }
        return json.dumps(bundle).encode()


def new_key(
    path: str | os.PathLike[str],
    *,
    name: str,
    roles: Collection[Role],
    passphrase: str | None = None,
) -> NewKey:
    """Make a P-256 key: the private half at `path` (0600), the public beside (.pub).

    `name` and `roles` are for the entry of the trust policy alone. Raises ConfigError
    where either file exists already, or cannot be written.
    """
    private = Path(path)
    public = private.with_suffix(".pub")
    if private == public:
        raise ConfigError(f"{private}: the private key needs another suffix than .pub")
    if not roles or not set(roles) <= set(ROLES):
        raise ConfigError(f"roles {list(roles)!r}: expected some of {', '.join(ROLES)}")
    for file in (private, public):
        if file.exists():
            raise ConfigError(f"{file} exists; a key is never overwritten")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase.encode())
        if passphrase
        else serialization.NoEncryption(),
    )
    try:
        create(private, pem, mode=0o600)
        create(public, public_pem(key.public_key()), mode=0o644)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    entry = (
        f"[[signers]]\nname = {json.dumps(name)}\nkey = {json.dumps(public.name)}\n"
        f"roles = {json.dumps(list(roles))}\n"
    )
    return NewKey(private, public, key_id(key.public_key()), entry)


def load_signer(
    path: str | os.PathLike[str], passphrase: str | None = None
) -> SigningKey:
    """Read a private key; raises ConfigError.

    Refused: a file that group or others may read, a wrong or missing passphrase, and
    keys that no trust policy would take.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            pem = file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{path} is a private key that others may use (mode {mode & 0o777:o}): "
            f"run chmod 600 {path}"
        )
    try:
        key = serialization.load_pem_private_key(
            pem, passphrase.encode() if passphrase else None
        )
    except TypeError as error:
        needs = "needs no passphrase" if passphrase else "needs its passphrase"
        raise ConfigError(f"{path} {needs}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no PEM private key, or the passphrase is wrong"
        ) from error
    strong_curve(key, str(path))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key")
    return SigningKey(key)
