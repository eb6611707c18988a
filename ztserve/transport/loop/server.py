"""The mTLS gRPC server on a loop of its own."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial

from ztserve.errors import ConfigError
from ztserve.identity import JwtProof, Quarantine, Source
from ztserve.transport import messages
from ztserve.transport.admission import Admission
from ztserve.transport.arrival import Reception, Refusal
from ztserve.transport.limits import Limits
from ztserve.transport.loop.carrier import guarded
from ztserve.transport.loop.credentials import LoopCredentials
from ztserve.transport.loop.exchange import Aborted, Exchange
from ztserve.transport.loop.house import Arrived, House
from ztserve.transport.loop.refusals import RefusedHandshakes
from ztserve.transport.loop.wire import Wire
from ztserve.transport.methods import Method
from ztserve.transport.rpc import Reaper
from ztserve.transport.tls import Ends
from ztserve.transport.visit import Desk, answer, answer_all, stream
from ztserve.transport.workers import Workers

_LOG = logging.getLogger(__name__)

LOOK_S = 1.0
WARN_S = 0.05
"""From the word that we go away to the last call that is taken."""
START_S = 10.0
_BACKLOG = 1024


class Server:
    """Serves `methods` over mutual TLS 1.3 to verified callers.

    Args:
        methods: what `inference_methods` or `directory_methods` gives.
        source: our own identity and the bundles to judge callers by, followed live.
        limits: bounds on what the outside may send, hold and keep waiting.
        delegates: SPIFFE IDs whose word about the end user is taken.
        on_refused: told of each call refused before there was a `types.Call`.
        on_handshake_refused: told (cause, count, address), at most once a second for
            each, of connections that ended before a call, or for what the peer did.
        quarantine: who is refused although their SVID holds; None: nobody.
        proof: what judges the JWT-SVID that each call must bear; None: none need.

    """

    def __init__(  # noqa: PLR0913 - each is a decision of its owner
        self,
        methods: Iterable[Method],
        *,
        source: Source,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        delegates: Collection[str] = (),
        on_refused: Callable[[Refusal], object] | None = None,
        on_handshake_refused: Callable[[str, int, str], object] | None = None,
        quarantine: Quarantine | None = None,
        proof: JwtProof | None = None,
    ) -> None:
        self._methods = tuple(methods)
        self._source = source
        self._limits = limits
        self._delegates = frozenset(delegates)
        self._on_refused = on_refused
        self._on_handshake_refused = on_handshake_refused
        self._quarantine = quarantine
        self._proof = proof
        self._admission = Admission(limits)
        self._reaper = Reaper()
        self._refusals = RefusedHandshakes(self._report)
        self._unsubscribe: list[Callable[[], None]] = []
        self._workers = Workers()
        self._house: House | None = None
        self._desk: Desk
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None
        self._listener: socket.socket
        self._ending: asyncio.Event

    @property
    def in_flight(self) -> int:
        """Calls that are being answered now."""
        return self._admission.in_flight

    def start(self, host: str, ports: int | range = 0) -> tuple[str, int]:
        """Listen on `host` and the first free port of `ports`; return both.

        0, alone or in a range, means any free port. Raises IdentityError where the
        source has no valid identity, ConfigError where no port can be had.
        """
        if self._thread is not None:
            raise ConfigError("this server has been started already")
        ends = Ends(self._source)
        self._listener, port = _listening(host, ports)
        credentials = LoopCredentials(ends, self._quarantine)
        reception = Reception(
            credentials,  # type: ignore[arg-type]
            delegates=self._delegates,
            max_metadata_bytes=self._limits.max_metadata_bytes,
            proof=self._proof,
            host=host,
            port=port,
        )
        self._desk = Desk(
            self._limits,
            credentials,  # type: ignore[arg-type]
            self._admission,
            reception,
            self._reaper,
            self._on_refused,
        )
        self._house = House(
            limits=self._limits,
            ends=ends,
            credentials=credentials,
            methods={one.path.encode(): one for one in self._methods},
            answer=self._answer,
            refused=self._refusals.add,
        )
        self._unsubscribe = [
            one.subscribe(self._judge_soon)
            for one in (self._source, self._quarantine)
            if one is not None
        ]
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="ztserve-loop", daemon=True
        )
        self._reaper.start()
        self._thread.start()
        if not started.wait(START_S):
            raise ConfigError(f"the server's loop did not start within {START_S:g} s")
        return host, port

    def stop(self, grace_s: float) -> None:
        """Take no more calls, let the running ones end within `grace_s`, and close.

        May be called again.
        """
        if self._house is None or self._thread is None:
            return
        house, self._house = self._house, None
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._loop.call_soon_threadsafe(self._leave, house)
        until = time.monotonic() + grace_s
        while house.wires and time.monotonic() < until:
            time.sleep(0.005)
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(5)
        self._refusals.tell()  # here: whoever is told may be closed next
        self._reaper.close()
        self._workers.close()

    # --- the loop's thread ------------------------------------------------------

    def _run(self, started: threading.Event) -> None:
        asyncio.run(self._serve(started))

    async def _serve(self, started: threading.Event) -> None:
        house = self._house
        if house is None:
            return
        self._loop = loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        house.soon = loop.call_soon
        house.wake = partial(self._on_loop, _run_posted, house)
        self._server = await loop.create_server(
            lambda: Wire(house), sock=self._listener, backlog=_BACKLOG
        )
        started.set()
        while not self._ending.is_set():
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._ending.wait()
            except TimeoutError:
                now = time.monotonic()
                for wire in list(house.wires):
                    wire.look(now)
                self._tell()
        for wire in list(house.wires):
            wire.abort()
        self._server.close()
        await asyncio.sleep(0)

    def _leave(self, house: House) -> None:
        self._server.close()
        for final, after_s in ((False, 0.0), (True, WARN_S)):
            self._loop.call_later(after_s, _drain, house, final)

    # --- calls ------------------------------------------------------------------

    def _answer(self, several: list[Arrived]) -> None:
        method, call, wire = several[0]
        if method.answer_all is not None and call.is_whole:
            self._workers.submit(self._together, method, several)
        else:
            handle = self._unary if method.answer else self._stream
            self._workers.submit(handle, method, call, wire)

    def _together(self, method: Method, several: list[Arrived]) -> None:
        pairs = [(call.messages(), call) for _, call, _ in several]
        left = dict(enumerate(several))
        try:
            for at, message in answer_all(self._desk, method, pairs):
                _, call, wire = left.pop(at)
                if message is None:
                    wire.post(wire.end, call, call.trailers())
                else:
                    wire.post(wire.answer, call, message)
        finally:
            for _, call, wire in left.values():  # by a fault of ours
                wire.post(wire.end, call, call.trailers())

    def _unary(self, method: Method, call: Exchange, wire: Wire) -> None:
        try:
            message = answer(self._desk, method, call.messages(), call)  # type: ignore[arg-type]
        except Aborted:
            wire.post(wire.end, call, call.trailers())
        else:
            wire.post(wire.answer, call, message)

    def _stream(self, method: Method, call: Exchange, wire: Wire) -> None:
        try:
            for piece in stream(self._desk, method, call.messages(), call):  # type: ignore[arg-type]
                if not call.reserve(len(piece)):
                    break
                wire.post(wire.piece, call, piece)
        except Aborted:
            wire.post(wire.end, call, call.trailers())
        else:
            wire.post(wire.end, call, messages.OK)

    # --- what nobody sees otherwise ---------------------------------------------

    def _judge_soon(self) -> None:
        self._on_loop(self._judge)

    def _on_loop(self, action: Callable[..., object], *arguments: object) -> None:
        # The loop may have ended: then there is nobody left to judge or to answer.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(action, *arguments)

    def _judge(self) -> None:
        house = self._house
        for wire in list(house.wires) if house is not None else ():
            wire.judge()

    def _tell(self) -> None:
        if self._refusals:
            # On another thread: whoever is told may write to a disk.
            self._workers.submit(self._refusals.tell)

    def _report(self, cause: str, count: int, address: str) -> None:
        if self._on_handshake_refused is not None:
            self._on_handshake_refused(cause, count, address)


def _run_posted(house: House) -> None:
    for action, arguments in house.take_posted():
        guarded(action, *arguments)


def _drain(house: House, final: bool) -> None:  # noqa: FBT001
    for wire in list(house.wires):
        wire.drain(final=final)


def _listening(host: str, ports: int | range) -> tuple[socket.socket, int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (ports,) if isinstance(ports, int) else ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            _LOG.info("port %d of %s cannot be had: %s", port, host, error)
            continue
        return listener, int(listener.getsockname()[1])
    raise ConfigError(
        f"no free port on {host} in {ports}: widen [transport] first_port and "
        "last_port, or stop what listens there"
    )
