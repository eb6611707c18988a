"""A caller from outside, with nothing of ztserve's but the identity.

It speaks HTTPS with a client certificate, and the Open Inference Protocol's JSON.
"""

import json
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from http.client import HTTPSConnection
from typing import Any

import numpy as np

from ztserve.identity import Identity, dns_name

TIMEOUT_S = 30.0
_KINDS = {"float32": "FP32", "uint8": "UINT8", "int64": "INT64"}


class Refused(Exception):
    """What the gateway answered instead: status and its public sentence."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {body.get('error')}")
        self.status = status


class GatewayClient:
    """One connection to a gateway whose SPIFFE ID is known."""

    def __init__(self, address: str, who: Identity, gateway_id: str) -> None:
        host, _, port = address.rpartition(":")
        context = ssl_context(who)
        # The gateway's certificate carries a DNS name that is derived from its ID.
        self._connection = _Named(
            host, int(port), dns_name(gateway_id), context=context, timeout=TIMEOUT_S
        )

    def predict(self, model: str, **inputs: Any) -> dict[str, Any]:
        """Return the answer by output name; raise Refused."""
        response = self._post("/v1/predict", model, inputs)
        answer = json.loads(response.read())
        if response.status != 200:
            raise Refused(response.status, answer)
        return {
            o["name"]: np.reshape(o["data"], o["shape"])
            if o["datatype"] != "BYTES"
            else o["data"][0]
            for o in answer["outputs"]
        }

    def stream(self, model: str, **inputs: Any) -> Iterator[str]:
        """Yield the pieces of a text as they come; raise Refused."""
        response = self._post("/v1/stream", model, inputs)
        if response.status != 200:
            raise Refused(response.status, json.loads(response.read()))
        for line in response:
            if line.startswith(b"data:"):
                for output in json.loads(line[5:]).get("outputs", ()):
                    yield from output["data"]

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _post(self, path: str, model: str, inputs: Mapping[str, Any]) -> Any:
        body = {"model_name": model, "inputs": [_tensor(*i) for i in inputs.items()]}
        headers = {"content-type": "application/json"}
        self._connection.request("POST", path, json.dumps(body), headers)
        return self._connection.getresponse()


class _Named(HTTPSConnection):
    """A connection to an address whose certificate bears another name."""

    def __init__(self, host: str, port: int, name: str, **options: Any) -> None:
        super().__init__(host, port, **options)
        self._name = name
        self._tls: ssl.SSLContext = options["context"]

    def connect(self) -> None:
        self.sock = self._create_connection(  # type: ignore[attr-defined]
            (self.host, self.port), self.timeout
        )
        # A request is two writes; the second must not wait for an answer to the first.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._name)


def ssl_context(who: Identity) -> ssl.SSLContext:
    """Return a TLS 1.3 context for `who`; its key is never in a file system."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for root in who.bundles[who.svid.id.trust_domain]:
        context.load_verify_locations(cadata=root)
    memory = os.memfd_create("svid")
    try:
        os.write(memory, who.svid.chain_pem() + who.svid.key_pem())
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    return context


def _tensor(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": name, "datatype": "BYTES", "shape": [1], "data": [value]}
    return {
        "name": name,
        "datatype": _KINDS[value.dtype.name],
        "shape": list(value.shape),
        "data": value.ravel().tolist(),
    }
