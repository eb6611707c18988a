"""``ztserve sign``: the trainer's signature over a model directory."""

import argparse
import re
from pathlib import Path

from ztserve import config
from ztserve.artifacts import publish
from ztserve.artifacts.publish import SHARD_BYTES
from ztserve.artifacts.registry.directory import model_files
from ztserve.artifacts.statements.serialization import (
    HASH_TYPES,
    METHODS,
    Serialization,
)
from ztserve.artifacts.statements.strict import Malformed
from ztserve.cli import signer
from ztserve.errors import ConfigError

_SIZE = re.compile(r"([1-9][0-9]{0,15})(|KiB|MiB|GiB)\Z")
_UNITS = {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("directory", type=Path)
    signer.arguments(parser, "the development trainer's")
    parser.add_argument("--name", help="of the model, for people (default: directory)")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="hash whole files, or shards of them, which several cores share "
        "(default: shards where a file is larger than 256 MiB)",
    )
    parser.add_argument(
        "--shard-size",
        help="bytes, or as 4MiB, for --method shards (default: 64MiB)",
    )
    parser.add_argument(
        "--hash",
        choices=HASH_TYPES,
        default="sha256",
        help="blake3 is faster and needs ztserve[blake3] wherever the model is "
        "verified (default: sha256)",
    )


def run(chosen: argparse.Namespace) -> int:
    """Write model.sig into the directory."""
    how = _serialization(chosen)
    path = chosen.key or config.load().state / "keys/trainer.pem"
    key = signer.load(path, chosen.passphrase_file)
    print(
        publish.sign_model(chosen.directory, key, name=chosen.name, serialization=how)
    )
    return 0


def _serialization(chosen: argparse.Namespace) -> Serialization:
    if chosen.method is None and chosen.shard_size is None:
        return publish.choose_serialization(model_files(chosen.directory), chosen.hash)
    if chosen.method == "files":
        if chosen.shard_size is not None:
            raise ConfigError("--shard-size belongs to --method shards, not to files")
        return Serialization(chosen.hash)
    size = SHARD_BYTES if chosen.shard_size is None else _bytes(chosen.shard_size)
    try:
        return Serialization(chosen.hash, size)
    except Malformed as error:
        raise ConfigError(f"--shard-size {chosen.shard_size}: {error}") from error


def _bytes(text: str) -> int:
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(
            f"--shard-size {text!r}: expected bytes, or a number with KiB, MiB or GiB "
            "as in 64MiB"
        )
    return int(match[1]) << _UNITS[match[2]]
