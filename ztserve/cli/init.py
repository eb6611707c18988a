"""``ztserve init``: a project that works, in seconds and without secrets in sight."""

import argparse
import os
from importlib.resources import files
from pathlib import Path

from ztserve import config
from ztserve.artifacts import Role, publish

ROLES: tuple[Role, ...] = ("trainer", "deployer")

HELP = "write a commented ztserve.toml, development policies, keys, an empty registry"

_TEMPLATES = {
    "ztserve.toml": config.FILE,
    "seed.yaml": "policies/seed.yaml",
    "developer.yaml": "policies/developer.yaml",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("folder", nargs="?", type=Path, default=Path())


def run(chosen: argparse.Namespace) -> int:
    """Write the files and name them."""
    for path in initialise(chosen.folder):
        print(path)
    return 0


def initialise(folder: Path) -> list[Path]:
    """Make `folder` a project: what exists is kept, what lacks is written.

    Raises ConfigError where keys exist that no trust policy names.
    """
    written = []
    for template, name in _TEMPLATES.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                files("ztserve.cli").joinpath("templates", template).read_bytes()
            )
            # Whoever may write here decides who may call.
            path.chmod(0o644)
            written.append(path)
    settings = config.load(folder / config.FILE)
    return written + _keys_and_trust(settings)


def _keys_and_trust(settings: config.Settings) -> list[Path]:
    """Make a trainer's and a deployer's key, and a trust policy that names the two."""
    trust = settings.artifacts.trust_policy
    if trust.exists():
        return []
    folder = settings.state / "keys"
    for private in (settings.state, folder):
        private.mkdir(mode=0o700, exist_ok=True)
    keys = [
        publish.new_key(
            folder / f"{role}.pem", name=f"development {role}", roles=[role]
        )
        for role in ROLES
    ]
    text = "# Whose signatures count, and as what.\nversion = 1\n"
    for key in keys:
        beside = os.path.relpath(key.public, trust.parent)
        text += "\n" + key.entry.replace(key.public.name, beside)
    trust.write_text(text)
    trust.chmod(0o644)
    return [key.private for key in keys] + [trust]
