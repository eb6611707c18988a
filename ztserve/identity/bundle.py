"""Trust bundles: the keys that may vouch for the workloads of one trust domain.

Pure: bytes come in, a `TrustBundle` comes out or IdentityError is raised. The format is
that of the SPIFFE Trust Domain and Bundle standard (sections 4 and 5); what its entries
mean is said by X509-SVID (section 6) and JWT-SVID (section 6). A document never names
its trust domain: whoever fetched it knows whose it is (federation: F7).
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Self

from ztserve.errors import IdentityError
from ztserve.identity.authorities import check_subjects, read_authority
from ztserve.identity.jwk import (
    PublicKey,
    check_key,
    json_object,
    key_members,
    read_key,
)
from ztserve.identity.spiffe_id import trust_domain_name

MAX_JWKS_BYTES = 256 * 1024
MAX_BUNDLE_MAP_BYTES = 1024 * 1024
MAX_TRUST_DOMAINS = 64
MAX_JWKS_KEYS = 256
"""Entries of one document, those that are ignored counted too."""
MAX_AUTHORITIES = 64
"""Authorities of each kind in one bundle."""
MAX_KEY_ID_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """Whom a trust domain has sign its SVIDs; valid in itself, however it was made.

    Without any authority, all SVIDs of the trust domain are refused (section 4.1.3).
    Raises IdentityError where an X.509 authority is not a certificate that may sign
    (`read_authority`), over 8 have one subject, a key is below the floor
    (`check_key`) or a key ID is unusable.
    """

    trust_domain: str
    """Its bare name. Bundles of two trust domains are never merged."""
    x509_authorities: tuple[bytes, ...] = field(repr=False)
    """Certificates that sign X.509-SVIDs (DER), each once."""
    jwt_authorities: Mapping[str, PublicKey] = field(repr=False)
    """Key ID to the key that signs JWT-SVIDs; these keys sign nothing else."""
    sequence: int | None = None
    """Grows with each change of the contents."""
    refresh_hint_s: int | None = None
    """How often the publisher would have us look again, in seconds."""

    def __post_init__(self) -> None:
        where = f"trust bundle of {trust_domain_name(self.trust_domain)}"
        unique = tuple(dict.fromkeys(self.x509_authorities))
        for authorities in (unique, self.jwt_authorities):
            if len(authorities) > MAX_AUTHORITIES:
                raise IdentityError(
                    f"{where}: {len(authorities)} authorities of one kind, "
                    f"at most {MAX_AUTHORITIES}"
                )
        check_subjects(
            (
                read_authority(der, f"{where}: X.509 authority {at}")
                for at, der in enumerate(unique)
            ),
            where,
        )
        for key_id, key in self.jwt_authorities.items():
            check_key(key, f"{where}: JWT authority {key_id!r:.80}")
            if not 0 < len(key_id) <= MAX_KEY_ID_CHARACTERS:
                raise IdentityError(
                    f"{where}: key ID of {len(key_id)} characters, "
                    f"expected 1 to {MAX_KEY_ID_CHARACTERS}"
                )
        object.__setattr__(self, "x509_authorities", unique)
        frozen = MappingProxyType(dict(self.jwt_authorities))
        object.__setattr__(self, "jwt_authorities", frozen)

    @classmethod
    def parse(cls, jwks: bytes, trust_domain: str) -> Self:
        """Return the bundle of `trust_domain` that the JWK Set `jwks` holds.

        Entries of another `kty`, curve or `use`, or of no certificate (`x5c`), and
        members that the standard does not name are ignored. Raises IdentityError for
        all else that is not as the standard says, and for over 256 KiB or 256 entries.
        """
        what = f"trust bundle of {trust_domain_name(trust_domain)}"
        return cls._read(json_object(jwks, what, MAX_JWKS_BYTES), trust_domain, what)

    @classmethod
    def _read(cls, document: object, trust_domain: str, what: str) -> Self:
        entries = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(document, dict) or not isinstance(entries, list):
            raise IdentityError(f"{what}: expected an object with an array `keys`")
        if len(entries) > MAX_JWKS_KEYS:
            raise IdentityError(
                f"{what}: {len(entries)} keys, at most {MAX_JWKS_KEYS} are allowed"
            )
        certificates: list[bytes] = []
        keys: dict[str, PublicKey] = {}
        for at, entry in enumerate(entries):
            _read_entry(entry, f"{what}: keys[{at}]", certificates, keys)
        return cls(
            trust_domain,
            tuple(certificates),
            keys,
            _whole_number(document, "spiffe_sequence", what),
            _whole_number(document, "spiffe_refresh_hint", what),
        )

    def jwks(self) -> bytes:
        """Return the bundle as a JWK Set, for others to `parse`."""
        document: dict[str, object] = {
            "keys": [
                *(_certificate_entry(der) for der in self.x509_authorities),
                *(
                    {"use": "jwt-svid", "kid": key_id, **key_members(key)}
                    for key_id, key in self.jwt_authorities.items()
                ),
            ]
        }
        if self.sequence is not None:
            document["spiffe_sequence"] = self.sequence
        if self.refresh_hint_s is not None:
            document["spiffe_refresh_hint"] = self.refresh_hint_s
        return json.dumps(document).encode()


def parse_bundle_map(data: bytes) -> Mapping[str, TrustBundle]:
    """Return the bundles of a SPIFFE Bundle Map (section 5), by trust domain.

    All of them or, where one is not in order, none: IdentityError. A name that occurs
    twice is refused, and a bundle's own refresh hint dropped: the map's decides.
    """
    document = json_object(data, "bundle map", MAX_BUNDLE_MAP_BYTES)
    domains = document.get("trust_domains")
    if not isinstance(domains, dict):
        raise IdentityError("bundle map: expected an object `trust_domains`")
    if len(domains) > MAX_TRUST_DOMAINS:
        raise IdentityError(
            f"bundle map: {len(domains)} trust domains, at most {MAX_TRUST_DOMAINS}"
        )
    bundles = {}
    for name, content in domains.items():
        what = f"bundle map: trust bundle of {trust_domain_name(name)}"
        bundle = TrustBundle._read(content, name, what)  # noqa: SLF001
        bundles[name] = replace(bundle, refresh_hint_s=None)
    return MappingProxyType(bundles)


def newer(held: TrustBundle, fetched: TrustBundle) -> TrustBundle:
    """Return `fetched` if it may take the place of `held`; IdentityError if not.

    It may not where it is another trust domain's, has a lower sequence number or none
    any more, or has the same one with other authorities (section 4.1.1): somebody
    plays an old bundle back, which may hold a key that was withdrawn.
    """
    what = f"trust bundle of {held.trust_domain}"
    if fetched.trust_domain != held.trust_domain:
        raise IdentityError(f"{what}: cannot be replaced by {fetched.trust_domain}'s")
    if held.sequence is None:
        return fetched
    if fetched.sequence is None or fetched.sequence < held.sequence:
        raise IdentityError(
            f"{what}: sequence {fetched.sequence} after {held.sequence}: an old bundle "
            "was played back, or its publisher has lost count"
        )
    if fetched.sequence == held.sequence and _contents(fetched) != _contents(held):
        raise IdentityError(
            f"{what}: other authorities under the same sequence {held.sequence}"
        )
    return fetched


def _read_entry(
    entry: object, where: str, certificates: list[bytes], keys: dict[str, PublicKey]
) -> None:
    if not isinstance(entry, dict):
        raise IdentityError(f"{where}: expected an object")
    if entry.get("kty") not in ("EC", "RSA"):
        return
    use = entry.get("use")
    if use == "x509-svid":
        # Only the first of several counts; none at all is no error (X509-SVID 6.2).
        match entry.get("x5c"):
            case [str(text), *_]:
                certificates.append(_base64(text, where))
            case None | []:
                return
            case _:
                raise IdentityError(f"{where}: x5c: expected an array of texts")
    elif use == "jwt-svid":
        _read_jwt_authority(entry, where, keys)


def _read_jwt_authority(
    entry: dict[str, object], where: str, keys: dict[str, PublicKey]
) -> None:
    key_id = entry.get("kid")
    if not isinstance(key_id, str):
        raise IdentityError(f"{where}: a key for JWT-SVIDs needs a `kid`")
    if key_id in keys:
        raise IdentityError(f"{where}: kid {key_id!r:.80} is another key's as well")
    if "d" in entry:
        raise IdentityError(f"{where}: holds a private key: all who read it can sign")
    try:
        key = read_key(entry)
    except ValueError as error:
        raise IdentityError(f"{where}: {error}") from error
    if key is not None:
        keys[key_id] = key


def _base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise IdentityError(f"{where}: x5c: not base64 of a certificate") from error


def _whole_number(document: dict[str, object], name: str, what: str) -> int | None:
    value = document.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 2**64:
        raise IdentityError(f"{what}: {name}: expected a whole number of 64 bits")
    return value


def _contents(bundle: TrustBundle) -> object:
    return set(bundle.x509_authorities), bundle.jwt_authorities


def _certificate_entry(der: bytes) -> dict[str, object]:
    key = read_authority(der, "X.509 authority").public_key()
    text = base64.b64encode(der).decode()
    return {"use": "x509-svid", **key_members(check_key(key, "")), "x5c": [text]}
