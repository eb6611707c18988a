"""``ztserve sign``: a model directory, by its trainer; a trust policy, by the root."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from ztserve import config
from ztserve.artifacts import TrustPolicy, publish
from ztserve.artifacts.publish import SHARD_BYTES
from ztserve.artifacts.registry.directory import model_files
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.keys import key_id
from ztserve.artifacts.statements.manifest import parse_manifest
from ztserve.artifacts.statements.serialization import (
    HASH_TYPES,
    METHODS,
    Serialization,
)
from ztserve.artifacts.statements.strict import Malformed
from ztserve.artifacts.trust.signers import load_key
from ztserve.cli import certified, show, signer
from ztserve.errors import ConfigError

_SIZE = re.compile(r"([1-9][0-9]{0,15})(|KiB|MiB|GiB)\Z")
_UNITS = {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("directory", type=Path, help="a model, or a trust policy")
    signer.arguments(parser, "the development trainer's; for a policy, the root's")
    certified.arguments(parser)
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
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Write model.sig into the directory, or POLICY.sig; print what it says."""
    if chosen.directory.is_file():
        return _sign_policy(chosen.directory, chosen)
    sizes = model_files(chosen.directory)
    how = _serialization(chosen, sizes)
    signing = certified.signer(chosen, lambda: _key(chosen), "trainer")
    path = publish.sign_model(
        chosen.directory, signing, name=chosen.name, serialization=how
    )
    envelope = parse_envelope(path.read_bytes(), what=str(path))
    manifest = parse_manifest(envelope)
    told = {
        "signature": str(path),
        "digest": manifest.digest,
        "key": envelope.key_id,
        **certified.facts(envelope),
        "files": len(manifest.files),
        "bytes": sum(sizes.values()),
        "method": how.method,
        "shard_size": how.shard_size,
        "hash": how.hash_type,
    }
    if chosen.json:
        show.as_json(told)
    else:
        show.facts((k.replace("_", " "), v) for k, v in told.items() if v is not None)
    return 0


def _key(chosen: argparse.Namespace) -> publish.StatementSigner:
    path = chosen.key or config.load().state / "keys/trainer.pem"
    return signer.load(path, chosen.passphrase_file)


def _serialization(
    chosen: argparse.Namespace, sizes: Mapping[str, int]
) -> Serialization:
    if chosen.method is None and chosen.shard_size is None:
        return publish.choose_serialization(sizes, chosen.hash)
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


def _sign_policy(policy: Path, chosen: argparse.Namespace) -> int:
    if chosen.key is None:
        raise ConfigError(
            f"{policy} is a file, so a trust policy: name the root's key with --key "
            "(`ztserve key new root.pem --root` makes one); models are directories"
        )
    root = signer.load(chosen.key, chosen.passphrase_file)
    text = TrustPolicy.check_signable(policy)
    _check_root(policy, root.id)
    publish.check_raised(policy, text, root.public)
    print(publish.sign_policy(policy, root, text=text))
    return 0


def _check_root(policy: Path, signs: str) -> None:
    """Raise ConfigError if it is ztserve.toml's, and `signs` not the id of its root."""
    chosen = config.load().artifacts
    ours = chosen.trust_policy
    if chosen.trust_root is None or not (ours.exists() and ours.samefile(policy)):
        return
    root = key_id(load_key(str(chosen.trust_root), Path(), "the trust root"))
    if signs != root:
        raise ConfigError(
            f"{policy} is {config.FILE}'s trust policy, whose trust_root is "
            f"{chosen.trust_root} ({root}), and this key is another ({signs}): nothing "
            "was signed; give that root's private key with --key, or name this key's "
            "public half as [artifacts] trust_root first"
        )
