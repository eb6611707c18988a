"""Signing with a key that stays in a token (PKCS#11 2.40), such as an HSM or a card.

The token gets the hash of what is signed, nothing more. It is logged in to for each
signature and left again, and what it returns is held against its public key before
anybody sees it. Needs the extra ``pkcs11``.
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from ztserve.artifacts.publish.keys import bundle, read_passphrase
from ztserve.artifacts.publish.token_uri import TokenUri
from ztserve.artifacts.statements import der
from ztserve.artifacts.statements.envelope import IN_TOTO_TYPE
from ztserve.artifacts.statements.keys import (
    PublicKey,
    curve_hash,
    key_id,
    signature_algorithm,
)
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import ArtifactError, ConfigError, VerificationError

MAX_FOUND = 64
"""Tokens, and objects of one kind, that are looked at."""
Ask: TypeAlias = Callable[[str], str]
"""Asks somebody for the PIN of what it is told; raises ConfigError."""

_CURVES: dict[bytes, ec.EllipticCurve] = {
    der.oid("1.2.840.10045.3.1.7"): ec.SECP256R1(),
    der.oid("1.3.132.0.34"): ec.SECP384R1(),
    der.oid("1.3.132.0.35"): ec.SECP521R1(),
}
"""CKA_EC_PARAMS, the DER of a curve's name, to the curve (PKCS#11 2.40, 2.3.3)."""
_MENDS = {
    "PinIncorrect": "the PIN is wrong; after a few tries more the token locks itself",
    "PinLocked": "the PIN is locked: who administers the token sets a new one",
    "PinExpired": "the PIN has expired: set a new one with the token's tool",
    "UserPinNotInitialized": "it has no PIN yet: set one with the token's tool",
    "MechanismInvalid": "it does not sign with ECDSA",
    "DeviceRemoved": "it was removed: put it back, and sign again",
}


class TokenKey:
    """A private key in a token, which signs; the key itself never leaves it."""

    def __init__(self, uri: TokenUri, ask: Ask) -> None:
        """Find the key, log in and read its public half.

        `ask` is asked for the PIN, at once and no more than once, where the URI has
        no ``pin-source`` and the token no PIN pad. Raises ConfigError and
        ArtifactError.
        """
        self._uri = uri
        self._pkcs11 = _library()
        self._token = _find_token(self._pkcs11, uri)
        self._pin = _pin(self._pkcs11, self._token, uri, ask)
        with self._logged_in() as session:
            private = self._private(session)
            self.public = self._read_public(session, private)
        self.id = key_id(self.public)

    def __repr__(self) -> str:
        return f"TokenKey({self.id})"

    def envelope(self, payload: bytes, *, payload_type: str = IN_TOTO_TYPE) -> bytes:
        """Sign a payload; return the bundle (see `artifacts.envelope`).

        Raises ArtifactError where the token does not sign, VerificationError where
        what it returns is no signature by the key whose public half it showed.
        """
        return bundle(self.id, payload, payload_type, self._sign)

    def _sign(self, message: bytes) -> bytes:
        digest = hashes.Hash(curve_hash(self.public.curve))
        digest.update(message)
        with self._logged_in() as session:
            raw = self._signed(self._private(session), digest.finalize())
        size = len(raw) // 2
        r, s = int.from_bytes(raw[:size]), int.from_bytes(raw[size:])
        signature = encode_dss_signature(r, s)
        check_held(self.public, signature, message, str(self._uri))
        return signature

    def _signed(self, private: Any, digest: bytes) -> bytes:
        always = private[self._pkcs11.Attribute.ALWAYS_AUTHENTICATE]
        if always and not isinstance(self._pin, str):
            raise ConfigError(
                f"{self._uri} wants its PIN anew for each signature, and not from a "
                "PIN pad: name a file of it by pin-source"
            )
        pin = {"pin": self._pin} if always else {}
        signed: bytes = private.sign(
            digest, mechanism=self._pkcs11.Mechanism.ECDSA, **pin
        )
        return signed

    @contextmanager
    def _logged_in(self) -> Iterator[Any]:
        with _told(self._pkcs11, self._uri):
            session = self._token.open(user_pin=self._pin)
            try:
                yield session
            except BaseException:
                # What went wrong first counts.
                with suppress(self._pkcs11.PKCS11Error):
                    session.close()
                raise
            session.close()

    def _private(self, session: Any) -> Any:
        """Return the one private key that the URI names, which signs."""
        p = self._pkcs11
        wanted = {p.Attribute.CLASS: p.ObjectClass.PRIVATE_KEY}
        if self._uri.label is not None:
            wanted[p.Attribute.LABEL] = self._uri.label
        if self._uri.id is not None:
            wanted[p.Attribute.ID] = self._uri.id
        private = self._one(session, wanted, "private keys")
        if private.key_type != p.KeyType.EC or not private[p.Attribute.SIGN]:
            raise ConfigError(
                f"{self._uri} is a key of kind {private.key_type.name} that "
                f"{'signs' if private[p.Attribute.SIGN] else 'does not sign'}; "
                "expected one on P-256, P-384 or P-521 that may sign"
            )
        return private

    def _read_public(self, session: Any, private: Any) -> PublicKey:
        p = self._pkcs11
        wanted = {
            p.Attribute.CLASS: p.ObjectClass.PUBLIC_KEY,
            p.Attribute.ID: private[p.Attribute.ID],
        }
        public = self._one(session, wanted, "public keys with the private one's id")
        params, point = p.Attribute.EC_PARAMS, p.Attribute.EC_POINT
        return read_public_key(public[params], public[point], str(self._uri))

    def _one(self, session: Any, wanted: Mapping[Any, object], what: str) -> Any:
        found = list(islice(session.get_objects(wanted), MAX_FOUND))
        if len(found) != 1:
            count = f"{MAX_FOUND} or more" if len(found) == MAX_FOUND else len(found)
            raise ConfigError(
                f"{self._uri}: {count} {what}, expected one; `pkcs11-tool --login "
                "--list-objects` shows all: name it by object and id"
            )
        return found[0]


def check_held(public: PublicKey, signature: bytes, message: bytes, what: str) -> None:
    """Raise VerificationError unless a token's signature is by the key it showed."""
    try:
        public.verify(signature, message, signature_algorithm(public.curve))
    except InvalidSignature as error:
        raise VerificationError(
            f"{what}: what it signed does not hold under the public key beside it, so "
            "nobody could verify it: the two are no pair, or the token is broken"
        ) from error


def read_public_key(params: bytes, point: bytes, what: str) -> PublicKey:
    """Return the key of a token's CKA_EC_PARAMS and CKA_EC_POINT; ConfigError."""
    curve = _CURVES.get(params)
    if curve is None:
        raise ConfigError(
            f"{what} is on no curve that signers may use; expected P-256, P-384 or "
            "P-521, known by its name"
        )
    try:
        encoded = der.read(point, "CKA_EC_POINT").expect(der.OCTETS, "CKA_EC_POINT")
        return ec.EllipticCurvePublicKey.from_encoded_point(curve, encoded)
    except (Malformed, ValueError) as error:
        raise ConfigError(f"{what}: its public key is no point: {error}") from error


# --- the token ------------------------------------------------------------------


def _library() -> Any:
    try:
        import pkcs11
    except ImportError as error:
        raise ConfigError(
            "a key in a token needs python-pkcs11, which is not installed here: "
            "pip install 'ztserve[pkcs11]'"
        ) from error
    return pkcs11


def _find_token(library: Any, uri: TokenUri) -> Any:
    """Return the one token that the URI names, through its module."""
    module = check_module(uri.module)
    with _told(library, uri):
        slots = library.lib(str(module)).get_slots(token_present=True)
        tokens = [slot.get_token() for slot in slots[:MAX_FOUND]]
    found = [token for token in tokens if uri.token.items() <= _facts(token).items()]
    if len(found) != 1:
        there = ", ".join(repr(token.label) for token in tokens) or "none"
        raise ConfigError(
            f"{uri}: {len(found)} such tokens behind {uri.module}, expected one; "
            f"those there are {there}: name it by token and serial"
        )
    return found[0]


def _facts(token: Any) -> dict[str, str]:
    return {
        "token": token.label,
        "manufacturer": token.manufacturer_id,
        "model": token.model,
        "serial": token.serial.decode("utf-8", "replace"),
    }


def check_module(module: Path) -> Path:
    """Return a module's own path, without links; ConfigError where others bend it.

    It is loaded into this process, which asks for the PIN: whoever can write it, or a
    folder on its way, runs code there.
    """
    try:
        there = module.resolve(strict=True)
        for path in (there, *there.parents):
            _check_place(path, path.stat())
    except OSError as error:
        raise ConfigError(
            f"the PKCS#11 module {module} cannot be read: {error.strerror}; name the "
            "token's library by module-path, such as "
            "/usr/lib/softhsm/libsofthsm2.so (Debian: libsofthsm2) or "
            "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so (opensc-pkcs11)"
        ) from error
    return there


def _check_place(path: Path, facts: os.stat_result) -> None:
    # In a sticky directory nobody can rename what is another's.
    sticky = stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX
    others = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky
    if others or facts.st_uid not in {0, os.geteuid()}:
        raise ConfigError(
            f"{path} may be written by others (mode {stat.S_IMODE(facts.st_mode):o}, "
            f"owner {facts.st_uid}): whoever can write it runs code where the PIN is "
            "typed; use a module that root, or you alone, can write"
        )


def _pin(library: Any, token: Any, uri: TokenUri, ask: Ask) -> Any:
    """Return the PIN, PROTECTED_AUTH for a PIN pad, or None where none is needed."""
    if uri.pin_source is not None:
        return read_passphrase(uri.pin_source, "PIN")
    if token.flags & library.TokenFlag.PROTECTED_AUTHENTICATION_PATH:
        return library.PROTECTED_AUTH
    if not token.flags & library.TokenFlag.LOGIN_REQUIRED:
        return None
    # In the URI's words: a token's own label could hold anything, also a terminal's.
    return ask(f"PIN of the token {', '.join(uri.token.values())}")


@contextmanager
def _told(library: Any, uri: TokenUri) -> Iterator[None]:
    """Turn what the module raises into a sentence; raises ArtifactError."""
    try:
        yield
    except library.PKCS11Error as error:
        kind = type(error).__name__
        why = _MENDS.get(kind, f"{kind} {error}".strip())
        raise ArtifactError(f"{uri}: {why}") from error
