"""A timestamp authority in process: RFC 3161, for a laptop and a pipeline of one's own.

It has a key and a root of its own. The root's key is forgotten once it has signed the
one certificate: nobody can ever make another authority under it.
"""

import os
import secrets
import stat
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from ztserve import types
from ztserve.artifacts.publish.atomic import create
from ztserve.artifacts.publish.entries import authority_entry
from ztserve.artifacts.statements import der
from ztserve.artifacts.statements.cms import (
    CONTENT_TYPE,
    CONTEXT_0,
    ECDSA_SHA256,
    MESSAGE_DIGEST,
    SHA256,
    SIGNED_DATA,
    SIGNING_CERTIFICATE_V2,
    TST_INFO,
    der_of,
    digest,
)
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import ConfigError
from ztserve.identity.authority.certificates import (
    BACKDATED,
    authority_name,
    key_usage,
    sign_certificate,
)

VALID = timedelta(days=3650)
"""How long a new authority may stamp; what it has stamped counts longer."""
POLICY = "2.25.130959720217289043809777102372083913451"
"""Our timestamps' policy: a name made of a UUID (ITU-T X.667), which says no more."""
MAX_QUERY_BYTES = 4096
_MAX_FILE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class NewAuthority:
    """What `new_authority` made."""

    private: Path
    """Key and certificates, mode 0600."""
    root: Path
    entry: str
    """A ``[[timestamp_authorities]]`` table of the trust policy, the root within."""


class LocalAuthority:
    """Stamps what it is asked to, by this machine's clock; the key stays inside."""

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        certificates: tuple[x509.Certificate, ...],
    ) -> None:
        """`certificates`: the key's own first, then those above it."""
        if not certificates or certificates[0].public_key() != key.public_key():
            raise ConfigError("the timestamp authority's key is not its certificate's")
        self._key = key
        self.certificates = certificates

    def answer(self, query: bytes, *, now: datetime | None = None) -> bytes:
        """Return the response (DER) to a query; raises Malformed.

        A query is a TimeStampReq (RFC 3161, 2.4.1) for a SHA-256 imprint that asks for
        the certificates, under our policy or none.
        """
        imprint, nonce = parse_query(query)
        moment = types.now() if now is None else now
        info = der.sequence(
            der.integer(1),
            der.oid(POLICY),
            imprint,
            der.integer(secrets.randbits(64)),
            der.time(moment),
            der.sequence(der.integer(1)),  # a clock's whole seconds
            *([] if nonce is None else [der.integer(nonce)]),
        )
        return der.sequence(
            der.sequence(der.integer(0)),
            der.sequence(
                der.oid(SIGNED_DATA), der.element(CONTEXT_0, self._sign(info))
            ),
        )

    def _sign(self, info: bytes) -> bytes:
        """Return the CMS SignedData around a TSTInfo (RFC 5652, 5.1)."""
        sha256 = der.sequence(der.oid(SHA256))
        signer = self.certificates[0]
        listed = der.sequence(
            der.element(der.OCTETS, digest(hashes.SHA256, der_of(signer)))
        )
        attributes = (
            (CONTENT_TYPE, der.oid(TST_INFO)),
            (MESSAGE_DIGEST, der.element(der.OCTETS, digest(hashes.SHA256, info))),
            (SIGNING_CERTIFICATE_V2, der.sequence(der.sequence(listed))),
        )
        signed = der.set_of(
            *(der.sequence(der.oid(name), der.set_of(v)) for name, v in attributes)
        )
        signer_info = der.sequence(
            der.integer(1),
            der.sequence(
                signer.issuer.public_bytes(), der.integer(signer.serial_number)
            ),
            sha256,
            bytes([CONTEXT_0]) + signed[1:],
            der.sequence(der.oid(ECDSA_SHA256)),
            der.element(der.OCTETS, self._key.sign(signed, ec.ECDSA(hashes.SHA256()))),
        )
        content = der.element(CONTEXT_0, der.element(der.OCTETS, info))
        return der.sequence(
            der.integer(3),
            der.set_of(sha256),
            der.sequence(der.oid(TST_INFO), content),
            der.element(CONTEXT_0, *sorted(map(der_of, self.certificates))),
            der.set_of(signer_info),
        )


def parse_query(query: bytes) -> tuple[bytes, int | None]:
    """Return a query's imprint (DER) and nonce; raises Malformed."""
    if len(query) > MAX_QUERY_BYTES:
        raise Malformed(f"a timestamp query of {len(query)} bytes is too long")
    parts = der.read(query, "query").items(der.SEQUENCE, "timestamp query")
    if parts.next().integer("timestamp query") != 1:
        raise Malformed("timestamp query: not of version 1")
    imprint = parts.next()
    fields = imprint.items(der.SEQUENCE, "messageImprint")
    name = fields.next().items(der.SEQUENCE, "messageImprint").next()
    hashed = fields.next().expect(der.OCTETS, "messageImprint")
    if name.oid("messageImprint") != SHA256 or len(hashed) != 32:
        raise Malformed("timestamp query: expected a SHA-256 imprint")
    policy = parts.optional(der.OID)
    if policy is not None and policy.oid("timestamp query") != POLICY:
        raise Malformed("timestamp query: asks for a policy that is not ours")
    nonce = parts.optional(der.INTEGER)
    wants = parts.optional(der.BOOLEAN)
    parts.end()
    if wants is None or wants.content != b"\xff":
        raise Malformed("timestamp query: expected certReq")
    return imprint.raw, None if nonce is None else nonce.integer("nonce")


def new_authority(
    path: str | os.PathLike[str], *, name: str, now: datetime | None = None
) -> NewAuthority:
    """Make an authority: key and certificates at `path` (0600), the root beside (.crt).

    `name` is for the entry of the trust policy. Raises ConfigError where either file
    exists already, or cannot be written.
    """
    private = Path(path)
    beside = private.with_suffix(".crt")
    if private == beside:
        raise ConfigError(f"{private}: the private key needs another suffix than .crt")
    for file in (private, beside):
        if file.exists():
            raise ConfigError(f"{file} exists; an authority is never overwritten")
    key, certificates = _certify(types.now() if now is None else now)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        create(private, pem + b"".join(map(_pem, certificates)), mode=0o600)
        create(beside, _pem(certificates[-1]), mode=0o644)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    return NewAuthority(private, beside, authority_entry(name, certificates[-1]))


def _certify(
    now: datetime,
) -> tuple[ec.EllipticCurvePrivateKey, tuple[x509.Certificate, ...]]:
    """Return a new key with its certificate, and a new root that signed it."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    mark = secrets.token_hex(4)
    validity = (now - BACKDATED, now + VALID)
    name = authority_name(f"timestamp root {mark}")
    root = sign_certificate(
        root_key.public_key(),
        name,
        validity,
        (
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (key_usage("key_cert_sign", "crl_sign"), True),
        ),
        issuer=name,
        issuer_key=root_key,
    )
    certificate = sign_certificate(
        key.public_key(),
        authority_name(f"timestamp authority {mark}"),
        validity,
        (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (key_usage("digital_signature"), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), True),
        ),
        issuer=name,
        issuer_key=root_key,
    )
    return key, (certificate, root)


def load_authority(path: str | os.PathLike[str]) -> LocalAuthority:
    """Read what `new_authority` wrote; raises ConfigError, as `load_signer` does."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            pem = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; make a timestamp authority "
            "with `ztserve key timestamp-authority`"
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{path} is a private key that others may use (mode {mode & 0o777:o}): "
            f"run chmod 600 {path}"
        )
    try:
        key = serialization.load_pem_private_key(pem, None)
        certificates = tuple(x509.load_pem_x509_certificates(pem))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no timestamp authority: expected a PEM key and certificates"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key")
    return LocalAuthority(key, certificates)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
