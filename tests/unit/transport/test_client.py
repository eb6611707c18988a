import threading
import time

import numpy as np
import pytest

from tests.unit.transport.support import (
    CLI,
    GATEWAY,
    SERVER,
    Echo,
    MovingSource,
    Served,
    serving,
)
from ztserve import errors, types
from ztserve.identity import FixedSource, Identity
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import Client, Limits
from ztserve.types import Caller


def test_tensors_and_texts_go_and_come(client: Client) -> None:
    array = np.arange(8, dtype="f4").reshape(2, 4)
    answer = client.infer({"x": array, "t": "grüße"})
    assert answer["x"].tolist() == array.tolist()
    assert answer["x"].dtype == np.dtype("f4")
    assert answer["t"] == "grüße"


def test_a_list_takes_the_datatype_that_the_model_declares(served, client) -> None:
    assert client.infer({"x": [[1, 2, 3, 4]]})["x"].dtype == np.dtype("f4")
    client.infer({"x": [[1, 2, 3, 4]]})
    titles = [call.operation.title for call in served.service.calls]
    assert titles == ["/v2/models/echo", "/v1/predict", "/v1/predict"]


def test_a_caller_that_may_not_ask_sends_lists_as_they_look(served, client) -> None:
    served.service.describe = lambda call: (_ for _ in ()).throw(errors.Denied("no"))
    assert client.infer({"y": [1]})["y"].dtype == np.dtype("i8")
    assert client.infer({"y": [1]}, datatypes={"y": "UINT8"})["y"].dtype == np.uint8


def test_a_stream_comes_piece_by_piece(client: Client) -> None:
    assert list(client.stream({"t": "hi"})) == [{"t": "hi"}] * 3


def test_a_stream_that_is_left_gives_its_place_free(authority) -> None:
    with serving(authority, Echo(pieces=10**9)) as served:
        with Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client:
            stream = client.stream({"t": "hi"})
            next(stream)
            stream.close()
            until = time.monotonic() + 5
            while served.server.in_flight and time.monotonic() < until:
                time.sleep(0.01)
        assert served.server.in_flight == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "Denied",
        "InvalidInput",
        "NotFound",
        "DeadlineExceeded",
        "Withheld",
        "Interrupted",
        "Unauthenticated",
    ],
)
@pytest.mark.parametrize("how", ["infer", "stream"])
def test_the_servers_error_is_raised_again(served, client, name: str, how: str) -> None:
    with pytest.raises(getattr(errors, name)) as caught:
        list(getattr(client, how)({"t": f"raise {name}"}))
    assert caught.value.public == "the public sentence"
    assert served.service.calls[0].id in str(caught.value)
    assert len(served.service.calls) == 1


@pytest.mark.parametrize("how", ["infer", "stream"])
def test_the_models_failure_is_an_inference_error(served, client, how: str) -> None:
    with pytest.raises(errors.InferenceError, match=r"the model failed .*call"):
        list(getattr(client, how)({"t": "raise InferenceError"}))


@pytest.mark.slow
def test_overloaded_is_retried_a_few_times(served: Served, client: Client) -> None:
    with pytest.raises(errors.Overloaded):
        client.infer({"t": "raise Overloaded"})
    assert len(served.service.calls) == 4


@pytest.mark.slow
def test_a_timeout_is_deadline_exceeded(served: Served, client: Client) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        client.infer({"t": "wait"}, timeout_s=0.3)


def test_a_connection_that_breaks_midway_is_interrupted_and_not_retried(
    authority,
) -> None:
    with (
        serving(authority) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
    ):
        failed: list[Exception] = []

        def ask() -> None:
            try:
                client.infer({"t": "wait"})
            except errors.ZTServeError as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert served.service.running.acquire(timeout=5)
        served.server.stop(0)
        thread.join(timeout=5)
    assert [type(error) for error in failed] == [errors.Interrupted]
    assert len(served.service.calls) == 1


@pytest.mark.slow
def test_nothing_there_is_unavailable_with_its_cause(authority) -> None:
    with (
        Client("127.0.0.1:1", source=authority.source(CLI), server_id=SERVER) as client,
        pytest.raises(errors.Unavailable, match="nothing listens there"),
    ):
        client.infer({"t": "hi"})


@pytest.mark.slow
def test_a_server_that_refuses_us_names_the_likely_cause(authority) -> None:
    stranger = ThrowAwayAuthority(authority.trust_domain)
    source = FixedSource(Identity(stranger.issue(CLI), authority.bundles))
    with (
        serving(authority) as served,
        Client(served.address, source=source, server_id=SERVER) as client,
        pytest.raises(errors.Unavailable, match="does not trust this client"),
    ):
        client.infer({"t": "hi"})


def test_without_the_servers_bundle_there_is_no_client(authority) -> None:
    with pytest.raises(
        errors.IdentityError, match=r"no trust bundle of other\.example"
    ):
        Client(
            "127.0.0.1:1",
            source=authority.source(CLI),
            server_id="spiffe://other.example/ns/a/sa/b",
        )


def test_the_caller_travels_to_a_server_that_takes_our_word(authority) -> None:
    with (
        serving(authority, delegates=[GATEWAY]) as served,
        Client(
            served.address, source=authority.source(GATEWAY), server_id=SERVER
        ) as client,
    ):
        client.infer({"t": "hi"}, caller=Caller("iss", "ada"))
        list(client.stream({"t": "hi"}, caller=Caller("iss", "bob")))
    assert [c.caller.subject for c in served.service.calls] == ["ada", "bob"]


def until_it_fails(client: Client) -> None:
    until = time.monotonic() + 5
    while time.monotonic() < until:
        client.infer({"t": "hi"})


@pytest.mark.slow
def test_a_client_whose_identity_ended_makes_no_call(authority, served) -> None:
    source = MovingSource(Identity(authority.issue(CLI), authority.bundles))
    with Client(served.address, source=source, server_id=SERVER) as client:
        client.infer({"t": "hi"})
        source.move(None)
        with pytest.raises(errors.IdentityError, match="withdrawn by the test"):
            until_it_fails(client)
        source.move(Identity(authority.issue(CLI), authority.bundles))
        time.sleep(0.3)
        client.infer({"t": "hi"})


@pytest.mark.slow
def test_an_expired_identity_makes_no_call(authority, served) -> None:
    svid = authority.issue(CLI, ttl_s=1)
    source = MovingSource(Identity(svid, authority.bundles))
    with Client(served.address, source=source, server_id=SERVER) as client:
        client.infer({"t": "hi"})
        while types.now() <= svid.not_after:
            time.sleep(0.05)
        with pytest.raises(errors.IdentityError, match="no call without an identity"):
            client.infer({"t": "hi"})


def test_a_closed_client_makes_no_call(client: Client) -> None:
    client.close()
    client.close()
    with pytest.raises(errors.Unavailable, match="closed"):
        client.infer({"t": "hi"})


def test_a_reply_beyond_the_clients_limit_is_refused(authority, monkeypatch) -> None:
    monkeypatch.setattr("ztserve.transport.protocol.MAX_MESSAGE_BYTES", 1000)
    with (
        serving(authority, Echo(spec=Echo().spec), limits=Limits()) as served,
        Client(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client,
        pytest.raises(errors.InvalidInput, match="larger than"),
    ):
        client.infer({"x": np.zeros(1000, "f4")})


def test_an_example_fits_the_model(client: Client) -> None:
    example = client.example()
    assert client.infer(example)["x"].tolist() == [[0, 0, 0, 0]]


class Rotating:
    """Both sides' sources, and calls that run all the while."""

    def __init__(self, served: Served, client: Client) -> None:
        self.done = threading.Event()
        self.failed: list[Exception] = []
        self.count = 0
        self._client = client
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def __enter__(self) -> "Rotating":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def _ask(self) -> None:
        while not self.done.is_set():
            try:
                self._client.infer({"t": "hi"})
                self.count += 1
            except Exception as error:
                self.failed.append(error)


@pytest.mark.slow
def test_rotation_and_a_new_authority_cost_no_call() -> None:
    old = ThrowAwayAuthority("dev.ztserve.internal")
    new = ThrowAwayAuthority("dev.ztserve.internal")
    only_old, only_new = old.bundles, new.bundles
    both = {"dev.ztserve.internal": old.bundle + new.bundle}
    server = MovingSource(Identity(old.issue(SERVER), only_old))
    ours = MovingSource(Identity(old.issue(CLI), only_old))
    steps = [
        (old, only_old, old, only_old),
        (old, both, old, both),
        (new, both, old, both),
        (new, both, new, both),
        (new, only_new, new, only_new),
        (new, only_new, new, only_new),
    ]
    with (
        serving(old, source=server) as served,
        Client(served.address, source=ours, server_id=SERVER) as client,
        Rotating(served, client) as load,
    ):
        for theirs, their_bundles, mine, my_bundles in steps:
            server.move(Identity(theirs.issue(SERVER), their_bundles))
            ours.move(Identity(mine.issue(CLI), my_bundles))
            time.sleep(0.7)
    assert load.failed == []
    assert load.count > 50
    serials = {call.peer.serial for call in served.service.calls}
    assert len(serials) == 7


@pytest.mark.slow
def test_a_root_that_was_withdrawn_ends_the_connections_it_vouched_for() -> None:
    old = ThrowAwayAuthority("dev.ztserve.internal")
    new = ThrowAwayAuthority("dev.ztserve.internal")
    both = {"dev.ztserve.internal": old.bundle + new.bundle}
    ours = MovingSource(Identity(new.issue(CLI), both))
    with (
        serving(old, source=FixedSource(Identity(old.issue(SERVER), both))) as served,
        Client(served.address, source=ours, server_id=SERVER) as client,
    ):
        client.infer({"t": "hi"})
        ours.move(Identity(new.issue(CLI), new.bundles))
        with pytest.raises(errors.Unavailable, match="not signed by the trust"):
            until_it_fails(client)
