"""``ztserve registry push``: copy a published model to a registry server."""

import argparse
from pathlib import Path

from ztserve import config
from ztserve.artifacts import Access, RegistryUrl, publish, read_access
from ztserve.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("push",))
    parser.add_argument("model", help="name:version, as published")
    parser.add_argument(
        "--to", required=True, metavar="URL", help="e.g. oci+https://HOST/PATH"
    )
    parser.add_argument(
        "--credentials",
        type=Path,
        help="a file of mode 0600 that may push; never the one that replicas have",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="the OCI image layout (default: ztserve.toml's registry)",
    )
    parser.add_argument(
        "--alias", action="append", default=[], help="may be repeated (default: none)"
    )


def run(chosen: argparse.Namespace) -> int:
    """Push; print what is there now."""
    url = RegistryUrl.parse(chosen.to)
    source = chosen.source or config.load().artifacts.registry
    if isinstance(source, RegistryUrl):
        raise ConfigError(f"{source} is no folder to push from: name one with --from")
    access = read_access(chosen.credentials) if chosen.credentials else Access()
    model = publish.push(source, chosen.model, url, access, aliases=chosen.alias)
    print(f"{model.name}:{model.version} {model.digest}")
    return 0
