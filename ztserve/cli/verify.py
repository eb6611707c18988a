"""``ztserve verify``: would a replica load this, may a deployer release it?"""

import argparse
from pathlib import Path

from ztserve import config, types
from ztserve.artifacts import Check, verify_model
from ztserve.cli import reading, show
from ztserve.errors import RegistryError

HEADS = ("stage", "checked", "signed_by", "when", "rule")
UNPROVEN = "no proven time"
"""A signature without a timestamp says nothing of when it was made."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", help="name[:version], name@alias, or with a digest")
    parser.add_argument(
        "--from",
        dest="source",
        help="a registry or signed directory (default: ztserve.toml's registry)",
    )
    parser.add_argument(
        "--trust",
        type=Path,
        metavar="POLICY",
        help="the trust policy to judge by, signed under trust_root where that is set "
        "(default: ztserve.toml's trust_policy)",
    )
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=("load", "deploy"),
        default="load",
        help="load: as a replica, which needs a deployer's release; deploy: as a "
        "deployer, before there is one (default: load)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Verify every byte and print what was proved; refuse with exit code 2."""
    settings = config.load()
    trust = config.load_trust(settings, chosen.trust)
    now = types.now()
    try:
        source = chosen.source or config.open_registry(settings)
        with reading.bar(f"verifying {chosen.model}") as progress:
            model = verify_model(
                source,
                chosen.model,
                trust,
                now=now,
                purpose=chosen.purpose,
                progress=progress,
            )
    except RegistryError as error:
        if chosen.source is None and Path(chosen.model).is_dir():
            raise RegistryError(
                f"{error}; {chosen.model} is a folder here: to verify what is in it, "
                f"`ztserve verify NAME --from {chosen.model}`"
            ) from error
        raise
    facts = {
        "model": model.name,
        "version": model.version,
        "digest": model.digest,
        "signers": [f"{s.name} as {s.role}" for s in model.signers],
        "files": list(model.names),
        "purpose": chosen.purpose,
        "trust policy": f"version {trust.version}, {trust.digest}",
        "verified at": f"{now:%Y-%m-%dT%H:%M:%SZ}",
    }
    checks = [_row(check) for check in model.checks]
    checks.append(("load", ", ".join(model.names), "", "", "each is signed, no other"))
    if chosen.json:
        named = [dict(zip(HEADS, row, strict=True)) for row in checks]
        show.as_json(facts | {"checks": named})
    else:
        show.table("verified", ("", ""), [(k, _plain(v)) for k, v in facts.items()])
        show.table("checked", HEADS, checks)
    return 0


def _row(check: Check) -> tuple[str, ...]:
    if check.by is None:
        return check.stage, check.checked, "", "", check.rule
    at = check.by.signed_at
    when = UNPROVEN if at is None else f"{at:%Y-%m-%dT%H:%M:%SZ}"
    return check.stage, check.checked, str(check.by), when, check.rule


def _plain(value: object) -> object:
    return ", ".join(value) if isinstance(value, list) else value
