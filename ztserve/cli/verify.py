"""``ztserve verify``: would a replica load this?"""

import argparse
from pathlib import Path

from ztserve import config
from ztserve.artifacts import TrustPolicy, verify_model
from ztserve.cli import show


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", help="name[:version], name@alias, or with a digest")
    parser.add_argument(
        "--from",
        dest="source",
        help="a registry or signed directory (default: ztserve.toml's registry)",
    )
    parser.add_argument("--trust", type=Path, help="default: ztserve.toml's")
    parser.add_argument(
        "--for", dest="purpose", choices=("load", "deploy"), default="load"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Verify every byte and print what was proved; refuse with exit code 2."""
    settings = config.load()
    trust = TrustPolicy.load(chosen.trust or settings.artifacts.trust_policy)
    source = chosen.source or config.open_registry(settings)
    model = verify_model(source, chosen.model, trust, purpose=chosen.purpose)
    facts = {
        "model": model.name,
        "version": model.version,
        "digest": model.digest,
        "signers": [f"{s.name} as {s.role}" for s in model.signers],
        "files": list(model.names),
    }
    if chosen.json:
        show.as_json(facts)
    else:
        show.table("verified", ("", ""), facts.items())
    return 0
