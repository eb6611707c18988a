"""``ztserve publish``: release a signed model as name:version into the registry."""

import argparse
from pathlib import Path

from ztserve import config
from ztserve.artifacts import TrustPolicy, publish, verify_model
from ztserve.cli import signer
from ztserve.errors import ConfigError
from ztserve.types import ModelRef


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("directory", type=Path)
    parser.add_argument("model", help="name:version")
    signer.arguments(parser, "the development deployer's")
    parser.add_argument("--registry", type=Path, help="default: ztserve.toml's")
    parser.add_argument(
        "--alias", action="append", help="may be repeated (default: production)"
    )


def run(chosen: argparse.Namespace) -> int:
    """Verify the trainer's signature, sign the release, publish."""
    settings = config.load()
    ref = ModelRef(chosen.model)
    if ref.version is None:
        raise ConfigError(f"{chosen.model!r}: a release needs a version: name:version")
    trust = TrustPolicy.load(settings.artifacts.trust_policy)
    verify_model(chosen.directory, ref, trust, purpose="deploy")
    path = chosen.key or settings.state / "keys/deployer.pem"
    key = signer.load(path, chosen.passphrase_file)
    publish.release_model(chosen.directory, key, name=ref.name, version=ref.version)
    model = publish.publish(
        chosen.directory,
        chosen.registry or settings.artifacts.folder,
        name=ref.name,
        version=ref.version,
        aliases=chosen.alias or ["production"],
    )
    print(f"{model.name}:{model.version} {model.digest}")
    return 0
