"""``ztserve init``: a project that works, in seconds and without secrets in sight."""

import argparse
import os
import sys
from importlib.resources import files
from pathlib import Path

from ztserve import config
from ztserve.artifacts import Role, publish
from ztserve.errors import ConfigError

ROLES: tuple[Role, ...] = ("trainer", "deployer")

_TEMPLATES = {
    "ztserve.toml": config.FILE,
    "seed.yaml": "policies/seed.yaml",
    "developer.yaml": "policies/developer.yaml",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(),
        help="of the project (default: this one)",
    )


def run(chosen: argparse.Namespace) -> int:
    """Write the files and name them."""
    written = initialise(chosen.folder)
    for path in written:
        print(path)
    if not written:
        print(
            f"{chosen.folder.resolve()} is a project already: nothing was written",
            file=sys.stderr,
        )
    return 0


def initialise(folder: Path) -> list[Path]:
    """Make `folder` a project: what exists is kept, what lacks is written.

    Raises ConfigError where keys exist that no trust policy names, or a configuration
    for production lacks its trust policy.
    """
    written = []
    for template, name in _TEMPLATES.items():
        path = folder / name
        # Whoever may write here decides who may call, so others never may.
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        text = files("ztserve.cli").joinpath("templates", template).read_bytes()
        if _create(path, text):
            written.append(path)
    settings = config.load(folder / config.FILE)
    return written + _keys_and_trust(settings)


def _keys_and_trust(settings: config.Settings) -> list[Path]:
    """Make keys of a trainer, a deployer and a clock, and a policy that names them."""
    trust = settings.artifacts.trust_policy
    if trust.exists():
        return []
    if settings.profile == "production":
        raise ConfigError(
            f"{trust}: production lacks its trust policy, and init makes development "
            "keys only; run `ztserve key new` where each key is to stay"
        )
    folder = settings.state / "keys"
    for private in (settings.state, folder):
        private.mkdir(mode=0o700, exist_ok=True)
    _create(settings.state / ".gitignore", b"*\n")  # keys belong into no repository
    keys = [
        publish.new_key(
            folder / f"{role}.pem", name=f"development {role}", roles=[role]
        )
        for role in ROLES
    ]
    clock = publish.new_authority(folder / "timestamp.pem", name="development clock")
    entries = [*(key.entry for key in keys), clock.entry]
    text = (
        "# Whose signatures count, and as what: docs/models.md.\nversion = 1\n"
        f'trust_domain = "{settings.identity.trust_domain}"\n'
    )
    _create(trust, "\n".join([text, *entries]).encode())
    return [key.private for key in keys] + [clock.private, trust]


def _create(path: Path, content: bytes) -> bool:
    """Write a file that others may read at most; False where there is one already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return True
