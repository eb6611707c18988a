"""Whose key signs: its file and its passphrase, for every verb that signs.

A passphrase comes from a file or from the terminal, never from the command line or
the environment, where other processes could see it.
"""

import argparse
import getpass
import sys
from pathlib import Path

from ztserve.artifacts import publish
from ztserve.errors import ConfigError


def arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare the arguments that name a signing key; `default` is for people."""
    parser.add_argument("--key", type=Path, help=f"default: {default}")
    passphrase_file(parser)


def passphrase_file(parser: argparse.ArgumentParser) -> None:
    """Declare the argument that names the file of a passphrase."""
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        help="holds the key's passphrase in one line, mode 0600 (default: asked for "
        "on the terminal, where the key has one)",
    )


def load(path: Path, sealed_by: Path | None) -> publish.SigningKey:
    """Open a signing key, asking for its passphrase where it needs one.

    Raises ConfigError.
    """
    if sealed_by is not None:
        return publish.load_signer(path, publish.read_passphrase(sealed_by))
    return publish.load_signer(path, lambda: ask(f"passphrase of {path}"))


def ask(what: str) -> str:
    """Ask on the terminal, without showing what is typed; raises ConfigError."""
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{what}: there is no terminal to ask for it on; give --passphrase-file"
        )
    try:
        return getpass.getpass(f"{what}: ")
    except EOFError as error:
        raise ConfigError(f"{what}: nothing was typed") from error


def ask_twice(what: str) -> str:
    """Ask for a new passphrase, and again; raises ConfigError where they differ."""
    first = ask(what)
    if ask(f"{what}, again") != first:
        raise ConfigError(f"{what}: the two differ; nothing was made")
    return first
