"""``ztserve publish``: release a signed model as name:version into the registry."""

import argparse
from pathlib import Path

from ztserve import config, types
from ztserve.artifacts import publish, verify_model
from ztserve.artifacts.registry.directory import DirectoryRegistry
from ztserve.artifacts.registry.files import list_files
from ztserve.cli import certified, reading, signer
from ztserve.errors import ConfigError, RegistryError
from ztserve.types import ModelRef


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "directory",
        type=Path,
        help="a model that its trainer signed; the release is written into it",
    )
    parser.add_argument("model", help="name:version")
    signer.arguments(parser, "the development deployer's")
    certified.arguments(parser)
    parser.add_argument("--registry", help="a folder (default: ztserve.toml's)")
    parser.add_argument(
        "--alias",
        action="append",
        help="to point at it; may be repeated (default: production)",
    )


def run(chosen: argparse.Namespace) -> int:
    """Verify for deployment, sign release and summary, verify as a replica, publish.

    Nothing is written before all of it is verified.
    """
    settings = config.load()
    ref = ModelRef(chosen.model)
    if ref.version is None:
        raise ConfigError(f"{chosen.model!r}: a release needs a version: name:version")
    registry = _folder(chosen) or settings.artifacts.folder
    if not list_files(chosen.directory):
        raise RegistryError(
            f"{chosen.directory} is empty: save a model there, as safetensors, then "
            f"sign it: `ztserve sign {chosen.directory}`"
        )
    trust = config.load_trust(settings)
    with reading.bar(f"verifying {ref} for its release") as progress:
        looked_at = verify_model(
            chosen.directory, ref, trust, purpose="deploy", progress=progress
        )
    path = chosen.key or settings.state / "keys/deployer.pem"
    key = certified.signer(
        chosen, lambda: signer.load(path, chosen.passphrase_file), "deployer"
    )
    # Whoever may write the folder can put another model there while we ask for a
    # passphrase: from here on it is this one, or none.
    digest = looked_at.digest
    staged = publish.stage_release(
        chosen.directory, key, looked_at, trust, version=ref.version, now=types.now()
    )
    released = DirectoryRegistry(chosen.directory, staged)
    with reading.bar(f"verifying {ref} as a replica") as progress:
        verify_model(released, ref.pinned(digest), trust, progress=progress)
    done = publish.publish_staged(
        chosen.directory,
        registry,
        staged,
        name=ref.name,
        version=ref.version,
        aliases=chosen.alias or ["production"],
        digest=digest,
    )
    print(f"{ref.name}:{ref.version} {done.model.digest}")
    for alias, before in done.before.items():
        moved = "" if before in {None, ref.version} else f"{ref.name}:{before} -> "
        print(f"{alias}: {moved}{ref.name}:{ref.version}")
    return 0


def _folder(chosen: argparse.Namespace) -> Path | None:
    """Return the folder that --registry names; ConfigError where it is a server."""
    if chosen.registry is None:
        return None
    if "://" in chosen.registry:
        # An address may hold a password, which is not repeated.
        raise ConfigError(
            "--registry: a server is not published into; name a folder, then "
            f"`ztserve registry push {chosen.model} --to SERVER`"
        )
    return Path(chosen.registry)
