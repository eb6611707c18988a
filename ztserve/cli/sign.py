"""``ztserve sign``: the trainer's signature over a model directory."""

import argparse
from pathlib import Path

from ztserve import config
from ztserve.artifacts import publish


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("directory", type=Path)
    parser.add_argument("--key", type=Path, help="default: the development trainer's")
    parser.add_argument("--name", help="of the model, for people (default: directory)")


def run(chosen: argparse.Namespace) -> int:
    """Write model.sig into the directory."""
    signer = publish.load_signer(chosen.key or config.load().state / "keys/trainer.pem")
    print(publish.sign_model(chosen.directory, signer, name=chosen.name))
    return 0
