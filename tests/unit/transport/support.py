"""Real servers and raw clients for the tests of transport."""

import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np

from ztserve import errors
from ztserve.identity import Identity, Svid, dns_name
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Limits, Refusal, Server, inference_methods
from ztserve.transport import values as wire
from ztserve.types import Call, Description, Receive, Reply, Tensor, TensorSpec

DOMAIN = "dev.ztserve.internal"
SERVER = f"spiffe://{DOMAIN}/ns/ml-inference/sa/echo"
GATEWAY = f"spiffe://{DOMAIN}/ns/ml-api/sa/api-gateway"
CLI = f"spiffe://{DOMAIN}/ns/dev/sa/cli"
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


SPEC = TensorSpec("x", "FP32", (-1, 4))
LIMITS = Limits()


@dataclass
class Echo:
    """A service that answers with its inputs, and does as a text input says.

    ``raise NAME`` raises that error, ``wait`` blocks until `go` is set, ``deny`` is
    judged by `denied` before the body is read.
    """

    pieces: int = 3
    pause_s: float = 0.0
    denied: frozenset[str] = frozenset()
    calls: list[Call] = field(default_factory=list)
    outcomes: list[object] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    running: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    spec: TensorSpec = SPEC

    def infer(self, call: Call, receive: Receive) -> Reply:
        try:
            reply = self._answer(call, receive)
        except Exception as error:
            self.outcomes.append(error)
            raise
        self.outcomes.append("released")
        return reply

    def stream(self, call: Call, receive: Receive) -> Iterator[Reply]:
        try:
            reply = self._answer(call, receive)
            for _ in range(self.pieces):
                time.sleep(self.pause_s)
                yield reply
        except BaseException as error:
            self.outcomes.append(error)
            raise
        self.outcomes.append("released")

    def describe(self, call: Call) -> Description:
        self._judge(call)
        return Description(
            "echo", "3", "sha256:" + "a" * 64, (self.spec,), (self.spec,)
        )

    def _judge(self, call: Call) -> None:
        self.calls.append(call)
        if call.peer.id in self.denied:
            raise errors.Denied("not allowed", "no rule allows it")

    def _answer(self, call: Call, receive: Receive) -> Reply:
        self._judge(call)
        request = receive()
        for one in request.inputs:
            if one.datatype == "BYTES":
                self._obey(bytes(one.data[0]).decode(), call)
        return Reply(
            tuple(Tensor(t.name, t.datatype, t.shape, t.data) for t in request.inputs)
        )

    def _obey(self, text: str, call: Call) -> None:
        if text.startswith("raise "):
            kind = getattr(errors, text.split()[1], None) or getattr(
                __builtins__, text.split()[1], RuntimeError
            )
            if issubclass(kind, errors.CallError):
                raise kind("the public sentence", "the secret reason")
            raise kind("the secret reason")
        if text == "wait":
            self.running.release()
            while not call.cancelled() and not self.go.wait(0.02):
                pass


@dataclass
class Served:
    """A running server."""

    server: Server
    service: Echo
    authority: ThrowAwayAuthority
    host: str
    port: int
    refusals: list[Refusal]

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def channel(
        self, svid: Svid | None = None, *, server: str = SERVER, **options: int
    ) -> grpc.Channel:
        """A stock gRPC channel, as any client would make it."""
        return channel(
            self.port,
            svid or self.authority.issue(CLI),
            self.authority,
            server,
            **options,
        )


def channel(
    port: int,
    svid: Svid,
    authority: ThrowAwayAuthority,
    server: str = SERVER,
    **options: int,
) -> grpc.Channel:
    given = [(name.replace("__", "."), value) for name, value in options.items()]
    return grpc.secure_channel(
        f"127.0.0.1:{port}",
        grpc.ssl_channel_credentials(
            pem(authority.bundle), svid.key_pem(), svid.chain_pem()
        ),
        options=[("grpc.ssl_target_name_override", dns_name(server)), *given],
    )


@contextmanager
def serving(
    authority: ThrowAwayAuthority,
    service: Echo | None = None,
    *,
    source=None,
    limits: Limits = LIMITS,
    delegates=(),
    stop_s: float = 0.2,
    **more,
) -> Iterator[Served]:
    service = service or Echo()
    refusals: list[Refusal] = []
    server = Server(
        inference_methods(service, "echo", "3"),
        source=source or authority.source(SERVER),
        limits=limits,
        delegates=delegates,
        **{"on_refused": refusals.append, **more},
    )
    host, port = server.start("127.0.0.1")
    try:
        yield Served(server, service, authority, host, port, refusals)
    finally:
        service.go.set()
        server.stop(stop_s)


class MovingSource:
    """A source whose identity the test changes."""

    def __init__(self, identity: Identity) -> None:
        self._identity: Identity | None = identity
        self._callbacks: list[Callable[[], None]] = []

    def current(self) -> Identity:
        if self._identity is None:
            raise errors.IdentityError("withdrawn by the test")
        return self._identity

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def move(self, identity: Identity | None) -> None:
        self._identity = identity
        for callback in tuple(self._callbacks):
            callback()


def pem(roots) -> bytes:
    return "".join(ssl.DER_cert_to_PEM_cert(root) for root in roots).encode()


def message(model: str = "echo", **inputs) -> bytes:
    """A ModelInferRequest."""
    inputs = inputs or {"x": np.zeros((1, 4), "f4")}
    return wire.message(wire.request(inputs, model=model, id="own"))


def refused(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, str]:
    """Status, sentence and error name that a stock client sees."""
    known = dict(error.trailing_metadata() or ())
    return error.code(), error.details(), known.get("zt-error", "")


def until(fact, seconds=5.0):
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def connected(served, svid=None, *, anonymous=False, most=None):
    """A TLS connection of Python's own, with a client's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if most is not None:
        context.maximum_version = most
    if not anonymous:
        svid = svid or served.authority.issue(CLI)
        with tempfile.NamedTemporaryFile() as file:
            file.write(svid.chain_pem() + svid.key_pem())
            file.flush()
            context.load_cert_chain(file.name)
    raw = socket.create_connection((served.host, served.port), timeout=5)
    return context.wrap_socket(raw)


def closes(connection, seconds=3.0):
    """Whether the other end closes, within a time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True
