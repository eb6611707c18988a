"""``ztserve run module:app``: serve on this machine until Ctrl-C, without any proxy."""

import argparse
import importlib
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ztserve import config
from ztserve.artifacts import VerifiedDeployment
from ztserve.errors import ConfigError
from ztserve.serving.cluster import attached, deploy, replicas
from ztserve.serving.parts import arguments_of, part_of
from ztserve.serving.running import check_free
from ztserve.serving.weights import check_published
from ztserve.types import ModelRef


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("app", help="module:name of a bound ZTDeployment")
    parser.add_argument(
        "--address", help="a running Ray cluster (default: start one here)"
    )
    parser.add_argument("--num-cpus", type=int, help="of the Ray started here")


def run(chosen: argparse.Namespace) -> int:
    """Serve, say where, wait, and stop cleanly.

    A project that is served already, and mistakes in the configuration, the files that
    it names or the module, show before Ray starts.
    """
    settings = config.load()
    if chosen.address is None:
        check_free(settings)  # before all else that could be wrong
    signed = config.load_deployment(settings)
    if signed is not None:
        on_path()
        signed.check_application(chosen.app)
        config.check_code(settings, signed)
    # Then: a mistake in it shows at once, and replicas import it from where we did.
    app = load(chosen.app)
    config.check_identity_files(settings, signed)
    config.load_policies(
        settings,
        service="(any)",
        namespace=settings.identity.namespace,
        operations=None,
        signed=signed,
    )
    wanted = models(chosen.app, app)
    if signed is not None:
        check_parts(signed, app)
    if chosen.address is None:  # elsewhere, a replica may see another registry
        unchecked = check_published(settings, wanted)
        if unchecked:
            print(unchecked, flush=True)
    print("starting Ray", flush=True)
    with attached(chosen.address, num_cpus=chosen.num_cpus):
        # Only now: Ray has put a handler of its own there, which aborts the process.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        deploy(app)
        for key, endpoints in replicas(settings):
            for endpoint in endpoints:
                print(f"{key} at {endpoint.address}")
                print(f"  model    {endpoint.model}:{endpoint.version}")
                print(f"  digest   {endpoint.digest}")
            service = key.rpartition("/")[2]
            print(f"  identity {settings.spiffe_id(service)}")
            print(f"  policy   {', '.join(map(str, settings.authorization.policies))}")
            print(f"  call it  ztserve predict {service} --example")
            print("  see it   ztserve status")
        print("serving; Ctrl-C stops it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopping")
    return 0


def load(name: str) -> Any:
    """Import ``module:app`` from the working directory. Raises ConfigError."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"{name!r}: expected module:app, e.g. examples.digits:app")
    on_path()
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be imported: {error}") from error


def on_path() -> None:
    """Have modules of the working directory imported, before all others."""
    here = str(Path.cwd())
    if sys.path[0] != here:
        sys.path.insert(0, here)


def check_parts(signed: VerifiedDeployment, app: Any) -> None:
    """Raise VerificationError unless each deployment of `app` is as signed."""
    from ztserve.serving.binding import bound

    for plan, cls, args, kwargs in bound(app):
        part = signed.part(part_of(plan, cls, arguments_of(args, kwargs)))
        for name, ref in plan.models.items():
            signed.check_ref(part, name, ref)


def models(name: str, app: Any) -> list[ModelRef]:
    """Return what an application serves. Raises ConfigError for what is not ours."""
    from ztserve.serving.binding import bound, is_ours  # with Ray, a second

    if not is_ours(app):
        kind, what = ("the class", app) if isinstance(app, type) else ("a", type(app))
        raise ConfigError(
            f"{name!r} is {kind} {what.__name__}: expected what `bind` of a "
            "ZTDeployment returns, e.g. `app = Price.bind()` and price:app"
        )
    return [ref for one in bound(app) for ref in one.plan.models.values()]
