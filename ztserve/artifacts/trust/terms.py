"""What a trust policy says, read strictly from its TOML and its root's signature.

Nobody is trusted by default, and a file that others could write is not a policy::

    version = 1                                 # raise it with each change
    trust_domain = "example.org"                # whose policy it is; a must if signed
    expires = 2027-06-30T00:00:00Z              # optional
    formats = ["safetensors", "json"]           # optional: no file of another suffix

    [[signers]]
    name = "training"
    key = "training.pub"                        # a PEM file beside, or PEM text
    roles = ["trainer"]                         # of trainer, evaluator, deployer
    not_before = 2026-01-01T00:00:00Z           # optional
    not_after = 2027-01-01T00:00:00Z            # optional

    [[require]]                                 # optional: see `requirements`
    predicate = "https://in-toto.io/attestation/test-result/v0.1"
    roles = ["evaluator"]
    minimum = { accuracy = 0.9 }

    [min_versions]                              # no version below, per model
    digits = "3"

    [[signers]]
    name = "pipeline"
    spiffe = "spiffe://example.org/ns/ml/sa/trainer"   # signs with its SVIDs
    roles = ["trainer"]

    [[bundles]]                                 # an archive: one entry a rotation
    trust_domain = "example.org"
    roots = "example.org-2026.pem"              # a PEM file beside, or PEM text
    not_before = 2026-01-01T00:00:00Z           # optional, as is not_after

    [[timestamp_authorities]]                   # optional
    name = "clock"
    root = "clock.pem"

    [revoked]
    keys = ["sha256:..."]                       # as `ztserve key` prints them
    serials = ["7f03..."]                       # of certificates, in hex
    manifests = [{ digest = "sha256:...", reason = "trained on poisoned data" }]
"""

import hashlib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Self

from ztserve.artifacts.statements.envelope import check_signature, parse_envelope
from ztserve.artifacts.statements.keys import key_id
from ztserve.artifacts.trust.chains import Bundle, parse_bundles, parse_serials
from ztserve.artifacts.trust.requirements import (
    Requirement,
    parse_formats,
    parse_min_versions,
    parse_requirements,
)
from ztserve.artifacts.trust.signers import (
    Role,
    Signer,
    load_key,
    only,
    parse_signers,
    read_guarded,
    take,
    take_time,
)
from ztserve.artifacts.trust.timestamping import (
    TimestampAuthority,
    parse_authorities,
)
from ztserve.errors import ConfigError, VerificationError

_TABLES = (
    "version",
    "trust_domain",
    "expires",
    "formats",
    "signers",
    "bundles",
    "timestamp_authorities",
    "require",
    "min_versions",
    "revoked",
)
MAX_VERSION = 1 << 53
POLICY_TYPE = "application/vnd.ztserve.trust-policy.v1+toml"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Terms:
    """Whose signatures count, for what, and until when."""

    version: int
    signers: tuple[Signer, ...]
    digest: str
    """``sha256:<hex>`` of the file: names this policy in the audit."""
    trust_domain: str = ""
    """Of those who judge by it; '': not said."""
    expires: datetime | None = None
    revoked_keys: Mapping[str, str] = field(default_factory=dict)
    """Key id to the reason, which may be empty."""
    revoked_manifests: Mapping[str, str] = field(default_factory=dict)
    """Digest of a model to the reason."""
    requirements: tuple[Requirement, ...] = ()
    min_versions: Mapping[str, str] = field(default_factory=dict)
    """Name of a model to the oldest version that may be served."""
    formats: frozenset[str] | None = None
    """Suffixes that a model's files may have; None: whatever `content` lets pass."""
    root: str = ""
    """Key id of the trust root under which it is signed; '': it is not."""
    revoked_serials: frozenset[str] = frozenset()
    bundles: tuple[Bundle, ...] = ()
    timestamp_authorities: tuple[TimestampAuthority, ...] = ()

    @classmethod
    def parse(cls, raw: bytes, path: Path, *, inline: bool, root: str = "") -> Self:
        """Parse the file at `path`, whose bytes are `raw`; raises ConfigError.

        `inline`: it is signed under a trust root, so that keys and roots must stand
        within it; `root` is the key id of that one.
        """
        try:
            table = tomllib.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # bad TOML or bad UTF-8
            raise ConfigError(f"{path}: not TOML: {error}") from error
        where = str(path)
        only(table, _TABLES, where)
        version = take(table, "version", int, where)
        if version is None or not 0 < version < MAX_VERSION:
            raise ConfigError(f"{where}: version must be a number from 1 upwards")
        entries = take(table, "signers", list, where) or []
        revoked = take(table, "revoked", dict, where) or {}
        only(revoked, ("keys", "serials", "manifests"), f"{where}: [revoked]")
        signers = parse_signers(entries, path, inline=inline)
        known = frozenset[Role]().union(*(signer.roles for signer in signers))
        required = take(table, "require", list, where) or []
        bundles = take(table, "bundles", list, where) or []
        clocks = take(table, "timestamp_authorities", list, where) or []
        return cls(
            version=version,
            signers=signers,
            digest="sha256:" + hashlib.sha256(raw).hexdigest(),
            trust_domain=take(table, "trust_domain", str, where) or "",
            expires=take_time(table, "expires", where),
            revoked_keys=_digests(revoked, "keys", where),
            revoked_manifests=_digests(revoked, "manifests", where),
            requirements=parse_requirements(required, where, known),
            min_versions=parse_min_versions(table, where),
            formats=parse_formats(table, where),
            root=root,
            revoked_serials=parse_serials(revoked, where),
            bundles=parse_bundles(bundles, path, inline=inline),
            timestamp_authorities=parse_authorities(clocks, path, inline=inline),
        )


def check_root_signature(path: Path, raw: bytes, root: str | os.PathLike[str]) -> str:
    """Return the trust root's key id; ConfigError unless it signed the policy's bytes.

    `root`: its public key as PEM text, or a file of it. The signature is the envelope
    in the file ``<path>.sig``.
    """
    key = load_key(os.fspath(root), Path(), "the trust root")
    signature = path.with_name(path.name + ".sig")
    try:
        envelope = parse_envelope(
            read_guarded(signature), what=str(signature), payload_type=POLICY_TYPE
        )
        if envelope.payload != raw:
            raise VerificationError(f"{signature} signs another text than {path}")
        check_signature(envelope, key)
    except VerificationError as error:
        raise ConfigError(
            f"{path} is not signed under the trust root: {error}"
        ) from error
    return key_id(key)


def _digests(table: Mapping[str, object], key: str, where: str) -> dict[str, str]:
    """Return digests with their reasons; each is text, or ``{digest, reason}``."""
    found: dict[str, str] = {}
    for value in take(table, key, list, where) or []:
        entry = value if isinstance(value, dict) else {"digest": value}
        only(entry, ("digest", "reason"), f"{where}: [revoked] {key}")
        digest, reason = entry.get("digest"), entry.get("reason", "")
        if not isinstance(digest, str) or not _DIGEST.match(digest):
            raise ConfigError(
                f"{where}: [revoked] {key} holds {digest!r}; expected sha256:<64 hex>"
            )
        if not isinstance(reason, str):
            raise ConfigError(f"{where}: [revoked] {key}: the reason must be text")
        found[digest] = reason
    return found
