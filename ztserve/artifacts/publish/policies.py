"""Signing a trust policy again: its version is to rise with each change."""

import os
import tomllib
from pathlib import Path

from ztserve.artifacts.statements.envelope import check_signature, parse_envelope
from ztserve.artifacts.statements.keys import PublicKey
from ztserve.artifacts.trust.signers import read_guarded, take
from ztserve.artifacts.trust.terms import POLICY_TYPE
from ztserve.errors import ConfigError, VerificationError


def check_raised(path: str | os.PathLike[str], text: bytes, root: PublicKey) -> None:
    """Raise ConfigError where `root` signed another text of this version, or a newer.

    What it signed is in the file ``<path>.sig``; nodes that have seen that would not
    take `text` (`trust.floor`). The same text may be signed again, and whatever another
    key signed is none of this root's.
    """
    policy = Path(path)
    signature = policy.with_name(policy.name + ".sig")
    if not os.path.lexists(signature):
        return
    raw = read_guarded(signature)
    try:
        before = parse_envelope(raw, what=str(signature), payload_type=POLICY_TYPE)
        check_signature(before, root)
    except VerificationError:
        return
    if before.payload == text:
        return
    signed, now = _version(before.payload, signature), _version(text, policy)
    if now <= signed:
        raise ConfigError(
            f"{policy} is version {now}, and {signature} signs another text as version "
            f"{signed} under this root: nodes that have seen that one refuse this; "
            f"raise the version, to {signed + 1} or more, and sign again"
        )


def _version(text: bytes, path: Path) -> int:
    """Return the version alone: an older policy may have what is not known today."""
    try:
        version = take(tomllib.loads(text.decode()), "version", int, str(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the policy in it is not TOML: {error}") from error
    if version is None:
        raise ConfigError(f"{path}: the policy in it has no version")
    return version
