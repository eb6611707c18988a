import threading
import time

import pytest

from tests.unit.transport.support import CLI, DOMAIN, SERVER, serving
from ztserve.errors import ConfigError, Denied, InvalidInput, Unavailable
from ztserve.transport import Client, Endpoint, Server, directory_methods
from ztserve.transport import directory as door

DOOR = f"spiffe://{DOMAIN}/ns/ztserve/sa/directory"
ECHO = "ml-inference/echo"


class Book:
    """A directory whose entries the test changes."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[Endpoint, ...]] = {}
        self.changed = threading.Condition()
        self.denied = False
        self.seen: list[str] = []

    def put(self, *addresses: str) -> None:
        with self.changed:
            self.entries[ECHO] = tuple(Endpoint(a, "echo", "3", "") for a in addresses)
            self.changed.notify_all()

    def watch(self, call, deployment):
        self.seen.append(deployment)
        if self.denied:
            raise Denied("you may not ask where things are")
        last = None
        while not call.cancelled() and time.monotonic() < call.deadline:
            with self.changed:
                now = self.entries.get(deployment, ())
                if now == last:
                    self.changed.wait(0.05)
                    continue
            last = now
            yield now


@pytest.fixture
def book(authority):
    made = Book()
    server = Server(directory_methods(made), source=authority.source(DOOR))
    host, port = server.start("127.0.0.1")
    made.address = f"{host}:{port}"
    yield made
    server.stop(0)


def client(authority, book, target: str = ECHO, **more) -> Client:
    source = authority.source(CLI)
    return Client(target, source=source, directory=book.address, **more)


def test_a_client_finds_the_replicas_and_follows_them(authority, book) -> None:
    with serving(authority) as one, serving(authority) as two:
        book.put(one.address)
        with client(authority, book) as caller:
            assert caller.server_id == SERVER
            assert caller.infer({"t": "hi"}) == {"t": "hi"}
            book.put(two.address)
            until = time.monotonic() + 5
            while not two.service.calls and time.monotonic() < until:
                caller.infer({"t": "hi"})
            assert two.service.calls
            assert book.seen == [ECHO]


@pytest.mark.slow
def test_a_call_waits_for_the_first_replica(authority, book) -> None:
    with serving(authority) as one, client(authority, book) as caller:
        threading.Timer(0.3, book.put, [one.address]).start()
        assert caller.infer({"t": "hi"}) == {"t": "hi"}


@pytest.mark.slow
def test_without_replicas_a_call_is_unavailable(authority, book) -> None:
    with (
        client(authority, book) as caller,
        pytest.raises(Unavailable, match="no replica of ml-inference/echo"),
    ):
        caller.infer({"t": "hi"}, timeout_s=0.3)


@pytest.mark.slow
def test_a_denied_watch_is_told_to_the_caller(authority, book) -> None:
    book.denied = True
    with (
        client(authority, book) as caller,
        pytest.raises(Denied, match="you may not ask"),
    ):
        caller.infer({"t": "hi"}, timeout_s=0.5)


@pytest.mark.slow
def test_a_lying_directory_costs_availability_only(authority, book) -> None:
    other = f"spiffe://{DOMAIN}/ns/ml-inference/sa/other"
    with serving(authority, source=authority.source(other)) as wrong:
        book.put(wrong.address)
        with (
            client(authority, book) as caller,
            pytest.raises(Unavailable, match="not for the expected SPIFFE ID"),
        ):
            caller.infer({"t": "secret"}, timeout_s=1)
        assert wrong.service.calls == []
        assert wrong.refusals == []


@pytest.mark.slow
def test_a_server_that_is_not_the_directory_is_not_believed(authority) -> None:
    with serving(authority) as one:
        book = type("", (), {"address": one.address})
        with (
            client(authority, book) as caller,
            pytest.raises(Unavailable, match=r"SPIFFE ID .*/sa/directory"),
        ):
            caller.infer({"t": "hi"}, timeout_s=0.5)


def test_a_call_is_retried_on_another_replica_if_it_surely_did_not_run(
    authority, book
) -> None:
    with serving(authority) as one:
        book.put("127.0.0.1:1", one.address)
        with client(authority, book) as caller:
            for _ in range(20):
                assert caller.infer({"t": "hi"}) == {"t": "hi"}


@pytest.mark.parametrize(
    "text", ["", "a", "a/b/c", "../b", "A/b", "a/b\n", "a b/c", "/"]
)
def test_a_deployment_is_namespace_and_service(text: str) -> None:
    with pytest.raises(InvalidInput, match="expected namespace/service"):
        door.checked_deployment(text)


@pytest.mark.parametrize("address", ["127.0.0.1:80", "[::1]:80", "example.org:80"])
def test_an_address_is_host_and_port(address: str) -> None:
    assert door.checked_address(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "unix:/tmp/x",
        "xds:///a:1",
        "a",
        "a:0",
        "a:65536",
        "a:1\n",
        "dns://evil/a:1",
        "::1:1",
    ],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(InvalidInput, match=r"expected host:port"):
        door.checked_address(address)


def test_a_directory_that_announces_nonsense_is_refused() -> None:
    from ztserve.transport.v1 import directory_pb2 as pb

    wrong = pb.Deployment(endpoints=[pb.Endpoint(address="unix:/tmp/x")])
    with pytest.raises(InvalidInput, match="expected host:port"):
        door.read_deployment(wrong.SerializeToString())
    many = pb.Deployment(endpoints=[pb.Endpoint(address="a:1")] * 4097)
    with pytest.raises(InvalidInput, match="4097 replicas"):
        door.read_deployment(many.SerializeToString())


@pytest.mark.parametrize(
    ("target", "more", "match"),
    [
        ("127.0.0.1:1", {}, "an address proves nothing"),
        ("ml-inference/echo", {}, "expected host:port"),
        ("nonsense", {"server_id": SERVER}, "expected host:port"),
        ("a/b/c", {"directory": "127.0.0.1:1"}, "expected namespace/service"),
    ],
)
def test_a_client_without_a_way_to_verify_or_find_is_refused(
    authority, target, more, match
) -> None:
    with pytest.raises(ConfigError, match=match):
        Client(target, source=authority.source(CLI), **more)
