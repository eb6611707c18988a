"""ztserve as an arm: the digits example on Ray, with every room on, and its gateway.

The project is what ``ztserve init`` writes, with the seed's policies: the load comes
as the developer's identity, over mutual TLS, and every call leaves its audit record.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from bench.load import Arm, LoadError, family
from bench.oip import INFER
from bench.plain_serve import ROW, network, request_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ztserve.config import Settings
    from ztserve.identity import Svid

APP = "digits"


def prepare(project: Path, ports: Mapping[str, int]) -> None:
    """Make the project and publish the model; call it before Ray starts.

    `ports`: of directory and gateway, instead of the fixed ones of a real project.
    """
    from examples.training.release import released
    from ztserve import config
    from ztserve.cli.init import initialise

    initialise(project)
    file = project / config.FILE
    text = file.read_text()
    for table, port in ports.items():
        head, found, tail = text.partition(f"[{table}]")
        if not found:
            raise LoadError(f"{file} has no table [{table}]")
        first, _, rest = tail.partition("port = ")
        text = f"{head}{found}{first}port = {port}{rest.lstrip('0123456789')}"
    file.write_text(text)

    def train(folder: Path) -> Mapping[str, object]:
        save_file(network().state_dict(), folder / "model.safetensors")
        return {}

    released(config.load(file), "digits", "1", train)


def start(folder: Path) -> Arm:
    """Deploy the example into the Ray session of this process; return its direct arm.

    `folder` takes the SVID that the load generator presents.
    """
    import numpy as np

    from examples.digits import Digits
    from ztserve import config, transport
    from ztserve.serving import cluster

    cluster.deploy(Digits.options(ray_actor_options={"num_cpus": 0.1}).bind(), APP)
    settings = config.load()
    source = config.obtain_identity(settings)
    with transport.Client(
        f"{settings.identity.namespace}/{Digits.service}",
        source=source,
        directory=f"{settings.directory.host}:{settings.directory.port}",
        directory_id=settings.directory_id,
    ) as client:
        answer = np.asarray(client.infer({"pixels": ROW})["probabilities"], "<f4")
    svid = source.current().svid
    cert, key = write_svid(folder, svid)
    source.close()
    raise NotImplementedError(settings, answer, cert, key)


def write_svid(folder: Path, svid: Svid) -> tuple[str, str]:
    """Write an SVID as PEM files that only this user can read; return their paths."""
    folder.mkdir(mode=0o700, parents=True)
    paths = []
    for name, pem in (("svid.pem", svid.chain_pem()), ("key.pem", svid.key_pem())):
        path = folder / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(pem)
        paths.append(str(path))
    return paths[0], paths[1]
