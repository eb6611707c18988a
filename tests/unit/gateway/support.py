"""A real gateway before a real deployment, and real HTTPS clients."""

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ztserve import errors
from ztserve.audit import Log
from ztserve.authorization import PolicySet
from ztserve.gateway import Gateway, Limits
from ztserve.identity import Quarantine, Svid, dns_name
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import AsyncClient, Server, inference_methods
from ztserve.types import Call, Description, Receive, Reply, Tensor, TensorSpec

DOMAIN = "dev.ztserve.internal"
GATEWAY = f"spiffe://{DOMAIN}/ns/ml-api/sa/api-gateway"
CLI = f"spiffe://{DOMAIN}/ns/dev/sa/cli"
SHOP = f"spiffe://{DOMAIN}/ns/web/sa/shop"
SPEC = TensorSpec("x", "FP32", (-1, 4))
LIMITS = Limits()
JSON = {"content-type": "application/json"}

POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: edge, namespace: ml-api}
spec:
  rules:
  - from: [{source: {principals: [cluster.local/ns/dev/sa/cli]}}]
    to:
    - operation: {methods: [POST], paths: ["/v1/*", "/v2/models/*"]}
    - operation: {methods: [GET], paths: ["/v2*"]}
"""


@dataclass
class Doubler:
    """A service that doubles FP32 input `x`, and does as a text input says.

    ``raise NAME`` raises that error, ``wait`` blocks until `go` or until cancelled,
    ``fail``, ``endless`` and ``flood`` are streams that do so.
    """

    model: str = "digits"
    calls: list[Call] = field(default_factory=list)
    outcomes: list[object] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    running: threading.Event = field(default_factory=threading.Event)

    def infer(self, call: Call, receive: Receive) -> Reply:
        self.calls.append(call)
        return self._answer(call, receive)

    def stream(self, call: Call, receive: Receive) -> Iterator[Reply]:
        self.calls.append(call)
        try:
            reply = self._answer(call, receive, piecewise=True)
            for _ in range(3):
                yield reply
            if reply.outputs[0].name == "fail":
                raise errors.Withheld("no more of this", "the secret reason")
            while reply.outputs[0].name == "endless" and not call.cancelled():
                yield reply
                time.sleep(0.01)
            while reply.outputs[0].name == "flood" and not call.cancelled():
                yield Reply((Tensor("flood", "BYTES", (1,), (b"x" * 65536,)),))
        except BaseException as error:
            self.outcomes.append(error)
            raise
        self.outcomes.append("released")

    def describe(self, call: Call) -> Description:
        self.calls.append(call)
        return Description(self.model, "3", "sha256:" + "a" * 64, (SPEC,), ())

    def _answer(
        self, call: Call, receive: Receive, *, piecewise: bool = False
    ) -> Reply:
        request = receive()
        (one,) = request.inputs
        if one.datatype == "BYTES":
            word = bytes(one.data[0]).decode()
            if word.startswith("raise "):
                kind = getattr(errors, word.split()[1])
                known = issubclass(kind, errors.CallError)
                raise kind(*(("told", "secret") if known else ("secret",)))
            if word == "wait":
                self.running.set()
                while not call.cancelled() and not self.go.wait(0.02):
                    pass
            if piecewise:
                return Reply((Tensor(word, "BYTES", (1,), (b"piece",)),))
            return Reply((Tensor("text", "BYTES", (1,), (word[::-1].encode(),)),))
        doubled = np.frombuffer(one.data, "<f4") * 2
        return Reply((Tensor("y", "FP32", one.shape, doubled.tobytes()),))


@dataclass
class Running:
    """A running gateway."""

    port: int
    gateway: Gateway
    services: dict[str, Doubler]
    authority: ThrowAwayAuthority
    log: Path
    folder: Path

    @property
    def service(self) -> Doubler:
        return next(iter(self.services.values()))

    def context(self, svid: Svid | None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for root in self.authority.bundle:
            context.load_verify_locations(cadata=root)
        if svid is not None:
            pem = self.folder / f"{svid.serial}.pem"
            pem.write_bytes(svid.chain_pem() + svid.key_pem())
            context.load_cert_chain(pem)
        return context

    def socket(self, svid: Svid | None = None, *, anonymous: bool = False):
        """A TLS connection, as CLI unless told otherwise."""
        if svid is None and not anonymous:
            svid = self.authority.issue(CLI)
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            return self.context(svid).wrap_socket(
                plain, server_hostname=dns_name(GATEWAY)
            )
        except BaseException:
            plain.close()
            raise

    @contextmanager
    def https(self, svid: Svid | None = None, *, anonymous: bool = False):
        """An `http.client` connection."""
        connection = http.client.HTTPConnection("gateway", timeout=5)
        connection.sock = self.socket(svid, anonymous=anonymous)
        try:
            yield connection
        finally:
            connection.close()

    def ask(self, method: str, path: str, body=None, *, headers=JSON, svid=None, **how):
        """One request on a connection of its own: status, headers, parsed body."""
        with self.https(svid, **how) as connection:
            return asked(connection, method, path, body, headers)

    def raw(self, data: bytes, svid: Svid | None = None, **how) -> bytes:
        """Everything that comes back for these very bytes, until the end."""
        with self.socket(svid, **how) as tls:
            tls.sendall(data)
            answer = b""
            try:
                while piece := tls.recv(65536):
                    answer += piece
            except (TimeoutError, ConnectionError, ssl.SSLError):
                return answer + b"<broken>"
            return answer

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()[1:]]

    def counted(self, wait_s: float = 3.0) -> dict[str, int]:
        """Causes and counts of what ended before there was a call, once written."""
        ends = time.monotonic() + wait_s
        found: dict[str, int] = {}
        while not found and time.monotonic() < ends:
            time.sleep(0.05)
            for record in self.records():
                if record.get("status_code") == "handshake":
                    cause = record["status_detail"]
                    found[cause] = found.get(cause, 0) + record["count"]
        return found


def asked(connection, method: str, path: str, body=None, headers=JSON):
    if isinstance(body, (dict, list)):
        body = json.dumps(body).encode()
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    text = response.read()
    kind = response.headers["content-type"]
    parsed = json.loads(text) if kind == "application/json" else text
    return response.status, response.headers, parsed


def tensor(name="x", rows=1, **fields) -> dict:
    """A body with one FP32 tensor."""
    one = {"name": name, "datatype": "FP32", "shape": [rows, 4], "data": [1] * 4 * rows}
    return {"inputs": [{**one, **fields}]}


def text(word: str, **fields) -> dict:
    """A body with one text."""
    one = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [word]}
    return {"inputs": [one], **fields}


@contextmanager
def running(
    authority: ThrowAwayAuthority,
    folder: Path,
    *,
    policy: str = POLICY,
    limits: Limits = LIMITS,
    source=None,
    models: tuple[str, ...] = ("digits",),
    federated: tuple[str, ...] = (),
    grace_s: float = 0.5,
    quarantine: Quarantine | None = None,
) -> Iterator[Running]:
    own = source or authority.source(GATEWAY)
    with ExitStack() as stack:
        services, deployments = {}, {}
        for model in models:
            name = f"{model}-service"
            server_id = f"spiffe://{DOMAIN}/ns/ml-inference/sa/{name}"
            service = services[name] = Doubler(model)
            server = Server(
                inference_methods(service, model, "3"),
                source=authority.source(server_id),
                delegates=[GATEWAY],
            )
            host, port = server.start("127.0.0.1")
            stack.callback(server.stop, 0.2)
            stack.callback(service.go.set)
            deployments[name] = AsyncClient(
                f"{host}:{port}",
                source=authority.source(GATEWAY),
                server_id=server_id,
                model=model,
            )
        policies = PolicySet.parse(
            policy,
            trust_domain=DOMAIN,
            namespace="ml-api",
            labels={"app": "api-gateway"},
            federated=federated,
        )
        path = folder / "audit" / "gateway.jsonl"
        log = stack.enter_context(Log(path, origin={"service": "api-gateway"}))
        gateway = Gateway(
            source=own,
            policies=policies,
            deployments=deployments,
            log=log,
            address=("127.0.0.1", 0),
            limits=limits,
            quarantine=quarantine,
        )
        _, port = gateway.start()
        stack.callback(gateway.stop, grace_s)
        yield Running(port, gateway, services, authority, path, folder)
