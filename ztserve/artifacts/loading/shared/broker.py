"""The weights broker of a node: reads each model once, and hands its memory to all.

Its own process, with an SVID of its own: what it says was hashed is believed by
replicas that do not hash again. It answers this user's processes over a unix socket, a
connection each, and that connection is the replica's hold on the model: what nobody
holds is given back after a while. It judges a model's statements before it reads the
weights, so that it reads none that nobody signed; each replica judges them for itself.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from ztserve.artifacts.loading.buffers import physical_memory
from ztserve.artifacts.loading.memory import Memory
from ztserve.artifacts.loading.shared import statement, wire
from ztserve.artifacts.loading.shared.memory import SealedMemory
from ztserve.artifacts.loading.shared.statement import Request, Statement
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import IdentityError, RegistryError, ZTServeError
from ztserve.identity import Source
from ztserve.types import ModelRef

_LOG = logging.getLogger(__name__)

GRACE_S = 30.0
"""How long a model is kept that no replica holds: for the next, as in an update."""
REQUEST_S = 5.0
"""Longest wait for a request, and for a replica to take an answer."""
WAIT_S = 1.0
"""How often a replica is told that its model is being read."""
MAX_CONNECTIONS = 256
MAX_MODELS = 64
"""Models that are held or read at once: a read goes on when who asked has left."""
_RETRY_S = 0.1
_MIB = 1 << 20

Load: TypeAlias = Callable[[ModelRef, Memory], object]
"""Verifies a model into the memory that it is given; raises as `verify_model`."""
Told: TypeAlias = Callable[[str, dict[str, object]], object]
"""Given the kind of an event and its fields."""


@dataclass(slots=True)
class _Shared:
    """One model. Its reader alone writes `refusal` and `memory`, until it is ready."""

    memory: SealedMemory
    bytes: int = 0
    """What it takes, or will take, of the broker's limit."""
    holders: int = 0
    """With `free_at` and `bytes` guarded by the broker's lock."""
    free_at: float = 0.0
    """When to give it back, where nobody holds it (monotonic)."""
    refusal: str = "the broker failed; its log says how"
    """Why there is none; empty once there is."""
    ready: threading.Event = field(default_factory=threading.Event)


class Broker:
    """Serves verified weights in sealed memory at the unix socket `path`.

    Args:
        path: in a directory that other users cannot enter; what is there is replaced.
        source: the broker's own identity.
        load: verifies a model into the memory that it is given.
        max_bytes: most bytes of all models, and of the machine at most. What nobody
            holds makes room; for what does not fit, replicas are refused.
        grace_s: how long what nobody holds is kept.
        on_event: told what was read, handed out, refused and given back; where it
            raises a ZTServeError, nothing is handed out.

    """

    def __init__(
        self,
        path: Path,
        source: Source,
        load: Load,
        *,
        max_bytes: int,
        grace_s: float = GRACE_S,
        on_event: Told = lambda _kind, _fields: None,
    ) -> None:
        self._path = path
        self._source = source
        self._load = load
        self._max_bytes = min(max_bytes, physical_memory())
        self._grace_s = grace_s
        self._on_event = on_event
        self._models: dict[str, _Shared] = {}
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._inode = 0
        self._threads = [
            threading.Thread(target=run, name="ztserve-weights", daemon=True)
            for run in (self._accept, self._tidy)
        ]

    def start(self) -> None:
        """Return once the socket accepts connections. Raises OSError."""
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        self._path.chmod(0o600)
        self._inode = self._path.stat().st_ino
        self._listener.listen(MAX_CONNECTIONS)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Close the socket and all connections, and give all memory back.

        What replicas have mapped stays theirs.
        """
        self._closed.set()
        with suppress(OSError):  # it is stopped already
            self._listener.shutdown(socket.SHUT_RDWR)  # has `accept` return
        for thread in self._threads:
            thread.join()
        self._listener.close()
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:  # not the next broker's
                self._path.unlink()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)
            for digest in self._unheld():
                self._free(digest)

    @property
    def holders(self) -> dict[str, int]:
        """How many replicas hold each model, by the digest of its manifest."""
        with self._lock:
            return {digest: one.holders for digest, one in self._models.items()}

    # --- connections --------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
                self._admit(connection)
            except (OSError, RuntimeError) as error:
                if self._closed.wait(_RETRY_S):
                    return
                # Out of descriptors or threads, say: a broker must not turn deaf.
                _LOG.error("the weights broker takes nobody on now: %s", error)

    def _admit(self, connection: socket.socket) -> None:
        with self._lock:
            full = len(self._connections) >= MAX_CONNECTIONS
            if not full:
                self._connections.add(connection)
        if full:
            self._note("weights-refused", reason=f"over {MAX_CONNECTIONS} replicas")
            connection.close()
            return
        thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
            raise

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._answer(connection)
        except (OSError, RuntimeError, Malformed, ZTServeError) as error:
            self._note("weights-refused", reason=str(error))
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _answer(self, connection: socket.socket) -> None:
        pid = wire.check_user(connection)
        request = statement.parse_request(
            wire.receive(
                connection,
                limit=wire.MAX_REQUEST_BYTES,
                deadline=time.monotonic() + REQUEST_S,
            )
        )
        connection.settimeout(REQUEST_S)
        try:
            digest, shared = self._held(request.ref)
        except RegistryError as error:
            wire.send(connection, {"refused": str(error)})
            raise
        try:
            while not shared.ready.wait(WAIT_S):
                wire.send(connection, {"wait": True})
            if shared.refusal:
                wire.send(connection, {"refused": shared.refusal})
                return
            # First: what cannot be written down is not handed out.
            self._on_event(
                "weights-shared", {"model": str(request.ref), "process": pid}
            )
            self._hand_over(connection, request, shared.memory)
            connection.settimeout(None)
            connection.recv(1)  # until the replica lets go
        finally:
            self._let_go(digest, shared)

    def _hand_over(
        self, connection: socket.socket, request: Request, memory: SealedMemory
    ) -> None:
        try:
            svid = self._source.current().svid
        except IdentityError as error:
            wire.send(connection, {"refused": f"the broker has no identity: {error}"})
            raise
        stated = Statement(
            nonce=request.nonce,
            boot=statement.boot_id(),
            manifest=str(request.ref.digest),
            memory=memory.id(),
            sizes=memory.sizes,
            digests=memory.digests,
        )
        try:
            message = statement.sign(stated, svid)
        except RegistryError as error:
            wire.send(connection, {"refused": str(error)})
            raise
        wire.send(connection, message)
        wire.send_descriptor(connection, memory.descriptor)

    # --- models -------------------------------------------------------------------

    def _held(self, ref: ModelRef) -> tuple[str, _Shared]:
        """Return the model with one holder more; begin to read it if need be.

        Raises RegistryError where there are too many, RuntimeError without a thread.
        """
        digest = str(ref.digest)
        with self._lock:
            shared = self._models.get(digest)
            if shared is None:
                self._make_room()
                shared = _Shared(SealedMemory(lambda size: self._reserve(digest, size)))
                # Started first: nobody is to wait for a model that no thread reads.
                threading.Thread(
                    target=self._read, args=(ref, shared), daemon=True
                ).start()
                self._models[digest] = shared
            shared.holders += 1
        return digest, shared

    def _make_room(self) -> None:
        """Raise RegistryError where one model more would be too many; lock held."""
        unheld = self._unheld()
        while len(self._models) >= MAX_MODELS:
            if not unheld:
                raise RegistryError(
                    f"{MAX_MODELS} models are held or being read, which is the limit"
                )
            self._free(unheld.pop(0))

    def _read(self, ref: ModelRef, shared: _Shared) -> None:
        began = time.monotonic()
        try:
            self._load(ref, shared.memory)
            shared.refusal = ""
            self._note(
                "weights-read",
                model=str(ref),
                bytes=shared.bytes,
                seconds=round(time.monotonic() - began, 3),
            )
        except ZTServeError as error:
            shared.refusal = str(error)
            self._note("weights-refused", model=str(ref), reason=str(error))
        finally:
            if shared.refusal:  # the next who asks has it tried again
                with self._lock:
                    self._models.pop(str(ref.digest), None)
                    shared.memory.close()
            shared.ready.set()

    def _reserve(self, digest: str, size: int) -> None:
        """Set `size` bytes apart; RegistryError where they do not fit the limit."""
        with self._lock:
            unheld = self._unheld()
            while self._bytes() + size > self._max_bytes and unheld:
                self._free(unheld.pop(0))
            taken = self._bytes()
            if taken + size > self._max_bytes:
                raise RegistryError(
                    f"{size // _MIB} MiB do not fit beside {taken // _MIB} MiB that "
                    f"replicas hold: the limit is {self._max_bytes // _MIB} MiB "
                    "([artifacts] max_shared_bytes)"
                )
            self._models[digest].bytes = size

    def _bytes(self) -> int:
        return sum(one.bytes for one in self._models.values())

    def _let_go(self, digest: str, shared: _Shared) -> None:
        with self._lock:
            shared.holders -= 1
            shared.free_at = time.monotonic() + self._grace_s
            forgotten = self._closed.is_set() or self._models.get(digest) is not shared
            if forgotten and not shared.holders:
                shared.memory.close()

    def _tidy(self) -> None:
        while not self._closed.wait(min(WAIT_S, self._grace_s / 4)):
            self._free_unheld()

    def _free_unheld(self) -> None:
        now = time.monotonic()
        with self._lock:
            freed = [
                digest
                for digest in self._unheld()
                if now >= self._models[digest].free_at
            ]
            for digest in freed:
                self._free(digest)
        for digest in freed:
            self._note("weights-freed", digest=digest)

    def _unheld(self) -> list[str]:
        """Return what may be given back, the longest unheld first; lock held."""
        free = {
            digest: one.free_at
            for digest, one in self._models.items()
            if not one.holders and one.ready.is_set()
        }
        return sorted(free, key=free.__getitem__)

    def _free(self, digest: str) -> None:
        """Give back what nobody holds; lock held."""
        self._models.pop(digest).memory.close()

    def _note(self, kind: str, **fields: object) -> None:
        """Tell what gives nothing away; where that fails, the process's log has it."""
        try:
            self._on_event(kind, fields)
        except ZTServeError as error:
            _LOG.error("%s %s could not be told: %s", kind, fields, error)
