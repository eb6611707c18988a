"""A replica's weights from the broker of its node, or, where that is away, its own.

A broker that is away, slow or refuses costs time and memory, and is told: the replica
then reads and hashes for itself. One that answers wrongly is refused together with the
model: whoever sits at that socket wanted other bytes to run.
"""

import os
import socket
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from ztserve.artifacts.loading.buffers import Buffer
from ztserve.artifacts.loading.memory import PrivateMemory, Wanted
from ztserve.artifacts.loading.shared import statement, wire
from ztserve.artifacts.loading.shared.memory import (
    MemoryId,
    check_sealed,
    layout,
    map_private,
)
from ztserve.artifacts.loading.shared.statement import Request, Statement, Unproven
from ztserve.artifacts.statements.strict import Malformed, Object, get
from ztserve.errors import (
    ArtifactError,
    CallError,
    IdentityError,
    VerificationError,
    ZTServeError,
)
from ztserve.identity import Source
from ztserve.types import Peer

MIN_BYTES = 64 << 20
"""Smaller models are not shared: to hash them takes less than to ask."""
SILENCE_S = 10.0
"""Longest wait for a broker to say anything."""
PROOF_S = 5.0
"""How long a broker may prove nobody: authorities change at both ends, not at once."""
_RETRY_S = 0.25
LEAST_S = 60.0
LEAST_BYTES_PER_S = 16 << 20
"""A broker is given `LEAST_S`, and the time that its model takes at this rate."""


class NotShared(ArtifactError):
    """The broker gives nothing; the replica has to read for itself."""


class SharedMemory:
    """Borrows a model's memory from the broker at `path`.

    Args:
        path: its unix socket.
        broker_id: the SPIFFE ID that it must prove.
        source: gives the trust bundles to judge it by.
        min_bytes: models below that are read into private memory.
        summon: called where nobody listens, to have a broker started; may raise a
            ZTServeError.
        check_peer: raises CallError where the broker's SVID is not to be believed.
        on_event: told where the weights came from.

    """

    def __init__(
        self,
        path: Path,
        broker_id: str,
        source: Source,
        *,
        min_bytes: int = MIN_BYTES,
        summon: Callable[[], None] = lambda: None,
        check_peer: Callable[[Peer], None] = lambda _: None,
        on_event: Callable[[str, dict[str, object]], object] = lambda _kind, _: None,
    ) -> None:
        self._path = path
        self._broker_id = broker_id
        self._source = source
        self._min_bytes = min_bytes
        self._summon = summon
        self._check_peer = check_peer
        self._on_event = on_event

    def fill(self, wanted: Wanted) -> Mapping[str, Buffer]:
        """Return the files, shared where the broker has them, else our own.

        Raises VerificationError where the broker, or who poses as it, answers wrongly;
        and as `buffers.read_all` where we read for ourselves.
        """
        total, most = sum(wanted.sizes.values()), wanted.max_bytes
        if total < self._min_bytes or (most is not None and total > most):
            return PrivateMemory().fill(wanted)  # which refuses what is too large
        try:
            return self._proven(wanted)
        except NotShared as error:
            self._on_event(
                "weights-not-shared", {"model": str(wanted.ref), "reason": str(error)}
            )
        except (VerificationError, Malformed) as error:
            raise VerificationError(
                f"the weights broker at {self._path}: {error}: no model is taken from "
                "it; look for what listens there"
            ) from error
        return PrivateMemory().fill(wanted)

    def _proven(self, wanted: Wanted) -> Mapping[str, Buffer]:
        until = time.monotonic() + PROOF_S
        while True:
            try:
                return self._borrowed(wanted)
            except Unproven:
                if time.monotonic() >= until:
                    raise
                time.sleep(_RETRY_S)

    def _borrowed(self, wanted: Wanted) -> Mapping[str, Buffer]:
        request = Request.new(wanted.ref)
        size = layout(wanted.sizes)[1]
        deadline = time.monotonic() + LEAST_S + size / LEAST_BYTES_PER_S
        connection = self._connect()
        try:
            stated, descriptor = self._asked(connection, request, deadline)
            try:
                check_files(stated, wanted.sizes)
                memory = check_sealed(descriptor)
                check_same(stated, memory)
                check_size(memory, wanted.sizes)
                views = map_private(
                    descriptor,
                    wanted.sizes,
                    # The mapping is our hold on the model: the broker sees it end.
                    bound=lambda mapping: weakref.finalize(mapping, connection.close),
                )
            finally:
                os.close(descriptor)
        except BaseException:
            connection.close()
            raise
        self._on_event(
            "weights-borrowed",
            {"model": str(wanted.ref), "bytes": size, "memory": memory.inode},
        )
        return {name: Buffer(views[name], stated.digests[name]) for name in views}

    def _connect(self) -> socket.socket:
        try:
            return self._dialled()
        except OSError:  # nobody listens: the first of the node has one started
            try:
                self._summon()
                return self._dialled()
            except (OSError, ZTServeError) as error:
                raise NotShared(
                    f"no weights broker at {self._path}: {error}"
                ) from error

    def _dialled(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(SILENCE_S)
        try:
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            raise
        return connection

    def _asked(
        self, connection: socket.socket, request: Request, deadline: float
    ) -> tuple[Statement, int]:
        """Return the verified statement, and a descriptor that nothing is known of."""
        try:
            check_user(connection)
            wire.send(connection, request.message())
            answer = self._answer(connection, deadline)
            stated = statement.verify(
                answer,
                request,
                self._broker_id,
                self._source.current(),
                self._check_peer,
            )
            descriptor = wire.receive_descriptor(connection, deadline=_soon(deadline))
        except OSError as error:  # TimeoutError and ConnectionError are some
            raise NotShared(f"the broker does not answer: {error}") from error
        except (CallError, IdentityError) as error:
            raise NotShared(f"the broker is not believed now: {error}") from error
        return stated, descriptor

    def _answer(self, connection: socket.socket, deadline: float) -> Object:
        while True:
            answer = wire.receive(
                connection, limit=wire.MAX_ANSWER_BYTES, deadline=_soon(deadline)
            )
            if "refused" in answer:
                raise NotShared(f"it refuses: {get(answer, 'refused', str):.1000}")
            if "wait" not in answer:
                return answer


def _soon(deadline: float) -> float:
    return min(deadline, time.monotonic() + SILENCE_S)


def check_user(connection: socket.socket) -> None:
    """Raise VerificationError if another user's process listens."""
    wire.check_user(connection)


def check_files(stated: Statement, sizes: Mapping[str, int]) -> None:
    """Raise VerificationError unless exactly the listed files are stated, so long."""
    if stated.sizes != sizes:
        strange = sorted(stated.sizes.items() ^ sizes.items())
        raise VerificationError(
            f"it has other files than the registry lists: {strange[0]!r:.200}"
        )


def check_same(stated: Statement, memory: MemoryId) -> None:
    """Raise VerificationError unless this is the memory that was stated."""
    if memory != stated.memory:
        raise VerificationError(
            f"the descriptor is of {memory}, the statement of {stated.memory}"
        )


def check_size(memory: MemoryId, sizes: Mapping[str, int]) -> None:
    """Raise VerificationError unless the files fill the memory to its end."""
    size = layout(sizes)[1]
    if memory.size != size:
        raise VerificationError(
            f"the memory has {memory.size} bytes, its files need {size}"
        )
