"""An SVID on disk, as PEM.

Two layouts: separate files, as spiffe-helper and CSI drivers write them, and the
credential folder of the SPIFFE Filesystem Delivery standard. Nothing here is believed
yet: `material` is for `read_identity` to judge.
"""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from ztserve.errors import IdentityError
from ztserve.identity.bundle import MAX_TRUST_DOMAINS
from ztserve.identity.guarded_files import read_guarded
from ztserve.identity.peer import MAX_CHAIN_BYTES
from ztserve.identity.spiffe_id import SCHEME, trust_domain_name, workload_id
from ztserve.identity.svid import (
    MAX_BUNDLE_BYTES,
    MAX_KEY_BYTES,
    Material,
)

CREDENTIALS = "credential-bundle.private-key.pem"
BUNDLE_ENDING = ".spiffe-trust-bundle.pem"
MAX_ENTRIES = 1024
"""Of a credential folder."""

_BLOCK = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]{1,40})-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END \1-----\s*"
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What the files hold: DER from PEM."""

    chain: tuple[bytes, ...]
    key: bytes = field(repr=False)
    bundles: Mapping[str, bytes] = field(repr=False)
    """Trust domain to concatenated DER roots, our own domain among them or not."""
    left_out: tuple[str, ...] = ()
    """Why foreign domains are not among them; no part of the digest."""

    def digest(self) -> bytes:
        """Return what tells these contents from all others, and no secret."""
        parts = [*self.chain, self.key]
        for name in sorted(self.bundles):
            parts += [name.encode(), self.bundles[name]]
        whole = hashlib.sha256()
        for part in parts:
            whole.update(len(part).to_bytes(8) + part)
        return whole.digest()


def read_files(
    certificate: Path, key: Path, bundles: Mapping[str, Path], *, own: str
) -> Contents:
    """Read a chain, a key and the bundle of each trust domain, each from its own file.

    A foreign domain (other than `own`) whose file is gone or not in order is left out.
    Raises IdentityError; MissingFileError where another file is not there.
    """
    found, left_out = _bundles(bundles, own)
    blocks = _blocks(_read(key, MAX_KEY_BYTES, secret=True), key)
    return Contents(
        chain=tuple(_certificates(certificate, MAX_CHAIN_BYTES)),
        key=_only_key(blocks, key),
        bundles=found,
        left_out=left_out,
    )


def read_folder(folder: Path, *, own: str) -> Contents:
    """Read a credential folder (SPIFFE Filesystem Delivery, section 2).

    A foreign domain (other than `own`) whose file is not in order is left out. Raises
    IdentityError; MissingFileError where there are no credentials in it.
    """
    path = folder / CREDENTIALS
    blocks = _blocks(_read(path, MAX_KEY_BYTES + MAX_CHAIN_BYTES, secret=True), path)
    names = _bundle_names(folder)
    found, left_out = _bundles(
        {
            trust_domain_name(name.removesuffix(BUNDLE_ENDING)): folder / name
            for name in names
        },
        own,
    )
    return Contents(
        chain=tuple(_only_certificates(blocks[1:], path)),
        key=_only_key(blocks[:1], path),
        bundles=found,
        left_out=left_out,
    )


def material(contents: Contents, *, own: str) -> Material:
    """Return `contents` as `read_identity` judges them.

    `own` is our trust domain, known beforehand: an SVID of another one, or no bundle of
    ours, raises IdentityError.
    """
    spiffe_id = workload_id(_announced(contents.chain[0]))
    if spiffe_id.trust_domain != own:
        raise IdentityError(f"the SVID on disk is {spiffe_id}, expected one of {own}")
    if own not in contents.bundles:
        raise IdentityError(f"there is no trust bundle of {own} on disk")
    return Material(
        spiffe_id=spiffe_id,
        chain=b"".join(contents.chain),
        key=contents.key,
        bundle=contents.bundles[own],
        federated={
            SCHEME + name: roots
            for name, roots in contents.bundles.items()
            if name != own
        },
    )


def _announced(leaf: bytes) -> str:
    """Return the leaf's first URI name, unverified. Raises IdentityError."""
    try:
        names = x509.load_der_x509_certificate(leaf).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    except Exception as error:
        # Parsers raise many kinds of error on hostile bytes; each means the same.
        raise IdentityError(f"the certificate on disk is no SVID: {error}") from error
    return uris[0] if uris else ""


def _bundles(
    paths: Mapping[str, Path], own: str
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    found: dict[str, bytes] = {}
    left_out: list[str] = []
    for name, path in paths.items():
        try:
            found[name] = b"".join(_certificates(path, MAX_BUNDLE_BYTES))
        except IdentityError as error:
            if name == own:
                raise
            # A partner's mistake takes its own trust domain away, and nobody else's.
            left_out.append(f"trust bundle of {name}: {error}")
    return found, tuple(left_out)


def _bundle_names(folder: Path) -> list[str]:
    names: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count >= MAX_ENTRIES:
                    raise IdentityError(f"{folder}: over {MAX_ENTRIES} entries")
                if entry.name.endswith(BUNDLE_ENDING):
                    names.append(entry.name)
    except OSError as error:
        raise IdentityError(f"{folder}: {error.strerror}") from error
    if len(names) > MAX_TRUST_DOMAINS:
        raise IdentityError(
            f"{folder}: {len(names)} trust bundles, at most {MAX_TRUST_DOMAINS}"
        )
    return names


def _read(path: Path, most_der: int, *, secret: bool = False) -> bytes:
    return read_guarded(path, 2 * most_der, secret=secret)  # PEM is a third larger


# --- PEM --------------------------------------------------------------------------


def _certificates(path: Path, most_der: int) -> list[bytes]:
    return _only_certificates(_blocks(_read(path, most_der), path), path)


def _only_certificates(blocks: list[tuple[str, bytes]], path: Path) -> list[bytes]:
    if {kind for kind, _ in blocks} != {"CERTIFICATE"}:
        raise IdentityError(
            f"{path}: expected PEM blocks CERTIFICATE, found {_kinds(blocks)}"
        )
    return [der for _, der in blocks]


def _only_key(blocks: list[tuple[str, bytes]], path: Path) -> bytes:
    if [kind for kind, _ in blocks] != ["PRIVATE KEY"]:
        raise IdentityError(
            f"{path}: expected one PEM block PRIVATE KEY (PKCS#8, not encrypted), "
            f"found {_kinds(blocks)}"
        )
    return blocks[0][1]


def _kinds(blocks: list[tuple[str, bytes]]) -> str:
    return ", ".join(sorted({kind for kind, _ in blocks})) or "nothing"


def _blocks(text: bytes, path: Path) -> list[tuple[str, bytes]]:
    """Split PEM blocks; no headers, and nothing between them (section 2.1)."""
    blocks: list[tuple[str, bytes]] = []
    at = 0
    while at < len(text):
        match = _BLOCK.match(text, at)
        if match is None:
            raise IdentityError(f"{path}: byte {at}: expected a PEM block without more")
        try:
            encoded = match[2].replace(b"\r", b"").replace(b"\n", b"")
            der = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise IdentityError(f"{path}: byte {at}: no base64: {error}") from None
        blocks.append((match[1].decode(), der))
        at = match.end()
    return blocks
