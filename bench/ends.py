"""The two ends of the calls of `bench.rotation`, each a process of its own.

Each registers with the agent in a folder, follows its Workload API, prints one line of
JSON when it is ready, and one with its records when its standard input has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from bench.tally import Call as Ended
from bench.tally import Seen
from bench.transport import CLIENT, DOMAIN, SERVER, Echo
from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import WorkloadSource, admin_path, register, workload_endpoint
from ztserve.transport import AsyncClient, Client, Server, inference_methods
from ztserve.types import Array, Reply, Tensor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Iterator, Mapping

    from ztserve.types import Call, Receive, Value

    Piece = Mapping[str, Value]

HOST = "127.0.0.1"
FIRST_PORTS = range(20_000, 30_000)
"""Not those that the kernel gives to clients: while the server is away, nobody else
must take its port. Begun anywhere, so that not even another soak does."""
GRACE_S = 1.0
PIECE_S = 0.25
"""Between two pieces of a stream."""
TIMEOUT_S = 10.0
MODEL = "echo"


class WrongAnswer(Exception):
    """What came back is not what was sent."""


class LeftOff(Exception):
    """The run ended in the middle of a stream; that is neither here nor there."""


class LongEcho(Echo):
    """Answers with its inputs: a stream's as often as their second number says."""

    def stream(self, call: Call, receive: Receive) -> Iterator[Reply]:
        """Answer with one piece after the other, each with its place in it."""
        (given,) = receive().inputs
        row = np.frombuffer(cast("bytes", given.data), np.float32).copy()
        for place in range(int(row[1])):
            if call.cancelled():
                return
            row[2] = place
            yield Reply((Tensor(given.name, "FP32", given.shape, row.tobytes()),))
            time.sleep(PIECE_S)


class Followed:
    """The identity that the agent in `folder` gives this process, and its history."""

    def __init__(self, folder: Path, spiffe_id: str) -> None:
        register(admin_path(folder), spiffe_id)
        self.source = WorkloadSource(workload_endpoint(folder))
        self.seen: list[Seen] = []
        self._note()
        self.source.subscribe(self._note)

    def _note(self) -> None:
        with contextlib.suppress(IdentityError):  # dropped: there is nothing to see
            identity = self.source.current()
            svid, now = identity.svid, time.monotonic()
            left_s = (svid.not_after - types.now()).total_seconds()
            roots = [hashlib.sha256(r).hexdigest() for r in identity.bundles[DOMAIN]]
            self.seen.append(Seen(now, f"{svid.serial:x}", now + left_s, sorted(roots)))


def serve(folder: Path, port: int) -> None:
    """Serve on `port`, or on any if it is 0, until the standard input ends."""
    followed = Followed(folder, SERVER)
    server = Server(inference_methods(LongEcho(), MODEL), source=followed.source)
    first = random.choice(FIRST_PORTS)
    _, port = server.start(HOST, port or range(first, first + 1000))
    _tell({"port": port})
    sys.stdin.read()
    server.stop(GRACE_S)
    _tell({"gone": time.monotonic(), "seen": followed.seen})


@dataclass
class Callers:
    """Unary calls at a fixed pace and long streams: every other from an event loop."""

    port: int
    count: int
    streams: int
    pace_s: float
    stream_s: float
    ended: list[Ended] = field(default_factory=list)
    ending: threading.Event = field(default_factory=threading.Event)

    def run(self, source: WorkloadSource) -> None:
        """Call until the standard input ends."""
        threading.Thread(target=self._wait, daemon=True).start()
        address = f"{HOST}:{self.port}"
        with Client(address, source=source, server_id=SERVER, model=MODEL) as client:
            threads = [
                threading.Thread(target=work, args=(client, number))
                for work, count in (
                    (self._unary, self.count),
                    (self._stream, self.streams),
                )
                for number in range(0, count, 2)
            ]
            for thread in threads:
                thread.start()
            asyncio.run(self._run_loop(address, source))
            for thread in threads:
                thread.join()

    async def _run_loop(self, address: str, source: WorkloadSource) -> None:
        async with (
            AsyncClient(
                address, source=source, server_id=SERVER, model=MODEL
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for number in range(1, self.count, 2):
                group.create_task(self._async_unary(client, number))
            for number in range(1, self.streams, 2):
                group.create_task(self._async_stream(client, number))

    def _wait(self) -> None:
        sys.stdin.read()
        self.ending.set()

    @contextlib.contextmanager
    def _noted(self, kind: str) -> Iterator[None]:
        begin, error = time.monotonic(), ""
        try:
            yield
        except LeftOff:
            return
        except (Exception, asyncio.CancelledError) as failed:  # noqa: BLE001
            # Whatever it is, the call failed; nobody here cancels any.
            error = f"{type(failed).__name__}: {failed}"
        self.ended.append(Ended(kind, begin, time.monotonic(), error))

    def _until_beat_s(self, first: float) -> float:
        """Return how long until the next beat; those that were missed stay missed."""
        late_s = time.monotonic() - first
        return -late_s if late_s < 0 else self.pace_s - late_s % self.pace_s

    def _first_beat(self, number: int) -> float:
        return time.monotonic() + number * self.pace_s / self.count

    # --- on threads -------------------------------------------------------------

    def _unary(self, client: Client, number: int) -> None:
        first, row = self._first_beat(number), _row(number)
        while not self.ending.wait(self._until_beat_s(first)):
            with self._noted("unary"):
                _check(client.infer({"x": row}, timeout_s=TIMEOUT_S), row)

    def _stream(self, client: Client, number: int) -> None:
        while not self.ending.wait(PIECE_S):
            with self._noted("stream"):
                reader = self._reader(number)
                given = client.stream({"x": reader.row}, timeout_s=self._patience_s)
                pieces = cast("Generator[Piece]", given)
                with contextlib.closing(pieces):
                    for piece in pieces:
                        reader.take(piece)
                reader.finish()

    # --- on an event loop -------------------------------------------------------

    async def _async_unary(self, client: AsyncClient, number: int) -> None:
        first, row = self._first_beat(number), _row(number)
        while not self.ending.is_set():
            await asyncio.sleep(self._until_beat_s(first))
            with self._noted("unary"):
                _check(await client.infer({"x": row}, timeout_s=TIMEOUT_S), row)

    async def _async_stream(self, client: AsyncClient, number: int) -> None:
        while not self.ending.is_set():
            await asyncio.sleep(PIECE_S)
            with self._noted("stream"):
                reader = self._reader(number)
                given = client.stream({"x": reader.row}, timeout_s=self._patience_s)
                pieces = cast("AsyncGenerator[Piece]", given)
                async with contextlib.aclosing(pieces):
                    async for piece in pieces:
                        reader.take(piece)
                reader.finish()

    # --- what is sent and comes back --------------------------------------------

    @property
    def _patience_s(self) -> float:
        return 2 * self.stream_s + TIMEOUT_S

    def _reader(self, number: int) -> Reader:
        pieces = max(2, round(self.stream_s / PIECE_S))
        return Reader(_row(number, pieces), self.ending)


class Reader:
    """Reads one stream, and sees that it has all its pieces, in order."""

    def __init__(self, row: Array, ending: threading.Event) -> None:
        self.row = row
        self._ending = ending
        self._place = 0

    def take(self, piece: Piece) -> None:
        """Take one piece. Raises WrongAnswer, or LeftOff where the run has ended."""
        expected = self.row.copy()
        expected[0, 2] = self._place
        _check(piece, expected)
        self._place += 1
        if self._ending.is_set():
            raise LeftOff

    def finish(self) -> None:
        """Raise WrongAnswer where the stream ended early."""
        if self._place != self.row[0, 1]:
            raise WrongAnswer(f"{self._place} pieces, expected {self.row[0, 1]:g}")


def call(folder: Path, callers: Callers) -> None:
    """Call until the standard input ends."""
    followed = Followed(folder, CLIENT)
    _tell({})
    callers.run(followed.source)
    _tell({"calls": callers.ended, "seen": followed.seen})


def _row(number: int, pieces: int = 0) -> Array:
    row = np.zeros((1, 64), np.float32)
    row[0, :2] = number, pieces
    return row


def _check(answer: Piece, expected: Array) -> None:
    if not np.array_equal(cast("Array", answer["x"]), expected):
        raise WrongAnswer("what came back is not what was sent")


def _tell(facts: Mapping[str, object]) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    """Be one end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("end", choices=("serve", "call"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--pace", type=float, default=0.05)
    parser.add_argument("--stream-seconds", type=float, default=12.0)
    given = parser.parse_args()
    if given.end == "serve":
        serve(given.folder, given.port)
        return
    callers = Callers(
        given.port, given.callers, given.streams, given.pace, given.stream_seconds
    )
    call(given.folder, callers)


if __name__ == "__main__":
    main()
