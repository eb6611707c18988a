"""Whoever is shut out, or whose SVID is withdrawn, is out within a second."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.unit.transport.support import (
    CLI,
    DOMAIN,
    GATEWAY,
    INFER,
    SERVER,
    STREAM,
    Echo,
    MovingSource,
    channel,
    message,
    refused,
    serving,
)
from ztserve import errors
from ztserve.identity import (
    Agent,
    FixedSource,
    Identity,
    Quarantine,
    Rules,
    WorkloadSource,
)
from ztserve.identity.quarantine import file as quarantine_file
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport import (
    AsyncClient,
    Client,
    Endpoint,
    Server,
    directory_methods,
    inference_methods,
)

Code = grpc.StatusCode
DIRECTORY = f"spiffe://{DOMAIN}/ns/ztserve/sa/directory"
X = {"x": np.zeros((1, 4), "f4")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "quarantine.json"


@pytest.fixture
def quarantine(path):
    with Quarantine.open(path) as following:
        yield following


def shut_out(path: Path, subject: str) -> None:
    quarantine_file.add(path, subject, reason="test", by="me", on_event=lambda *_: None)


def let_in(path: Path, subject: str) -> None:
    quarantine_file.remove(path, subject, by="me", on_event=lambda *_: None)


def soon(fact, seconds: float = 3.0) -> bool:
    end = time.monotonic() + seconds
    while not fact() and time.monotonic() < end:
        time.sleep(0.01)
    return fact()


def fails(call) -> bool:
    try:
        call()
    except (grpc.RpcError, errors.ZTServeError):
        return True
    return False


def endless() -> Echo:
    return Echo(pieces=100_000, pause_s=0.01)


class Streaming:
    """A stream that is read on a thread of its own: when, and how, does it end?"""

    def __init__(self, pieces) -> None:
        self.begun, self._ended = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._pieces = pieces
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.begun.wait(10)

    def _read(self) -> None:
        try:
            for _ in self._pieces:
                self.begun.set()
        except Exception as error:
            self.error = error
        self._ended.set()

    def assert_ends_within(self, seconds: float) -> None:
        assert self._ended.wait(seconds)
        self._thread.join()


# --- callers -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_caller_that_is_shut_out_is_refused_at_once_and_its_stream_ends(
    authority, quarantine, path
) -> None:
    with (
        serving(authority, endless(), quarantine=quarantine) as served,
        served.channel() as caller,
    ):
        infer = caller.unary_unary(INFER)
        infer(message(), timeout=5)
        running = Streaming(caller.stream_stream(STREAM)(iter((message(),))))
        began = time.monotonic()
        shut_out(path, CLI)
        running.assert_ends_within(1)
        assert time.monotonic() - began < 1
        with pytest.raises(grpc.RpcError) as caught:
            infer(message(), timeout=5)
        assert refused(caught.value) == (
            Code.UNAUTHENTICATED,
            "the peer's identity could not be verified",
            "Unauthenticated",
        )
        # One for the stream, with who and why, and one for the call.
        assert soon(lambda: len(served.refusals) == 2)
        stream, call = served.refusals
        assert (stream.path, stream.peer.id) == (STREAM, CLI)
        assert (call.path, call.peer) == (INFER, None)
        for refusal in served.refusals:
            assert f"{CLI} is in quarantine since" in refusal.error.reason
        let_in(path, CLI)
        assert soon(lambda: not fails(lambda: infer(message(), timeout=5)))


@pytest.mark.slow
def test_by_serial_the_stolen_svid_is_refused_and_a_fresh_one_is_not(
    authority, quarantine, path
) -> None:
    stolen, fresh = authority.issue(CLI), authority.issue(CLI)
    with (
        serving(authority, quarantine=quarantine) as served,
        served.channel(stolen) as thief,
        served.channel(fresh) as owner,
    ):
        infer = thief.unary_unary(INFER)
        infer(message(), timeout=5)
        shut_out(path, f"{stolen.serial:x}")
        assert soon(lambda: fails(lambda: infer(message(), timeout=5)))
        owner.unary_unary(INFER)(message(), timeout=5)
        assert f"serial {stolen.serial:x} of {CLI}" in served.refusals[0].error.reason


@pytest.mark.slow
def test_a_list_that_cannot_be_read_refuses_everybody_and_says_so(
    authority, quarantine, path
) -> None:
    with (
        serving(authority, quarantine=quarantine) as served,
        served.channel() as caller,
    ):
        infer = caller.unary_unary(INFER)
        infer(message(), timeout=5)
        path.write_text("nonsense")
        assert soon(lambda: fails(lambda: infer(message(), timeout=5)))
        with pytest.raises(grpc.RpcError) as caught:
            infer(message(), timeout=5)
    assert refused(caught.value) == (
        Code.UNAVAILABLE,
        "this service cannot judge who may call now",
        "Unavailable",
    )
    assert f"{path}: the list: not JSON" in served.refusals[0].error.reason


@pytest.mark.slow
def test_streams_end_also_where_that_cannot_be_audited(
    authority, quarantine, path
) -> None:
    def full(_refusal) -> None:
        raise errors.AuditError("the log is full")

    service = endless()
    server = Server(
        inference_methods(service, "echo", "3"),
        source=authority.source(SERVER),
        quarantine=quarantine,
        on_refused=full,
    )
    _, port = server.start("127.0.0.1")
    try:
        for who in (CLI, GATEWAY):
            with channel(port, authority.issue(who), authority) as caller:
                pieces = caller.stream_stream(STREAM)(iter((message(),)))
                running = Streaming(pieces)
                shut_out(path, who)
                running.assert_ends_within(1)
    finally:
        server.stop(0)


# --- servers -----------------------------------------------------------------------


@contextmanager
def calling(served, quarantine=None, source=None, **more):
    source = source or served.authority.source(CLI)
    with Client(
        served.address, source=source, server_id=SERVER, quarantine=quarantine, **more
    ) as client:
        yield client


@pytest.mark.slow
def test_a_server_that_is_shut_out_is_not_called_and_its_stream_ends(
    authority, quarantine, path
) -> None:
    with serving(authority, endless()) as served, calling(served, quarantine) as client:
        client.infer(X)
        running = Streaming(client.stream(X))
        began = time.monotonic()
        shut_out(path, SERVER)
        running.assert_ends_within(1)
        assert time.monotonic() - began < 1
        assert isinstance(running.error, errors.Interrupted)
        assert f"{SERVER} or this client may not be believed" in running.error.public
        seen = len(served.service.calls)
        with pytest.raises(
            errors.Unavailable, match=f"{SERVER} is in quarantine since"
        ):
            client.infer(X)
        with pytest.raises(errors.Unavailable, match="in quarantine"):
            next(client.stream(X))
        assert len(served.service.calls) == seen
        let_in(path, SERVER)
        assert soon(lambda: not fails(lambda: client.infer(X)))


@pytest.mark.slow
def test_an_async_client_does_not_call_it_either(authority, quarantine, path) -> None:
    async def run(served) -> None:
        async with AsyncClient(
            served.address,
            source=authority.source(CLI),
            server_id=SERVER,
            quarantine=quarantine,
        ) as client:
            await client.infer(X)
            pieces = client.stream(X)
            await anext(pieces)
            waiting = asyncio.create_task(client.infer({"t": "wait"}))
            began = time.monotonic()
            await asyncio.to_thread(shut_out, path, SERVER)
            with pytest.raises(errors.Interrupted, match="was broken off"):  # noqa: PT012
                async for _ in pieces:
                    assert time.monotonic() - began < 2
            assert time.monotonic() - began < 1
            with pytest.raises(errors.Interrupted, match="was broken off"):
                await waiting
            with pytest.raises(errors.Unavailable, match="is in quarantine since"):
                await client.infer(X)
            await asyncio.to_thread(let_in, path, SERVER)
            while True:
                try:
                    await client.infer(X)
                    break
                except errors.Unavailable:
                    assert time.monotonic() - began < 5
                    await asyncio.sleep(0.02)

    with serving(authority, endless()) as served:
        asyncio.run(run(served))


@pytest.mark.slow
def test_a_cancelled_task_is_still_cancelled(authority) -> None:
    async def run(served) -> None:
        async with AsyncClient(
            served.address, source=authority.source(CLI), server_id=SERVER
        ) as client:
            waiting = asyncio.create_task(client.infer({"t": "wait"}))
            await asyncio.to_thread(served.service.running.acquire, timeout=5)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    with serving(authority) as served:
        asyncio.run(run(served))


@contextmanager
def only_first_connection(port: int):
    """A way to the server on which later connections are taken, and left silent."""
    listener = socket.create_server(("127.0.0.1", 0))
    ends = []

    def copy(source, target) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                ends.append(near)
                if len(ends) == 1:
                    far = socket.create_connection(("127.0.0.1", port))
                    for pair in ((near, far), (far, near)):
                        threading.Thread(target=copy, args=pair, daemon=True).start()
                    ends.append(far)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        for one in (*ends, listener):
            one.close()
        thread.join()


def renew(client: Client) -> None:
    for way in client._route.replicas:
        client._thread.post(way.renew)


@pytest.mark.slow
def test_a_new_connection_that_hangs_delays_nothing(
    authority, quarantine, path
) -> None:
    with (
        serving(authority, endless()) as served,
        only_first_connection(served.port) as port,
        Client(
            f"127.0.0.1:{port}",
            source=authority.source(CLI),
            server_id=SERVER,
            quarantine=quarantine,
        ) as client,
    ):
        running = Streaming(client.stream(X))
        renew(client)
        time.sleep(0.3)
        shut_out(path, SERVER)
        running.assert_ends_within(1)


@pytest.mark.slow
def test_a_new_connection_that_hangs_delays_no_async_client(
    authority, quarantine, path
) -> None:
    async def run(port: int) -> None:
        async with AsyncClient(
            f"127.0.0.1:{port}",
            source=authority.source(CLI),
            server_id=SERVER,
            quarantine=quarantine,
        ) as client:
            pieces = client.stream(X)
            await anext(pieces)
            for channel in client._route.replicas:
                channel.renew()
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                await anext(pieces)
            shut_out(path, SERVER)
            began = time.monotonic()
            with pytest.raises(errors.Interrupted):  # noqa: PT012
                async for _ in pieces:
                    assert time.monotonic() - began < 1

    with (
        serving(authority, endless()) as served,
        only_first_connection(served.port) as port,
    ):
        asyncio.run(run(port))


class Book:
    """A directory whose content the test changes."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.watching = 0

    def watch(self, call, deployment):
        seen = None
        self.watching += 1
        try:
            while not call.cancelled():
                if self.addresses != seen:
                    seen = self.addresses
                    yield tuple(Endpoint(one) for one in seen)
                time.sleep(0.02)
        finally:
            self.watching -= 1


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_directory_that_is_shut_out_is_not_followed(
    authority, quarantine, path, asynchronous
) -> None:
    source = authority.source(CLI)
    with serving(authority) as served:
        book = Book(served.address)
        door = Server(directory_methods(book), source=authority.source(DIRECTORY))
        host, port = door.start("127.0.0.1")
        keywords = {
            "source": source,
            "directory": f"{host}:{port}",
            "quarantine": quarantine,
        }
        try:
            if asynchronous:
                asyncio.run(_followed(book, path, keywords))
                return
            with Client("ml-inference/echo", **keywords) as client:
                client.infer(X)
                assert book.watching == 1
                shut_out(path, DIRECTORY)
                assert soon(lambda: book.watching == 0, 1)
                client.infer(X)  # what it said was never believed but for places
                time.sleep(1.5)
                assert book.watching == 0
                let_in(path, DIRECTORY)
                assert soon(lambda: book.watching == 1)
        finally:
            door.stop(0)


async def _followed(book, path, keywords) -> None:
    async def until(count, seconds):
        end = time.monotonic() + seconds
        while book.watching != count:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)

    async with AsyncClient("ml-inference/echo", **keywords) as client:
        await client.infer(X)
        await until(1, 1)
        shut_out(path, DIRECTORY)
        await until(0, 1)
        await client.infer(X)
        await asyncio.sleep(1.5)
        assert book.watching == 0
        let_in(path, DIRECTORY)
        await until(1, 3)


# --- withdrawal ----------------------------------------------------------------------

ENTRY = '[[entry]]\nspiffe_id = "{}"\nselectors = ["unix:uid:{}"]\n'


class Granting:
    """The real agent, and its file of registration entries."""

    def __init__(self, folder: Path, authority, spiffe_id: str) -> None:
        self._entries = folder / "entries.toml"
        self._entries.write_text(ENTRY.format(spiffe_id, os.geteuid()))
        self._entries.chmod(0o600)
        rules = Rules(trust_domain=DOMAIN)
        self.agent = Agent(authority, folder, rules, entries=self._entries)

    def withdraw(self) -> None:
        new = self._entries.with_suffix(".new")
        new.write_text("entry = []\n")
        new.chmod(0o600)
        new.replace(self._entries)


@pytest.mark.slow
def test_w8_a_server_whose_svids_are_withdrawn_stops_serving(authority, path) -> None:
    granting = Granting(path.parent, authority, SERVER)
    with (
        granting.agent,
        WorkloadSource(granting.agent.socket) as source,
        serving(authority, endless(), source=source) as served,
        served.channel() as caller,
    ):
        infer = caller.unary_unary(INFER)
        infer(message(), timeout=5)
        running = Streaming(caller.stream_stream(STREAM)(iter((message(),))))
        granting.withdraw()
        assert soon(lambda: fails(source.current))
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            infer(message(), timeout=5)
        assert refused(caught.value)[1] == "this server has no valid identity now"
        running.assert_ends_within(1)
        assert time.monotonic() - began < 1


@pytest.mark.slow
def test_w8_a_client_whose_svids_are_withdrawn_stops_calling(authority, path) -> None:
    granting = Granting(path.parent, authority, CLI)
    with (
        granting.agent,
        WorkloadSource(granting.agent.socket) as source,
        serving(authority, endless()) as served,
        calling(served, source=source) as client,
    ):
        client.infer(X)
        running = Streaming(client.stream(X))
        granting.withdraw()
        assert soon(lambda: fails(source.current))
        began = time.monotonic()
        running.assert_ends_within(1)
        assert time.monotonic() - began < 1
        assert isinstance(running.error, errors.Interrupted)
        with pytest.raises(errors.IdentityError, match="no call without an identity"):
            client.infer(X)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_root_that_is_dropped_ends_the_streams_that_it_vouched_for(side) -> None:
    old, new = ThrowAwayAuthority(DOMAIN), ThrowAwayAuthority(DOMAIN)
    both = {DOMAIN: old.bundle + new.bundle}
    ours = {"server": SERVER, "client": CLI}[side]
    theirs = {"server": CLI, "client": SERVER}[side]
    moving = MovingSource(Identity(new.issue(ours), both))
    fixed = FixedSource(Identity(old.issue(theirs), both))
    server, client = (moving, fixed) if side == "server" else (fixed, moving)
    with (
        serving(old, endless(), source=server) as served,
        calling(served, source=client) as caller,
    ):
        running = Streaming(caller.stream(X))
        began = time.monotonic()
        moving.move(Identity(new.issue(ours), new.bundles))
        running.assert_ends_within(1)
        assert time.monotonic() - began < 1
        assert running.error is not None
