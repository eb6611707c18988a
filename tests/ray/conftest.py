"""One Ray for the whole session, with a home, a token and a project of its own."""

import os
import random
import socket
from functools import partial
from pathlib import Path

import pytest

from ztserve import config, transport
from ztserve.cli.init import initialise
from ztserve.serving.cluster import attached, deploy


def free_port() -> int:
    """Below the ports that the kernel gives to outgoing connections, as Ray's many."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/ray/" in str(item.path):
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.slow)
            # What Ray itself warns of is not ours to mend.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A project in which digits:1 and chat:1 are published."""
    folder = tmp_path_factory.mktemp("project")
    home = tmp_path_factory.mktemp("home")
    before = dict(os.environ)
    initialise(folder)
    toml = folder / config.FILE
    toml.write_text(
        toml.read_text()
        .replace("port = 7443", f"port = {free_port()}")
        .replace("port = 8443", f"port = {free_port()}")
    )
    os.environ.update(
        HOME=str(home),
        ZTSERVE_CONFIG=str(toml),
        RAY_AUTH_MODE="token",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_SERVE_LOG_TO_STDERR="0",
    )
    from examples.digits import network  # its bind reads the configuration
    from examples.training.digits import train
    from examples.training.release import released

    settings = config.load()
    released(settings, "digits", "1", partial(train, network=network))
    yield folder
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def cluster(project):
    with attached(num_cpus=8):
        yield config.load(Path(os.environ["ZTSERVE_CONFIG"]))


@pytest.fixture(scope="session")
def models(cluster):
    """The deployments that tests make up, imported when all is set for Ray."""
    from tests.ray import models

    return models


@pytest.fixture(scope="session")
def digits(cluster):
    """digits, two replicas."""
    from examples.digits import Digits

    options = Digits.options(
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
    )
    deploy(options.bind(), name="digits")
    return cluster


@pytest.fixture(scope="session")
def developer(digits):
    source = config.obtain_identity(digits)
    yield source
    source.close()


@pytest.fixture
def client(digits, developer):
    with transport.Client(
        "ml-inference/inference-service",
        source=developer,
        directory=f"{digits.directory.host}:{digits.directory.port}",
        directory_id=digits.directory_id,
    ) as client:
        yield client
