"""Train, sign as the trainer, release as the deployer, publish: `... publish`.

Both keys are the development keys that ``ztserve init`` made under ``.ztserve/``. In
earnest they belong to two pipelines: who trains does not release, and neither serves.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ztserve import config
from ztserve.artifacts import Resolved, TrustPolicy, publish, verify_model
from ztserve.config import Settings
from ztserve.errors import ConfigError, ZTServeError

Train = Callable[[Path], Mapping[str, object]]
"""Writes a model into a directory and returns what there is to say of it."""


def main(name: str, train: Train) -> None:
    """Run ``python -m examples.NAME publish [--version N]``; exits the process."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}")
    parser.add_argument("verb", choices=("publish",), help="train, sign and publish")
    parser.add_argument("--version", default="1", help="to release as (default: 1)")
    chosen = parser.parse_args()
    try:
        for key, value in released(config.load(), name, chosen.version, train).items():
            print(f"{key:<12} {value}")
    except ZTServeError as error:
        sys.exit(f"{name} was not published: {error}")


def released(
    settings: Settings, name: str, version: str, train: Train
) -> dict[str, object]:
    """Train a model and publish it as ``name:version`` and ``name@production``.

    Returns what happened, for people. Raises ConfigError where the project has no
    keys yet, RegistryError where the version exists with other content.
    """
    start = time.perf_counter()
    keys = settings.state / "keys"
    if not keys.is_dir():
        raise ConfigError(f"there are no keys in {keys}: run `ztserve init` first")
    with tempfile.TemporaryDirectory(prefix="ztserve-training-") as folder:
        facts = train(Path(folder))
        trained = time.perf_counter()
        model = _publish(Path(folder), settings, name, version)
    return {
        "model": f"{model.name}:{model.version}, also {model.name}@production",
        **{key: _short(value) for key, value in facts.items() if key != "characters"},
        "digest": model.digest,
        "registry": settings.artifacts.registry,
        "seconds": f"{trained - start:.1f} to train, "
        f"{time.perf_counter() - trained:.1f} to sign and publish",
    }


def _publish(folder: Path, settings: Settings, name: str, version: str) -> Resolved:
    keys = settings.state / "keys"
    publish.sign_model(folder, publish.load_signer(keys / "trainer.pem"), name=name)
    # The deployer puts its name only to what a trainer whom the policy trusts signed.
    trust = TrustPolicy.load(settings.artifacts.trust_policy)
    verify_model(folder, f"{name}:{version}", trust, purpose="deploy")
    deployer = publish.load_signer(keys / "deployer.pem")
    publish.release_model(folder, deployer, name=name, version=version)
    return publish.publish(
        folder, settings.artifacts.folder, name=name, version=version
    )


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
