"""ztserve as an arm: a deployment on Ray, with every room on, and its gateway.

The project is what ``ztserve init`` writes, with the seed's policies: the load comes
as the developer's identity, over mutual TLS, and every call leaves its audit record.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from safetensors.torch import save_file

from bench.generators import Arm, LoadError, patiently
from bench.plain_serve import ROW, judge, network

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from bench.question import Question
    from ztserve import ZTDeployment
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

    released(config.load(file), APP, "1", train)


def deploy(folder: Path, question: Question, *, stream: bool) -> Arm:
    """Deploy into the Ray session of this process; return the direct arm.

    `folder` takes the SVID that the load generator presents.
    """
    from bench.pieces import Words
    from examples.digits import Digits
    from ztserve import config, identity
    from ztserve.serving import cluster

    answering: type[ZTDeployment] = Words if stream else Digits
    cluster.deploy(answering.options(ray_actor_options={"num_cpus": 0.1}).bind(), APP)
    settings = config.load()
    source = config.obtain_identity(settings)
    svid, bundles = source.current().svid, source.current().bundles
    source.close()
    pid, address = _replica(settings, answering.service)
    server = identity.dns_name(settings.spiffe_id(answering.service))
    roots = bundles[svid.id.trust_domain]
    with _channel(address, server, svid, roots) as channel:
        size = question.put("ztserve", channel)
    cert, key = _write(folder, svid)
    return Arm(
        "ztserve",
        "grpc",
        address,
        question.rpc,
        question.message.hex(),
        size,
        (pid,),
        (),
        cert,
        key,
    )


@contextmanager
def gateway(direct: Arm) -> Iterator[Arm]:
    """Run ``ztserve gateway`` in front of the `direct` arm; yield its arm."""
    from ztserve import config

    settings = config.load().gateway
    body = json.dumps(
        {
            "model_name": APP,
            "inputs": [
                {
                    "name": "pixels",
                    "datatype": "FP32",
                    "shape": [1, 64],
                    "data": ROW[0].tolist(),
                }
            ],
        }
    ).encode()
    command = [sys.executable, "-m", "ztserve.cli", "gateway"]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            arm = replace(
                direct,
                name="ztserve-https",
                protocol="http",
                address=f"{settings.host}:{settings.port}",
                path="/v1/predict",
                body=body.hex(),
                pids=(process.pid, *direct.pids),
                headers=("content-type: application/json",),
            )
            reply = patiently(lambda: _post(arm, body))
            found = np.array(json.loads(reply)["outputs"][0]["data"], "<f4")
            judge(arm.name, found.tobytes())
            yield replace(arm, reply_bytes=len(reply))
        finally:
            process.terminate()


def _post(arm: Arm, body: bytes) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Its SVID names no host; that it is the gateway is not what is measured here.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(arm.cert, arm.key)
    headers = dict(header.split(": ", 1) for header in arm.headers)
    request = urllib.request.Request(arm.url, body, headers)
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        return bytes(answer.read())


def _replica(settings: Settings, service: str) -> tuple[int, str]:
    """Return process id and address of the replica, as its audit log tells them."""
    found: dict[str, Any] = {}
    for path in settings.audit.directory.glob(f"{service}-*.jsonl"):
        for line in path.read_text().splitlines():
            told = json.loads(line).get("unmapped", {})
            found |= {k: told[k] for k in ("origin", "address") if k in told}
    if found.keys() != {"origin", "address"}:
        raise LoadError(f"{settings.audit.directory} tells of no replica of {service}")
    return int(found["origin"]["pid"]), str(found["address"])


def _channel(
    address: str, name: str, svid: Svid, roots: Sequence[bytes]
) -> grpc.Channel:
    """Return a stock gRPC client's channel."""
    trusted = "".join(map(ssl.DER_cert_to_PEM_cert, roots)).encode()
    credentials = grpc.ssl_channel_credentials(
        trusted, svid.key_pem(), svid.chain_pem()
    )
    options = (("grpc.ssl_target_name_override", name),)
    return grpc.secure_channel(address, credentials, options)


def _write(folder: Path, svid: Svid) -> tuple[str, str]:
    """Write an SVID as PEM files that only this user can read; return their paths."""
    folder.mkdir(mode=0o700)
    paths = []
    for name, pem in (("svid.pem", svid.chain_pem()), ("key.pem", svid.key_pem())):
        path = folder / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(pem)
        paths.append(str(path))
    return paths[0], paths[1]
