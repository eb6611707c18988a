"""Tables of a trust policy, ready to paste, with keys and roots as PEM text within.

Text, not names of files: the signature of a policy under its root covers what is in it
alone, and a policy that is copied leaves nothing behind.
"""

import json
from collections.abc import Collection

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from ztserve.artifacts.statements.keys import PublicKey, public_pem
from ztserve.artifacts.trust.signers import ROLES, Role
from ztserve.errors import ConfigError
from ztserve.identity.spiffe_id import SpiffeId


def key_entry(name: str, key: PublicKey, roles: Collection[Role]) -> str:
    """Return a ``[[signers]]`` table of a key; ConfigError on roles that are none."""
    if not roles or not set(roles) <= set(ROLES):
        raise ConfigError(f"roles {list(roles)!r}: expected some of {', '.join(ROLES)}")
    return _table(
        "signers", name=_text(name), key=_pem(public_pem(key)), roles=_texts(roles)
    )


def spiffe_entry(spiffe: SpiffeId, role: Role) -> str:
    """Return a ``[[signers]]`` table of a SPIFFE ID, named as its last segment."""
    name = spiffe.path.rpartition("/")[2]
    return _table(
        "signers", name=_text(name), spiffe=_text(str(spiffe)), roles=_texts([role])
    )


def bundle_entry(trust_domain: str, roots: bytes) -> str:
    """Return a ``[[bundles]]`` table of a trust domain's roots, given as PEM."""
    return _table("bundles", trust_domain=_text(trust_domain), roots=_pem(roots))


def authority_entry(name: str, root: x509.Certificate) -> str:
    """Return a ``[[timestamp_authorities]]`` table of an authority's root."""
    pem = root.public_bytes(serialization.Encoding.PEM)
    return _table("timestamp_authorities", name=_text(name), root=_pem(pem))


def _table(table: str, **values: str) -> str:
    lines = [f"{key} = {value}\n" for key, value in values.items()]
    return f"[[{table}]]\n" + "".join(lines)


def _text(value: str) -> str:
    """Return a basic string of TOML, which has JSON's escapes but for surrogates.

    Raises ConfigError for what is no text.
    """
    if not value.isascii() and value.encode(errors="ignore").decode() != value:
        raise ConfigError(f"{value!r} is not UTF-8, as a trust policy is")
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _texts(values: Collection[str]) -> str:
    return f"[{', '.join(map(_text, values))}]"


def _pem(pem: bytes) -> str:
    """Return a literal string of several lines: PEM has neither quotes nor slants."""
    return f"'''\n{pem.decode().strip()}\n'''"
