"""The trust policy: whose signature counts, for what, and until when.

A TOML file, read once, strictly. Nobody is trusted by default, and a file that
others could write is not a policy::

    version = 1
    expires = 2027-06-30T00:00:00Z              # optional

    [[signers]]
    name = "training"
    key = "training.pub"                        # a PEM file beside, or PEM text
    roles = ["trainer"]                         # of trainer, evaluator, deployer
    not_before = 2026-01-01T00:00:00Z           # optional
    not_after = 2027-01-01T00:00:00Z            # optional

    [revoked]
    keys = ["sha256:..."]                       # as `ztserve key` prints them
    manifests = ["sha256:..."]                  # digests of models

Signatures carry no proven time, so a key's window is held against the present: after
`not_after` nothing that it ever signed counts.
"""

import hashlib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from ztserve import types
from ztserve.artifacts.statements.envelope import (
    Envelope,
    check_signature,
    parse_envelope,
)
from ztserve.artifacts.trust.signers import (
    Role,
    SignedBy,
    Signer,
    load_key,
    only,
    parse_signers,
    read_guarded,
    take,
    take_time,
)
from ztserve.errors import ConfigError, VerificationError

POLICY_TYPE = "application/vnd.ztserve.trust-policy.v1+toml"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """Whose signatures count. Made by `load`; never empty."""

    version: int
    signers: tuple[Signer, ...]
    digest: str
    """``sha256:<hex>`` of the file: names this policy in the audit."""
    expires: datetime | None = None
    revoked_keys: frozenset[str] = frozenset()
    revoked_manifests: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.signers:
            raise ConfigError("a trust policy without signers would trust nobody")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        now: datetime | None = None,
    ) -> Self:
        """Read a policy file.

        `root` is the public key (PEM text, or a file of it) under which the policy
        must be signed, by an envelope in the file ``<path>.sig`` beside it; its
        signers' keys must then be PEM text within, so that they are signed too. Raises
        ConfigError on whatever is not understood, on a file that group or others may
        write, without signers, after `expires`, and where the signature is missing or
        does not hold.
        """
        path = Path(path)
        raw = read_guarded(path)
        if root is not None:
            _check_root_signature(path, raw, root)
        policy = cls._parse(raw, path, inline=root is not None)
        try:
            policy.check_current(now)
        except VerificationError as error:
            raise ConfigError(str(error)) from error
        return policy

    @classmethod
    def _parse(cls, raw: bytes, path: Path, *, inline: bool) -> Self:
        try:
            table = tomllib.loads(raw.decode("utf-8"))
        except ValueError as error:  # bad TOML or bad UTF-8
            raise ConfigError(f"{path}: not TOML: {error}") from error
        where = str(path)
        only(table, ("version", "expires", "signers", "revoked"), where)
        version = take(table, "version", int, where)
        if version is None or version < 1:
            raise ConfigError(f"{where}: version must be a number from 1 upwards")
        entries = take(table, "signers", list, where) or []
        revoked = take(table, "revoked", dict, where) or {}
        only(revoked, ("keys", "manifests"), f"{where}: [revoked]")
        return cls(
            version=version,
            signers=parse_signers(entries, path, inline=inline),
            digest="sha256:" + hashlib.sha256(raw).hexdigest(),
            expires=take_time(table, "expires", where),
            revoked_keys=_digests(revoked, "keys", where),
            revoked_manifests=_digests(revoked, "manifests", where),
        )

    def check_current(self, now: datetime | None = None) -> None:
        """Raise VerificationError once the policy has expired."""
        moment = _moment(now)
        if self.expires is not None and moment >= self.expires:
            raise VerificationError(
                f"the trust policy (version {self.version}) expired at "
                f"{self.expires:%Y-%m-%d %H:%M} UTC: fetch or write a newer one"
            )

    def verify(
        self, envelope: Envelope, role: Role, *, now: datetime | None = None
    ) -> SignedBy:
        """Check that a signer who is trusted in `role` now signed the envelope.

        Raises VerificationError: unknown or revoked key, wrong role, outside the
        key's window, or a signature that does not hold.
        """
        self.check_current(now)
        signer = self._signer(envelope)
        check_signature(envelope, signer.key)
        here = f"{envelope.what}: signer {signer.name!r}"
        if role not in signer.roles:
            raise VerificationError(
                f"{here} is trusted as {', '.join(sorted(signer.roles))}, not as {role}"
            )
        moment = _moment(now)
        if signer.not_before is not None and moment < signer.not_before:
            raise VerificationError(
                f"{here} is trusted only from {signer.not_before:%Y-%m-%d %H:%M} UTC"
            )
        if signer.not_after is not None and moment >= signer.not_after:
            raise VerificationError(
                f"{here} was trusted until {signer.not_after:%Y-%m-%d %H:%M} UTC: "
                "sign again with a current key"
            )
        return SignedBy(signer.name, role, signer.key_id)

    def _signer(self, envelope: Envelope) -> Signer:
        if envelope.key_id in self.revoked_keys:
            raise VerificationError(
                f"{envelope.what}: the signing key {envelope.key_id} is revoked"
            )
        for signer in self.signers:
            if signer.key_id == envelope.key_id:
                return signer
        raise VerificationError(
            f"{envelope.what}: signed with key {envelope.key_id}, which is none of "
            f"the trust policy's signers ({', '.join(s.name for s in self.signers)})"
        )

    def check_not_revoked(self, digest: str) -> None:
        """Raise VerificationError if the manifest with this digest is revoked."""
        if digest in self.revoked_manifests:
            raise VerificationError(f"the trust policy revokes the model {digest}")


def _moment(now: datetime | None) -> datetime:
    moment = types.now() if now is None else now
    if moment.tzinfo is None:
        raise ConfigError(f"the time {moment} has no time zone; pass an aware datetime")
    return moment


def _check_root_signature(path: Path, raw: bytes, root: str | os.PathLike[str]) -> None:
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


def _digests(table: Mapping[str, object], key: str, where: str) -> frozenset[str]:
    values = take(table, key, list, where) or []
    for value in values:
        if not isinstance(value, str) or not _DIGEST.match(value):
            raise ConfigError(
                f"{where}: [revoked] {key} holds {value!r}; expected sha256:<64 hex>"
            )
    return frozenset(values)
