"""``ztserve registry``: the door to a registry, and copies to a registry server."""

import argparse
import signal
import sys
import threading
from pathlib import Path

from ztserve import config, identity
from ztserve.artifacts import (
    Access,
    Registry,
    RegistryUrl,
    open_registry,
    publish,
    read_access,
)
from ztserve.doors import DoorAddress
from ztserve.errors import ConfigError

GRACE_S = 5.0
SILENT_S = 1.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    serve = actions.add_parser(
        "serve", help="let replicas read models over mutual TLS, until Ctrl-C"
    )
    serve.add_argument(
        "--from",
        dest="source",
        help="a folder or the address of a server (default: ztserve.toml's registry)",
    )
    serve.add_argument(
        "--credentials", type=Path, help="a file of mode 0600 that the server asks for"
    )
    serve.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="default: that of ztserve.toml's registry, else 127.0.0.1:7444",
    )
    push = actions.add_parser("push", help="copy a published model to a server")
    push.add_argument("model", help="name:version, as published")
    push.add_argument(
        "--to", required=True, metavar="URL", help="e.g. oci+https://HOST/PATH"
    )
    push.add_argument(
        "--credentials",
        type=Path,
        help="a file of mode 0600 that may push; never the one that replicas have",
    )
    push.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="the OCI image layout (default: ztserve.toml's registry)",
    )
    push.add_argument(
        "--alias", action="append", default=[], help="may be repeated (default: none)"
    )


def run(chosen: argparse.Namespace) -> int:
    """Serve, or push."""
    return _serve(chosen) if chosen.action == "serve" else _push(chosen)


def _serve(chosen: argparse.Namespace) -> int:
    """Open the door, say where, and stay until told to stop."""
    identity.harden_process()
    settings = config.load()
    host, port = config.door_listener(settings, chosen.listen)
    registry = _behind(settings, chosen)
    source = _identity(settings)
    with (
        source,
        config.open_quarantine(settings) as quarantine,
        config.open_log(settings, "registry", str(port), source) as log,
    ):
        server = config.registry_door(
            settings,
            registry,
            source=source,
            log=log,
            quarantine=quarantine,
            signed=config.admit(settings, log),
        )
        try:
            server.start(host, range(port, port + 1))
        except ConfigError as error:
            raise ConfigError(
                f"{host}:{port} is taken, or not of this machine: choose another with "
                "--listen HOST:PORT"
            ) from error
        stop = threading.Event()
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, lambda *_: stop.set())
        print(f"{DoorAddress(f'{_shown(host)}:{port}')} as {settings.registry_id}")
        print(f"  registry {registry!r}")
        print(f"  policy   {', '.join(map(str, settings.authorization.policies))}")
        print("serving; Ctrl-C stops it", flush=True)
        stop.wait()
        server.stop(GRACE_S)
    return 0


def _identity(settings: config.Settings) -> identity.LiveSource:
    """Get the door its identity; say so where it has to be waited for."""
    waiting = threading.Timer(
        SILENT_S,
        print,
        [f"waiting for an agent to make us {settings.registry_id}: `ztserve run`"],
        {"file": sys.stderr, "flush": True},
    )
    waiting.daemon = True
    waiting.start()
    try:
        return config.obtain_identity(settings, settings.registry_id)
    finally:
        waiting.cancel()


def _behind(settings: config.Settings, chosen: argparse.Namespace) -> Registry:
    """Open what lies behind the door, which is no door itself."""
    named = settings.artifacts.registry
    if chosen.source is not None:
        access = read_access(chosen.credentials) if chosen.credentials else None
        return open_registry(chosen.source, access)
    if isinstance(named, DoorAddress):
        raise ConfigError(
            f"[artifacts] registry is the door itself ({named}): name the registry "
            "behind it with --from FOLDER or --from oci+https://HOST/PATH"
        )
    return config.open_registry(settings)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _push(chosen: argparse.Namespace) -> int:
    """Push; print what is there now."""
    url = RegistryUrl.parse(chosen.to)
    source = chosen.source or config.load().artifacts.registry
    if not isinstance(source, Path):
        raise ConfigError(f"{source} is no folder to push from: name one with --from")
    access = read_access(chosen.credentials) if chosen.credentials else Access()
    model = publish.push(source, chosen.model, url, access, aliases=chosen.alias)
    print(f"{model.name}:{model.version} {model.digest}")
    return 0
