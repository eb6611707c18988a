"""``ztserve key``: a signing key, and the entry that a trust policy needs.

``new`` makes a signer's key, ``timestamp-authority`` what stamps signatures.
"""

import argparse
from pathlib import Path

from ztserve.artifacts import publish
from ztserve.cli import signer
from ztserve.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("new", "timestamp-authority"))
    parser.add_argument("path", type=Path, help="of the private key, e.g. trainer.pem")
    parser.add_argument(
        "--role",
        action="append",
        choices=("trainer", "evaluator", "deployer"),
        help="for the trust policy's entry; may be repeated (default: trainer)",
    )
    parser.add_argument("--name", help="of the signer (default: the file's)")
    parser.add_argument("--curve", choices=publish.CURVES, default="P-256")
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        help="encrypt the private key with the one line of this file (mode 0600)",
    )
    parser.add_argument(
        "--ask-passphrase",
        action="store_true",
        help="encrypt the private key with a passphrase asked for on the terminal",
    )


def run(chosen: argparse.Namespace) -> int:
    """Write both halves; print the entry of the trust policy."""
    if chosen.action == "timestamp-authority":
        return _authority(chosen)
    passphrase = _passphrase(chosen)
    made = publish.new_key(
        chosen.path,
        name=chosen.name or chosen.path.stem,
        roles=chosen.role or ["trainer"],
        passphrase=passphrase,
        curve=chosen.curve,
    )
    sealed = "encrypted" if passphrase else "not encrypted: no passphrase"
    print(f"private key  {made.private}  (keep it; mode 0600, {sealed})")
    print(f"public key   {made.public}")
    print(f"key id       {made.id}")
    print(f"\n# for the trust policy:\n{made.entry}", end="")
    return 0


def _passphrase(chosen: argparse.Namespace) -> str | None:
    if chosen.passphrase_file and chosen.ask_passphrase:
        raise ConfigError("--passphrase-file and --ask-passphrase: one is enough")
    if chosen.passphrase_file:
        return publish.read_passphrase(chosen.passphrase_file)
    if chosen.ask_passphrase:
        return signer.ask_twice(f"new passphrase of {chosen.path}")
    return None


def _authority(chosen: argparse.Namespace) -> int:
    if chosen.role:
        raise ConfigError("--role: a timestamp authority has none; it signs no model")
    clock = publish.new_authority(chosen.path, name=chosen.name or chosen.path.stem)
    print(f"private key  {clock.private}  (keep it from signers; mode 0600)")
    print(f"root         {clock.root}")
    print(f"\n# for the trust policy:\n{clock.entry}", end="")
    return 0
