"""Whose key signs: its file or token, for every verb that signs.

A passphrase, or a PIN, comes from a file or from the terminal, never from the command
line or the environment, where other processes could see it.
"""

import argparse
import getpass
import sys
from pathlib import Path

from ztserve.artifacts import publish
from ztserve.errors import ConfigError


def arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare the arguments that name a signing key; `default` is for people."""
    parser.add_argument(
        "--key",
        type=key_name,
        help="a file, or a token's key as 'pkcs11:token=...;object=...?module-path=...'"
        f" (RFC 7512; needs ztserve[pkcs11]); default: {default}",
    )
    passphrase_file(parser)


def key_name(text: str) -> Path | str:
    """Return the path of a key's file, or the URI of a key in a token as it is."""
    return text if text.lower().startswith(publish.TOKEN_SCHEME) else Path(text)


def passphrase_file(parser: argparse.ArgumentParser) -> None:
    """Declare the argument that names the file of a passphrase."""
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        help="holds the key's passphrase in one line, mode 0600 (default: asked for "
        "on the terminal, where the key has one)",
    )


def load(
    key: Path | str, sealed_by: Path | None
) -> publish.SigningKey | publish.TokenKey:
    """Open a signing key, asking for its passphrase, or PIN, where it needs one.

    Raises ConfigError; ArtifactError where a token does not let us in.
    """
    if isinstance(key, str):
        if sealed_by is not None:
            raise ConfigError(
                "--passphrase-file is for a key in a file; a token's PIN is in the "
                "file that pin-source=file:/path in its URI names"
            )
        return publish.TokenKey(publish.TokenUri.parse(key), _ask_pin)
    if sealed_by is not None:
        return publish.load_signer(key, publish.read_passphrase(sealed_by))
    return publish.load_signer(key, lambda: ask(f"passphrase of {key}"))


def ask(what: str, otherwise: str = "--passphrase-file") -> str:
    """Ask on the terminal, without showing what is typed; raises ConfigError."""
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{what}: there is no terminal to ask for it on; give {otherwise}"
        )
    try:
        return getpass.getpass(f"{what}: ")
    except EOFError as error:
        raise ConfigError(f"{what}: nothing was typed") from error


def _ask_pin(what: str) -> str:
    return ask(what, "pin-source=file:/path in the URI")


def ask_twice(what: str) -> str:
    """Ask for a new passphrase, and again; raises ConfigError where they differ."""
    first = ask(what)
    if ask(f"{what}, again") != first:
        raise ConfigError(f"{what}: the two differ; nothing was made")
    return first
