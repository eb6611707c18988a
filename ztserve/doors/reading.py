"""A registry behind a door, as a replica sees it: an `artifacts.Registry`.

What a door answers is a claim, as that of any registry, and bounded in bytes, in count
and in time. Reads may be repeated, so one that broke off is asked for again.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from google.protobuf.message import Message

from ztserve.artifacts import Resolved
from ztserve.artifacts.statements.attestation import (
    MAX_ATTESTATION_BYTES,
    MAX_ATTESTATIONS,
    file_of,
)
from ztserve.artifacts.statements.manifest import MAX_FILES
from ztserve.artifacts.statements.strict import Malformed
from ztserve.doors import wire
from ztserve.doors.address import DoorAddress
from ztserve.doors.v1 import registry_pb2 as pb
from ztserve.errors import (
    Denied,
    Interrupted,
    InvalidInput,
    NotFound,
    Overloaded,
    RegistryError,
    Unavailable,
    VerificationError,
    ZTServeError,
)
from ztserve.identity import Quarantine, Source, SpiffeId
from ztserve.transport import Client
from ztserve.types import ModelRef

ANSWER_S = 10.0
"""For an answer but a file's; and for a read, beside what its bytes are given."""
LEAST_BYTES_S = 256 << 10
"""Below this rate, in bytes a second, a read counts as stalled."""
PAUSE_S = 0.2
"""Before a read that broke off is asked for again."""
PIECE = 2 << 20
"""Of a file, asked for at once."""
MAX_READS = 8
"""Reads in flight, of all files together."""
AHEAD = 4
"""Reads of one file in flight, and held until they are taken."""
MAX_WINDOW = 64 << 20
"""Most bytes asked for ahead of what was taken."""
MAX_REMEMBERED = 64
"""Models whose files are remembered between `files` and `open`."""
_BROKEN = (Interrupted, Unavailable)

M = TypeVar("M", bound=Message)


class DoorRegistry:
    """Read-only access to the models behind a registry door.

    Args:
        address: where the door is.
        source: our own identity, by which the door judges what we may read.
        door_id: the SPIFFE ID that it must prove.
        quarantine: doors that are not asked although their SVID holds; None: no such.

    Close it when the models are loaded. Thread-safe.

    """

    def __init__(
        self,
        address: DoorAddress,
        *,
        source: Source,
        door_id: SpiffeId,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._address = address
        self._own_id = source.current().svid.id
        self._client = Client(
            address.target, source=source, server_id=door_id, quarantine=quarantine
        )
        self._pool = ThreadPoolExecutor(MAX_READS, "ztserve-registry")
        self._files: dict[Resolved, Mapping[str, int]] = {}

    def __repr__(self) -> str:
        return f"DoorRegistry({str(self._address)!r})"

    def close(self) -> None:
        """Let go of the connection; what is being read ends. May be called again."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the registry's verbs -------------------------------------------------------

    def resolve(self, ref: ModelRef) -> Resolved:
        """Ask which model a reference means now; RegistryError."""
        request = pb.ResolveRequest(reference=str(ref))
        message = self._ask("Resolve", ref.name, request, wire.MAX_REQUEST_BYTES)
        sent = self._parse(pb.Model, message)
        found = Resolved(sent.name, sent.version, sent.digest)
        if found.name != ref.name:
            raise self._nonsense(f"asked for {ref}, answers {found.name!r}")
        return found

    def signature(self, model: Resolved) -> bytes:
        """Return the model's signature; VerificationError if it has none."""
        return self._statement("Signature", model)

    def release(self, model: Resolved) -> bytes:
        """Return the model's release; VerificationError if it has none."""
        return self._statement("Release", model)

    def attestations(self, model: Resolved) -> Mapping[str, bytes]:
        """Return its attestations by name; RegistryError where they are too many."""
        most = wire.MAX_STATEMENT_BYTES
        message = self._ask("Attestations", model.name, _request(model), most)
        self._check_count(message, MAX_ATTESTATIONS, f"attestations of {model.ref}")
        sent = self._parse(pb.AttestationList, message).attestations
        found = {one.name: one.bundle for one in sent}
        try:
            for name in found:
                file_of(name)
        except Malformed as error:
            raise self._nonsense(str(error)) from None
        largest = max(map(len, found.values()), default=0)
        if len(found) != len(sent) or largest > MAX_ATTESTATION_BYTES:
            raise self._nonsense(
                f"attestations of {model.ref} with one name, or of more than "
                f"{MAX_ATTESTATION_BYTES} bytes"
            )
        return found

    def files(self, model: Resolved) -> Mapping[str, int]:
        """List the model's files as the door does, name to size."""
        most = wire.MAX_LIST_BYTES
        message = self._ask("Files", model.name, _request(model), most)
        self._check_count(message, MAX_FILES, f"files of {model.ref}")
        sent = self._parse(pb.FileList, message).files
        found = {one.name: one.size for one in sent}
        if len(found) != len(sent):
            raise self._nonsense(f"two files of {model.ref} with one name")
        if len(self._files) >= MAX_REMEMBERED:
            self._files.clear()
        self._files[model] = found
        return found

    def open(self, model: Resolved, name: str) -> "DoorReader":
        """Open one of its files; nothing is asked before it is read."""
        files = self._files.get(model)
        if files is None:
            files = self.files(model)
        if name not in files:
            raise VerificationError(
                f"{self._address}: {model.ref} has no file {name!r}"
            )
        size = files[name]

        def start(offset: int, length: int) -> "Future[memoryview]":
            return self._pool.submit(self._read, model, name, offset, length)

        return DoorReader(start, size)

    # --- one answer -----------------------------------------------------------------

    def _statement(self, verb: str, model: Resolved) -> bytes:
        message = self._ask(verb, model.name, _request(model), wire.MAX_STATEMENT_BYTES)
        bundle: bytes = self._parse(pb.Statement, message).bundle
        return bundle

    def _read(self, model: Resolved, name: str, offset: int, length: int) -> memoryview:
        """Read a range; ask again where it broke off, as long as there is time."""
        request = pb.ReadRequest(
            model=wire.model_message(model), name=name, offset=offset, length=length
        )
        answer_s = ANSWER_S + length / LEAST_BYTES_S
        message = self._ask("Read", model.name, request, length, answer_s=answer_s)
        try:
            return wire.content(message, length)
        except InvalidInput as error:
            raise self._nonsense(f"{name!r} at {offset}: {error}") from None

    def _ask(
        self,
        verb: str,
        name: str,
        request: Message,
        most: int,
        *,
        answer_s: float | None = None,
    ) -> bytes:
        """Return a door's answer, which carries at most `most` bytes.

        Within its time a door that has too much to do is asked again; so is, where
        `answer_s` says that it is a read, one that broke off. Raises RegistryError, or
        VerificationError where there never will be an answer.
        """
        until = time.monotonic() + (ANSWER_S if answer_s is None else answer_s)
        again = (Overloaded,) if answer_s is None else (Overloaded, *_BROKEN)
        while True:
            left = until - time.monotonic()
            try:
                return self._client.call(
                    wire.SERVICE + verb,
                    request.SerializeToString(),
                    timeout_s=max(round(left, 3), 0.001),
                    metadata=((wire.HEADER, name),),
                    max_bytes=most + wire.MAX_OVERHEAD_BYTES,
                )
            except NotFound as error:
                # Waiting does not help: what is there is no signed model.
                raise VerificationError(f"{self._address}: {error}") from error
            except Denied as error:
                raise RegistryError(
                    f"{self._address}: {error}; a policy of the door must let "
                    f"{self._own_id} GET /v1/registry/{name}"
                ) from error
            except ZTServeError as error:
                late = time.monotonic() + PAUSE_S >= until
                if late or not isinstance(error, again):
                    raise RegistryError(f"{self._address}: {error}") from error
                time.sleep(PAUSE_S)

    def _check_count(self, message: bytes, most: int, what: str) -> None:
        try:
            wire.check_count(message, most)
        except InvalidInput as error:
            raise self._nonsense(f"{what}: {error}") from None

    def _parse(self, kind: type[M], message: bytes) -> M:
        try:
            return wire.parse(kind, message)
        except InvalidInput as error:
            raise self._nonsense(str(error)) from None

    def _nonsense(self, what: str) -> RegistryError:
        return RegistryError(f"{self._address} answers nonsense: {what}")


class DoorReader:
    """One file behind a door, read into the caller's memory; a `registry.Reader`.

    It asks for what is wanted and, read in order, for as much as was read already, in
    pieces that are in flight together: windows double, up to `MAX_WINDOW`, and fit the
    loader's shares of 2^n bytes.
    """

    def __init__(
        self, start: Callable[[int, int], "Future[memoryview]"], size: int
    ) -> None:
        self.size = size
        self._start = start
        self._coming: deque[Future[memoryview]] = deque()
        self._piece = memoryview(b"")
        """What has come and was not taken."""
        self._since = self._at = self._asked = self._until = 0
        """Where reading in order began, is, was asked up to, and is to be asked to."""
        self._lock = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset`; return the bytes read, 0 at the end.

        Raises RegistryError where the door is away, stalls or answers nonsense.
        """
        wanted = min(len(view), self.size - offset)
        if wanted <= 0:
            return 0
        with self._lock:
            if offset != self._at:
                self._seek(offset)
            if not self._piece:
                self._ask_ahead(wanted)
                self._piece = self._coming.popleft().result()
            read = min(wanted, len(self._piece))
            view[:read] = self._piece[:read]
            self._piece = self._piece[read:]
            self._at += read
        return read

    def _seek(self, offset: int) -> None:
        self._drop()
        self._since = self._at = self._asked = self._until = offset

    def _ask_ahead(self, wanted: int) -> None:
        if self._at == self._until:
            ahead = min(self._at - self._since, MAX_WINDOW)
            self._until = min(self._at + max(wanted, ahead), self.size)
        while self._asked < self._until and len(self._coming) < AHEAD:
            length = min(PIECE, self._until - self._asked)
            self._coming.append(self._start(self._asked, length))
            self._asked += length

    def _drop(self) -> None:
        while self._coming:
            self._coming.popleft().cancel()
        self._piece = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._drop()


def _request(model: Resolved) -> pb.ModelRequest:
    return pb.ModelRequest(model=wire.model_message(model))
