"""Methods whose operation each call's metadata name; unary calls of any service."""

import threading

import pytest

from tests.unit.transport.support import CLI, DOMAIN
from ztserve.errors import InvalidInput, Overloaded
from ztserve.transport import Client, Limits, Method, Server
from ztserve.types import Operation

PATH = "/test.v1.Shelf/Look"
SHELF = f"spiffe://{DOMAIN}/ns/ztserve/sa/shelf"


def about(headers):
    if "shelf" not in headers:
        raise InvalidInput("name a shelf")
    return Operation("GET", frozenset({PATH, f"/shelves/{headers['shelf']}"}), "shelf")


class Shelf:
    """Answers what it was asked, twice, and keeps the calls."""

    def __init__(self):
        self.calls, self.refusals = [], []
        self.go = threading.Event()
        self.go.set()

    def answer(self, call, read):
        self.calls.append(call)
        message = read()
        self.go.wait(5)
        return message * 2


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture
def client(authority, shelf):
    static = Operation("GET", frozenset({PATH}), PATH)
    server = Server(
        [Method(PATH, static, answer=shelf.answer, named=about)],
        source=authority.source(SHELF),
        limits=Limits(max_in_flight=1, max_in_flight_per_principal=1),
        on_refused=shelf.refusals.append,
    )
    host, port = server.start("127.0.0.1")
    source = authority.source(CLI)
    with Client(f"{host}:{port}", source=source, server_id=SHELF) as one:
        yield one
    server.stop(0)


def test_the_operation_bears_the_names_that_the_metadata_give(client, shelf):
    assert client.call(PATH, b"ab", metadata=(("shelf", "7"),)) == b"abab"
    (call,) = shelf.calls
    assert call.operation.names == {PATH, "/shelves/7"}


def test_a_call_that_cannot_be_named_is_refused_before_it_is_read(client, shelf):
    with pytest.raises(InvalidInput, match="name a shelf"):
        client.call(PATH, b"ab")
    assert shelf.calls == []
    (told,) = shelf.refusals
    assert (told.path, told.peer.id, str(told.error)) == (PATH, CLI, "name a shelf")


def test_an_answer_is_as_large_as_its_caller_takes(client):
    more = {"metadata": (("shelf", "7"),)}
    assert client.call(PATH, b"x" * 500, max_bytes=1000, **more) == b"x" * 1000
    with pytest.raises(InvalidInput, match="larger than this client takes"):
        client.call(PATH, b"x" * 501, max_bytes=1000, **more)


@pytest.mark.slow
def test_such_a_call_is_no_sign_of_life_for_which_places_are_kept(client, shelf):
    shelf.go.clear()
    more = {"metadata": (("shelf", "7"),), "timeout_s": 5}
    first = threading.Thread(target=client.call, args=(PATH, b"ab"), kwargs=more)
    first.start()
    while not shelf.calls:
        first.join(0.01)
    with pytest.raises(Overloaded):
        client.call(PATH, b"ab", **more)
    shelf.go.set()
    first.join()
