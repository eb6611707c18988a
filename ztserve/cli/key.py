"""``ztserve key``: a signing key, and the entry that a trust policy needs.

``new`` makes a signer's key, ``show`` tells of one that is there, and
``timestamp-authority`` makes what stamps signatures.
"""

import argparse
from pathlib import Path

from ztserve.artifacts import publish
from ztserve.artifacts.statements.keys import PublicKey, key_id
from ztserve.artifacts.trust.signers import ROLES, load_key
from ztserve.cli import signer
from ztserve.errors import ConfigError

_ROLE_WORDS = "--role trainer, --role evaluator or --role deployer"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("new", "show", "timestamp-authority"))
    parser.add_argument(
        "path",
        type=signer.key_name,
        help="of the private key, e.g. trainer.pem; show: also of a public key, or "
        "the PKCS#11 URI of a token's",
    )
    parser.add_argument(
        "--role",
        action="append",
        choices=ROLES,
        help="for the trust policy's entry; may be repeated (new: trainer, unless "
        "given; show: no entry without)",
    )
    parser.add_argument(
        "--root",
        action="store_true",
        help="of a trust root: it signs the trust policy and is no signer within",
    )
    parser.add_argument("--name", help="of the signer (default: the file's)")
    parser.add_argument(
        "--entry",
        action="store_true",
        help="show: print the trust policy's entry alone, to be appended to it",
    )
    parser.add_argument(
        "--curve",
        choices=publish.CURVES,
        default="P-256",
        help="new: of the key (default: P-256)",
    )
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        help="holds the passphrase in one line, mode 0600; `new` encrypts the private "
        "key with it",
    )
    parser.add_argument(
        "--ask-passphrase",
        action="store_true",
        help="encrypt the private key with a passphrase asked for on the terminal",
    )


def run(chosen: argparse.Namespace) -> int:
    """Make or read a key; print its id and the entry of the trust policy."""
    if chosen.entry and chosen.action != "show":
        raise ConfigError(f"--entry: {chosen.action} prints more; `ztserve key show`")
    if isinstance(chosen.path, str) and chosen.action != "show":
        raise ConfigError(
            "a key in a token is made with the token's own tool, such as `pkcs11-tool "
            "--keypairgen --key-type EC:prime256v1`; then `ztserve key show`"
        )
    if chosen.action == "timestamp-authority":
        return _authority(chosen)
    if chosen.root and (chosen.role or chosen.entry):
        raise ConfigError("--root: a trust root has no role, and no entry in a policy")
    return _show(chosen) if chosen.action == "show" else _new(chosen)


def _new(chosen: argparse.Namespace) -> int:
    passphrase = _passphrase(chosen)
    made = publish.new_key(
        chosen.path,
        name=chosen.name or chosen.path.stem,
        roles=[] if chosen.root else chosen.role or ["trainer"],
        passphrase=passphrase,
        curve=chosen.curve,
    )
    sealed = "encrypted" if passphrase else "not encrypted: no passphrase"
    print(f"private key  {made.private}  (keep it; mode 0600, {sealed})")
    print(f"public key   {made.public}")
    print(f"key id       {made.id}")
    if chosen.root:
        print(f'\n# for ztserve.toml:\n[artifacts]\ntrust_root = "{made.public}"')
    else:
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


def _show(chosen: argparse.Namespace) -> int:
    if chosen.entry and not chosen.role:
        # A key does not tell its role, and a role too many is a stage too few.
        raise ConfigError(f"--entry: say what the key signs as: {_ROLE_WORDS}")
    name, key = _public(chosen)
    if not chosen.entry:
        print(f"key id       {key_id(key)}")
    if chosen.role:
        entry = publish.key_entry(chosen.name or name, key, chosen.role)
        said = "" if chosen.entry else "# for the trust policy:\n"
        print(f"\n{said}{entry}", end="")
    elif not chosen.root:
        print(f"\n# for the trust policy's entry, add {_ROLE_WORDS}")
    return 0


def _public(chosen: argparse.Namespace) -> tuple[str, PublicKey]:
    """Return a name for the key, and its public half."""
    path = chosen.path
    if isinstance(path, Path) and path.suffix == ".pub":
        return path.stem, load_key(str(path), Path(), "the key")
    loaded = signer.load(path, chosen.passphrase_file)
    if isinstance(path, Path):
        return path.stem, loaded.public
    return publish.TokenUri.parse(path).name, loaded.public


def _authority(chosen: argparse.Namespace) -> int:
    if chosen.role or chosen.root:
        raise ConfigError("--role: a timestamp authority has none; it signs no model")
    clock = publish.new_authority(chosen.path, name=chosen.name or chosen.path.stem)
    print(f"private key  {clock.private}  (keep it from signers; mode 0600)")
    print(f"root         {clock.root}")
    print(f"\n# for the trust policy:\n{clock.entry}", end="")
    return 0
