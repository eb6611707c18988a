"""A Ray cluster to serve on: started here, or attached to; deploy, status, shutdown."""

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ztserve import config, transport
from ztserve.errors import ConfigError, ZTServeError
from ztserve.serving.running import claimed

_OURS = re.compile(r"ztserve\.\S*?(\w+): (.*?)(?=\n\n|\n\S*Traceback|\Z)", re.DOTALL)
CONNECT_S = 5.0


@dataclass(frozen=True)
class Status:
    """One deployment, as Serve and its replicas see it."""

    app: str
    deployment: str
    state: str
    replicas: str
    why: str
    """Begins with our own sentence, where a replica refused to start."""


class DeployFailed(ZTServeError):
    """The application did not come up; the message is the replica's own sentence."""


class NoCluster(ConfigError):
    """No Ray answers us where one should be."""


@contextmanager
def attached(
    address: str | None = None, *, num_cpus: int | None = None
) -> Iterator[None]:
    """Start Ray on this machine, or attach to `address`; without any Serve proxy.

    What was started here ends with the block. Raises NoCluster where there is no such
    Ray, ConfigError where another process serves this project.
    """
    config.before_ray()
    if config.ray_auth_mode() not in ("", "token"):
        raise ConfigError("RAY_AUTH_MODE must be token: export RAY_AUTH_MODE=token")
    import ray
    from ray import serve

    with ExitStack() as ending:
        if address is not None:
            _connect(address, None)
            ending.callback(ray.shutdown)
        else:
            settings = config.load()
            note = ending.enter_context(claimed(settings))
            _connect(None, num_cpus)
            ending.callback(ray.shutdown)
            ending.callback(_end, settings)
            serve.start(
                proxy_location="Disabled", logging_config={"enable_access_log": False}
            )
            note(ray_address())
            ending.callback(note, "")
        yield


def _connect(address: str | None, num_cpus: int | None) -> None:
    import ray

    from ztserve.serving import ray_private

    ray_private.enable_token_auth()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address not in (None, "auto"):
        _check_answers(address)
    try:
        ray.init(
            # Without "local" Ray would take any cluster that it finds, which we would
            # end then.
            address=address or "local",
            namespace="serve",
            num_cpus=None if address else num_cpus,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Replicas import the user's module from where this process found it.
            runtime_env={
                "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            },
        )
    except ray.exceptions.AuthenticationError as error:
        raise NoCluster(f"this Ray wants its token: {error}") from error
    except ConnectionError as error:
        raise NoCluster(f"there is no Ray at {address!r}: {error}") from error


def _check_answers(address: str) -> None:
    """Raise NoCluster where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise NoCluster(
            f"no Ray answers at {address} ({error}): start the application with "
            "`ztserve run`, or name host:port of its Ray with --address"
        ) from error


def _end(settings: config.Settings) -> None:
    """End what runs on the Ray that was started here."""
    from ray import serve

    from ztserve.serving.node import end

    for name in list(serve.status().applications):
        serve.delete(name)
    # Before Serve: what follows it would ask on while it goes away.
    end(settings)


def ray_address() -> str:
    """Return where other processes attach to this Ray."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def deploy(app: Any, name: str = "default") -> None:
    """Deploy `app` and wait until it runs.

    Raises DeployFailed with our own sentence; replicas of a version before keep
    answering then.
    """
    from ray import serve

    try:
        serve.run(app, name=name, route_prefix=None)
    except RuntimeError as error:
        found = [s.why for s in statuses() if s.app == name and s.why]
        raise DeployFailed(found[0] if found else str(error)) from error


def statuses() -> list[Status]:
    """Return how each deployment is doing."""
    from ray import serve

    rows = []
    for app_name, app in serve.status().applications.items():
        for name, deployment in app.deployments.items():
            counts = ", ".join(
                f"{count} {state}" for state, count in deployment.replica_states.items()
            )
            state = getattr(deployment.status, "value", deployment.status)
            why = our_sentence(deployment.message)
            rows.append(Status(app_name, name, str(state), counts, why))
    return rows


def replicas(
    settings: config.Settings,
) -> list[tuple[str, tuple[transport.Endpoint, ...]]]:
    """Return where the replicas of this project answer, by namespace/service."""
    from ztserve.serving.node import directory_listing

    return sorted(directory_listing(settings).items())


def our_sentence(message: str) -> str:
    """Return the refusal in Serve's message, without the traceback around it."""
    found = _OURS.search(message)
    return f"{found[1]}: {found[2].strip()}" if found else message.strip()
