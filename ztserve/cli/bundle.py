"""``ztserve bundle``: sign all that decides what runs, or hold this node against it."""

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ztserve import config
from ztserve.artifacts import (
    LEFT_OUT,
    Deployment,
    DeploymentFloor,
    Part,
    Registry,
    TrustPolicy,
    VerifiedDeployment,
    publish,
    verify_model,
)
from ztserve.artifacts.deployment.judging import read_deployment
from ztserve.artifacts.statements.deployment import digest_of
from ztserve.cli import certified, show, signer
from ztserve.cli import run as running
from ztserve.cli.verify import UNPROVEN
from ztserve.doors import DoorRegistry
from ztserve.errors import ConfigError
from ztserve.serving.parts import arguments_of, part_of

HEADS = ("part", "what", "digest")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("sign", "verify"))
    parser.add_argument(
        "app", nargs="?", help="module:app; verify holds it against the bundle as well"
    )
    signer.arguments(parser, "the development deployer's")
    certified.arguments(parser)
    parser.add_argument(
        "--sequence",
        type=int,
        help="number of this bundle (default: one more than the last)",
    )
    parser.add_argument(
        "--out", type=Path, help="default: ztserve.toml's deployment_bundle"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Sign, or verify; print what the bundle says."""
    settings = config.load()
    if chosen.action == "verify":
        _tell(_verified(settings, chosen.app), chosen)
        return 0
    if chosen.app is None:
        raise ConfigError("name the application: ztserve bundle sign module:app")
    trust = config.load_trust(settings)
    deployment = _collected(settings, chosen)
    path = chosen.key or settings.state / "keys/deployer.pem"
    key = certified.signer(
        chosen, lambda: signer.load(path, chosen.passphrase_file), "deployer"
    )
    out = chosen.out or settings.artifacts.deployment_bundle
    _tell(publish.sign_deployment(deployment, key, out, trust=trust), chosen)
    return 0


def _collected(settings: config.Settings, chosen: argparse.Namespace) -> Deployment:
    """Collect all that decides what runs of an application, as it is here and now."""
    trust = config.load_trust(settings)
    app = running.load(chosen.app)
    running.models(chosen.app, app)
    parts = _parts(settings, app)
    code, trees = config.measure_code(settings, {p.module for p in parts.values()})
    placed = {
        name: replace(part, tree=trees[part.module]) for name, part in parts.items()
    }
    return Deployment(
        application=chosen.app,
        sequence=_sequence(settings, chosen),
        trust_root=trust.root,
        trust_version=trust.version,
        settings=config.signed_settings(settings),
        files=config.read_named(settings),
        parts=placed,
        code=code,
    )


def _parts(settings: config.Settings, app: Any) -> dict[str, Part]:
    """Return the deployments of an application; each model verified, byte by byte."""
    trust, registry = config.load_trust(settings), config.open_registry(settings)
    with ExitStack() as ending:
        if isinstance(registry, DoorRegistry):
            ending.callback(registry.close)
        return _pinned(app, registry, trust)


def _pinned(app: Any, registry: Registry, trust: TrustPolicy) -> dict[str, Part]:
    from ztserve.serving.binding import bound

    parts: dict[str, Part] = {}
    for plan, cls, args, kwargs in bound(app):
        if not plan.target:
            raise ConfigError(
                f"class {cls.__name__} cannot be imported by its name, so its code "
                "would travel by value: put it at the top of a module"
            )
        models = {}
        for name, ref in plan.models.items():
            model = verify_model(registry, ref, trust)
            models[name] = f"{model.name}:{model.version}@{model.digest}"
        part = part_of(plan, cls, arguments_of(args, kwargs), models=models)
        if parts.setdefault(part.name, part) != part:
            raise ConfigError(f"two deployments are called {part.name}: name them")
    return parts


def _sequence(settings: config.Settings, chosen: argparse.Namespace) -> int:
    """Return the number asked for, or one more than node and file have seen."""
    if chosen.sequence is not None:
        if chosen.sequence < 1:
            raise ConfigError(f"--sequence {chosen.sequence}: expected 1 or more")
        return int(chosen.sequence)
    newest = DeploymentFloor(settings.state).newest(chosen.app)
    before = chosen.out or settings.artifacts.deployment_bundle
    if os.path.lexists(before):
        found = read_deployment(config.read_bundle(before), str(before))
        if found.application == chosen.app:
            newest = max(newest, found.sequence)
    return newest + 1


def _verified(settings: config.Settings, app: str | None) -> VerifiedDeployment:
    """Hold this node against the bundle: settings, files, code; and `app`, if given."""
    verified = config.load_deployment(settings, remember=False)
    if verified is None:
        raise ConfigError(
            f"there is no deployment bundle {settings.artifacts.deployment_bundle}: "
            "make one with `ztserve bundle sign module:app`"
        )
    running.on_path()
    config.check_identity_files(settings, verified)
    config.load_policies(
        settings,
        service="(any)",
        namespace=settings.identity.namespace,
        operations=None,
        signed=verified,
    )
    config.check_code(settings, verified)
    if app is not None:
        verified.check_application(app)
        running.check_parts(verified, running.load(app))
    return verified


def _tell(verified: VerifiedDeployment, chosen: argparse.Namespace) -> None:
    signed, by = verified.signed, verified.signer
    at = by.signed_at
    facts: dict[str, object] = {
        "application": signed.application,
        "bundle": verified.what,
        "sequence": signed.sequence,
        "digest": verified.digest,
        "signed by": str(by),
        "when": UNPROVEN if at is None else f"{at:%Y-%m-%dT%H:%M:%SZ}",
        "trust policy": f"version {signed.trust_version} or newer, under "
        + (signed.trust_root or "no root"),
        "left out of code": ", ".join(sorted(LEFT_OUT)),
    }
    rows = list(_rows(signed))
    if chosen.json:
        named = [dict(zip(HEADS, row, strict=True)) for row in rows]
        show.as_json(facts | {"parts": named})
        return
    show.facts(facts.items())
    title = "signed" if chosen.action == "sign" else "as signed"
    show.table(title, HEADS, rows)


def _rows(signed: Deployment) -> Iterator[tuple[str, str, str]]:
    count = f"{len(signed.settings)} keys of ztserve.toml, defaults included"
    yield "settings", count, digest_of(dict(signed.settings))
    for name, digest in signed.files.items():
        yield "file", name, digest
    for part in signed.parts.values():
        yield f"deployment {part.name}", part.target, part.tree or "installed"
        yield "  service", part.service, ""
        yield "  arguments", part.arguments, ""
        for name, ref in part.models.items():
            model, _, digest = ref.partition("@")
            yield f"  model {name}".rstrip(), model, digest
    for tree, files in signed.code.trees.items():
        yield "code", f"{len(files)} files of the application", tree
    yield "code", f"Python {signed.code.python}", ""
    packages: Mapping[str, object] = {
        name: list(found) for name, found in signed.code.packages.items()
    }
    told = f"{len(packages)} installed packages, ztserve {signed.code.ztserve}"
    yield "code", told, digest_of(packages)
