"""``ztserve key new``: a signing key, and the entry that a trust policy needs."""

import argparse
from pathlib import Path

from ztserve.artifacts import publish


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("new",))
    parser.add_argument("path", type=Path, help="of the private key, e.g. trainer.pem")
    parser.add_argument(
        "--role",
        action="append",
        choices=("trainer", "evaluator", "deployer"),
        help="for the trust policy's entry; may be repeated (default: trainer)",
    )
    parser.add_argument("--name", help="of the signer (default: the file's)")


def run(chosen: argparse.Namespace) -> int:
    """Write both halves; print the entry of the trust policy."""
    made = publish.new_key(
        chosen.path,
        name=chosen.name or chosen.path.stem,
        roles=chosen.role or ["trainer"],
    )
    print(f"private key  {made.private}  (keep it; mode 0600)")
    print(f"public key   {made.public}")
    print(f"key id       {made.id}")
    print(f"\n# for the trust policy:\n{made.entry}", end="")
    return 0
