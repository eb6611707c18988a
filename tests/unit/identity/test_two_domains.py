"""Two trust domains on one machine: authorities, agents, endpoints, calls."""

import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.unit.identity.federated import saved, until
from tests.unit.transport.support import Echo, serving
from ztserve import types
from ztserve.authorization import PolicySet
from ztserve.errors import CallError, Denied, IdentityError
from ztserve.identity import Agent, Authority, Rules, WorkloadSource, verify_peer
from ztserve.identity.federation.bundles import Federation
from ztserve.identity.federation.endpoint import BundleEndpoint, renewing
from ztserve.identity.federation.relationship import read_relationships
from ztserve.transport import Client

pytestmark = pytest.mark.slow

INPUT = {"x": np.ones((1, 4), "f4")}
POLL_S = 0.1


@dataclass
class Domain:
    """All that one trust domain runs."""

    name: str
    other: str
    directory: Path
    stack: ExitStack
    authority: Authority = None
    endpoint: BundleEndpoint = None
    federation: Federation = None
    table: dict = field(default_factory=dict)

    def open(self) -> None:
        self.authority = Authority(self.name, refresh_hint_s=1, overlap_s=4 * POLL_S)
        self.stack.enter_context(self.authority)
        door = f"spiffe://{self.name}/ns/ztserve/sa/bundle"
        self.endpoint = BundleEndpoint(
            self.authority.trust_bundle, renewing(self.authority, door)
        )
        host, port = self.endpoint.start()
        self.stack.callback(self.endpoint.close)
        self.table = {
            "trust_domain": self.name,
            "profile": "https_spiffe",
            "url": f"https://{host}:{port}/",
            "spiffe_id": door,
            "bootstrap": saved(self.directory, self.authority.trust_bundle()).name,
        }

    def federate(self, other: "Domain") -> None:
        self.federation = Federation(
            read_relationships([other.table], self.directory),
            trust_domain=self.name,
            bounds_s=(POLL_S, POLL_S),
        )
        self.stack.callback(self.federation.close)

    def source(self, service: str) -> WorkloadSource:
        """The identity of a workload, from an agent of its own."""
        # Not under the test's own directory: a socket's path is short.
        made = tempfile.TemporaryDirectory(prefix="zt-")
        directory = Path(self.stack.enter_context(made))
        who = f"spiffe://{self.name}/ns/ml/sa/{service}"
        agent = Agent(
            self.authority,
            directory,
            Rules(trust_domain=self.name, default_id=who),
            federation=self.federation,
        )
        self.stack.enter_context(agent)
        return self.stack.enter_context(WorkloadSource(agent.socket, timeout_s=10))

    def serve(self):
        """An echo that takes predictions from the other domain's reader alone."""
        policy = PolicySet.parse(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
            "metadata: {name: readers, namespace: ml}\n"
            "spec:\n  rules:\n"
            f"  - from: [{{source: {{principals: [{self.other}/ns/ml/sa/reader]}}}}]\n"
            "    to: [{operation: {paths: [/v1/predict, /v1/stream]}}]\n",
            trust_domain=self.name,
            namespace="ml",
            federated=(self.other,),
        )
        service = Policed(policy, pieces=1000, pause_s=0.02)
        served = self.stack.enter_context(
            serving(None, service, source=self.source("echo"))
        )
        return served.address

    def client(self, service: str, address: str) -> Client:
        """A client of the other domain's echo."""
        server = f"spiffe://{self.other}/ns/ml/sa/echo"
        client = Client(address, source=self.source(service), server_id=server)
        return self.stack.enter_context(client)


class Policed(Echo):
    def __init__(self, policy, **more) -> None:
        super().__init__(**more)
        self.policy = policy

    def _judge(self, call):
        self.calls.append(call)
        self.policy.authorize(call)


@contextmanager
def domains(directory):
    with ExitStack() as stack:
        a = Domain("a.example", "b.example", directory, stack)
        b = Domain("b.example", "a.example", directory, stack)
        a.open()
        b.open()
        a.federate(b)
        b.federate(a)
        yield a, b


@pytest.fixture
def pair(private):
    with domains(private) as both:
        yield both


def refused(client) -> type[Exception] | None:
    try:
        client.infer(INPUT, timeout_s=2)
    except (CallError, IdentityError) as error:
        return type(error)
    return None


def test_two_domains_serve_each_other_exactly_what_policy_allows(pair):
    for ours, theirs in (pair, pair[::-1]):
        address = ours.serve()
        reader = theirs.client("reader", address)
        assert np.array_equal(reader.infer(INPUT)["x"], INPUT["x"])
        with pytest.raises(Denied):  # the same peer, another operation
            reader.metadata()
        with pytest.raises(Denied):  # another member of the foreign domain
            theirs.client("writer", address).infer(INPUT)
        # A member of our own domain of the same name: the rule names the foreign one.
        near = ours.source("reader2")
        name = f"spiffe://{ours.name}/ns/ml/sa/echo"
        with Client(address, source=near, server_id=name) as one, pytest.raises(Denied):
            one.infer(INPUT)


def test_a_dropped_bundle_takes_effect_within_a_second(pair):
    a, b = pair
    reader = b.client("reader", a.serve())
    assert refused(reader) is None
    pieces, ended = [], threading.Event()

    def listen():
        try:
            for _ in reader.stream(INPUT):
                pieces.append(time.monotonic())
        except (CallError, IdentityError):
            ended.set()

    thread = threading.Thread(target=listen)
    thread.start()
    until(lambda: len(pieces) > 3)
    dropped = time.monotonic()
    a.federation.set_relationships([])
    call_s = until(lambda: refused(reader))
    assert ended.wait(3)
    stream_s = max(pieces) - dropped
    thread.join()
    print(f"\nafter the drop: refused call {call_s:.3f} s, last piece {stream_s:.3f} s")
    assert call_s < 1
    assert stream_s < 1
    # And whom we cannot verify we do not call.
    with pytest.raises(IdentityError, match="no trust bundle of b"):
        a.client("reader", "127.0.0.1:1")
    a.federation.set_relationships(read_relationships([b.table], a.directory))
    assert until(lambda: refused(reader) is None) < 5


def test_a_root_rolls_over_and_the_other_domain_notices_nothing(pair):
    a, b = pair
    address = a.serve()
    reader = b.client("reader", address)
    assert refused(reader) is None
    old = b.authority.bundle[0]
    b.authority.roll()
    failures, calls, end = [], 0, time.monotonic() + 3
    while time.monotonic() < end:
        calls += 1
        failure = refused(reader)
        failures += [failure] * bool(failure)
    assert not failures
    assert calls > 50
    print(f"\n{calls} calls, none failed")
    assert b.authority.bundle[0] != old
    assert set(b.authority.bundle) == set(
        a.federation.bundles()["b.example"].x509_authorities
    )
    # A reader whose SVID the new root signed is served as well.
    fresh = b.client("reader", address)
    chain = fresh._route.source.current().svid.chain_der
    new = {"b.example": b.authority.bundle[:1]}
    assert verify_peer(chain, new, now=types.now())
    assert refused(fresh) is None
