"""``ztserve gateway``: the HTTPS edge, a process of its own without Ray."""

import argparse
import signal
import threading
from dataclasses import replace

from ztserve import config, identity, transport
from ztserve.errors import ConfigError
from ztserve.gateway import Gateway

GRACE_S = 5.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--port", type=int, help="default: ztserve.toml's")


def run(chosen: argparse.Namespace) -> int:
    """Open the edge, say where, and stay until told to stop."""
    identity.harden_process()
    settings = config.load()
    if chosen.port:
        # What is signed is where it listens, not what the file says.
        settings = replace(
            settings, gateway=replace(settings.gateway, port=chosen.port)
        )
    if not settings.gateway.deployments:
        raise ConfigError("[gateway] deployments is empty: name what it routes to")
    source = config.obtain_identity(settings, settings.gateway_id)
    tokens = config.open_tokens(settings, source)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    where = settings.gateway
    with (
        config.open_quarantine(settings) as quarantine,
        config.open_log(settings, where.service, str(where.port), source) as log,
    ):
        signed = config.admit(settings, log)
        gateway = Gateway(
            source=source,
            policies=config.load_policies(
                settings,
                service=where.service,
                namespace=where.namespace,
                # Which models there are is for the deployments to say.
                operations=None,
                signed=signed,
            ),
            deployments={
                name: client(settings, source, name, quarantine, tokens)
                for name in where.deployments
            },
            log=log,
            address=(where.host, where.port),
            quarantine=quarantine,
        )
        host, port = gateway.start()
        print(f"https://{host}:{port} as {settings.gateway_id}", flush=True)
        stop.wait()
        gateway.stop(GRACE_S)
    source.close()
    return 0


def client(
    settings: config.Settings,
    source: identity.Source,
    deployment: str,
    quarantine: identity.Quarantine | None = None,
    tokens: identity.JwtSource | None = None,
) -> transport.AsyncClient:
    """Return a client of one deployment, found through the directory."""
    namespace, _, service = deployment.rpartition("/")
    return transport.AsyncClient(
        f"{namespace or settings.identity.namespace}/{service}",
        source=source,
        directory=f"{settings.directory.host}:{settings.directory.port}",
        directory_id=settings.directory_id,
        quarantine=quarantine,
        tokens=tokens,
    )
