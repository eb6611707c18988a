import asyncio
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
from tests.unit.transport.test_directory import DOOR, ECHO, Book
from ztserve import errors
from ztserve.identity import Identity
from ztserve.transport import AsyncClient, Server, directory_methods
from ztserve.types import Caller


def made(served: Served, principal: str = CLI) -> AsyncClient:
    source = served.authority.source(principal)
    return AsyncClient(served.address, source=source, server_id=SERVER)


def test_it_does_what_the_client_does(served: Served) -> None:
    async def run() -> None:
        async with made(served) as client:
            answer = await client.infer({"x": [[1, 2, 3, 4]], "t": "hi"})
            assert answer["x"].dtype == np.dtype("f4")
            assert answer["t"] == "hi"
            assert [p async for p in client.stream({"t": "hi"})] == [{"t": "hi"}] * 3
            assert (await client.metadata()).model == "echo"
            assert await client.ready()
            assert (await client.example())["x"].shape == (1, 4)
            assert client.server_id == SERVER

    asyncio.run(run())


@pytest.mark.parametrize("name", ["Denied", "InvalidInput", "InferenceError"])
def test_the_servers_error_is_raised_again(served: Served, name: str) -> None:
    async def run() -> None:
        async with made(served) as client:
            with pytest.raises(getattr(errors, name)):
                await client.infer({"t": f"raise {name}"})
            with pytest.raises(getattr(errors, name)):
                async for _ in client.stream({"t": f"raise {name}"}):
                    pass

    asyncio.run(run())


def test_many_calls_at_once(served: Served) -> None:
    async def run() -> None:
        async with made(served) as client:
            answers = await asyncio.gather(
                *(client.infer({"t": str(n)}) for n in range(32))
            )
            assert [one["t"] for one in answers] == [str(n) for n in range(32)]

    asyncio.run(run())


def test_a_task_that_is_cancelled_cancels_its_call(served: Served) -> None:
    async def run() -> None:
        async with made(served) as client:
            task = asyncio.create_task(client.infer({"t": "wait"}))
            await asyncio.to_thread(served.service.running.acquire, timeout=5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            until = time.monotonic() + 5
            while served.server.in_flight and time.monotonic() < until:
                await asyncio.sleep(0.01)
            assert served.server.in_flight == 0

    asyncio.run(run())


def test_a_stream_that_is_left_gives_its_place_free(authority) -> None:
    async def run(served: Served) -> None:
        async with made(served) as client:
            stream = client.stream({"t": "hi"})
            await anext(stream)
            await stream.aclose()
            until = time.monotonic() + 5
            while served.server.in_flight and time.monotonic() < until:
                await asyncio.sleep(0.01)
            assert served.server.in_flight == 0

    with serving(authority, Echo(pieces=10**9)) as served:
        asyncio.run(run(served))


def test_it_says_for_whom_it_calls(authority) -> None:
    async def run(served: Served) -> None:
        async with made(served, GATEWAY) as client:
            await client.infer({"t": "hi"}, caller=Caller("iss", "ada"))

    with serving(authority, delegates=[GATEWAY]) as served:
        asyncio.run(run(served))
    assert served.service.calls[0].caller.subject == "ada"


@pytest.mark.slow
def test_nothing_there_is_unavailable(authority) -> None:
    async def run() -> None:
        source = authority.source(CLI)
        async with AsyncClient(
            "127.0.0.1:1", source=source, server_id=SERVER
        ) as client:
            with pytest.raises(errors.Unavailable, match="nothing listens there"):
                await client.infer({"t": "hi"})
        with pytest.raises(errors.Unavailable, match="closed"):
            await client.infer({"t": "hi"})

    asyncio.run(run())


def test_it_rotates_and_stops_with_its_identity(authority, served: Served) -> None:
    source = MovingSource(Identity(authority.issue(CLI), authority.bundles))

    async def run() -> None:
        async with AsyncClient(
            served.address, source=source, server_id=SERVER
        ) as client:
            await client.infer({"t": "hi"})
            source.move(Identity(authority.issue(CLI), authority.bundles))
            until = time.monotonic() + 5
            while len({c.peer.serial for c in served.service.calls}) < 2:
                assert time.monotonic() < until
                await client.infer({"t": "hi"})
            source.move(None)
            with pytest.raises(errors.IdentityError):
                await until_it_fails(client)

    asyncio.run(run())


async def until_it_fails(client: AsyncClient) -> None:
    until = time.monotonic() + 5
    while time.monotonic() < until:
        await client.infer({"t": "hi"})


@pytest.mark.slow
def test_it_follows_the_directory(authority) -> None:
    book = Book()
    door = Server(directory_methods(book), source=authority.source(DOOR))
    host, port = door.start("127.0.0.1")

    async def run(served: Served) -> None:
        async with AsyncClient(
            ECHO, source=authority.source(CLI), directory=f"{host}:{port}"
        ) as client:
            asyncio.get_running_loop().call_later(0.2, book.put, served.address)
            assert await client.infer({"t": "hi"}) == {"t": "hi"}

    with serving(authority) as served:
        asyncio.run(run(served))
    door.stop(0)
