import subprocess
import sys
import threading
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from ztserve.identity import Agent, Rules
from ztserve.identity import workload_api as wire
from ztserve.testing import ThrowAwayAuthority


@pytest.fixture(scope="session")
def authority():
    return ThrowAwayAuthority("td.example")


@pytest.fixture
def private(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def agent(authority, private):
    rules = Rules(
        trust_domain="td.example", default_id="spiffe://td.example/ns/dev/sa/cli"
    )
    with Agent(authority, private, rules) as running:
        yield running


@pytest.fixture
def child():
    """A process of ours that waits until its stdin is closed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as process:
        yield process
        process.stdin.close()


class ScriptedAgent:
    """A Workload API that sends what a test puts into `responses`, then waits."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "scripted.sock"
        self.socket = f"unix://{self.path}"
        self.responses: list[wire.X509SVIDResponse | grpc.StatusCode] = []
        self.calls = 0
        self.changed = threading.Condition()
        self.server: grpc.Server | None = None

    def send(self, *items) -> None:
        with self.changed:
            self.responses.extend(items)
            self.changed.notify_all()

    def start(self) -> None:
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        method = grpc.unary_stream_rpc_method_handler(
            self._stream,
            wire.X509SVIDRequest.FromString,
            wire.X509SVIDResponse.SerializeToString,
        )
        self.server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    wire.SERVICE, {wire.FETCH_SVID: method}
                ),
            )
        )
        self.server.add_insecure_port(self.socket)
        self.server.start()

    def _stream(self, _, context):
        self.calls += 1
        while context.is_active():
            with self.changed:
                if not self.responses:
                    self.changed.wait(0.05)
                    continue
                item = self.responses.pop(0)
            if isinstance(item, grpc.StatusCode):
                context.abort(item, "as scripted")
            yield item

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop(0).wait()
            self.server = None


@pytest.fixture
def scripted(private):
    made = ScriptedAgent(private)
    made.start()
    yield made
    made.stop()


def response(svid, bundle, *, spiffe_id=None, key=None, federated=None):
    """The Workload API's message with one SVID."""
    return wire.X509SVIDResponse(
        svids=[
            wire.X509SVID(
                spiffe_id=spiffe_id or svid.id,
                x509_svid=b"".join(svid.chain_der),
                x509_svid_key=key or svid.key_der(),
                bundle=b"".join(bundle),
            )
        ],
        federated_bundles=federated or {},
    )


@pytest.fixture(name="response")
def response_maker():
    return response
