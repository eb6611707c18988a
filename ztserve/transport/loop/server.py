"""The mTLS gRPC server on a loop of its own."""

import logging
import socket
import time
from collections.abc import Callable, Collection, Iterable

from ztserve.errors import ConfigError
from ztserve.identity import JwtProof, Quarantine, Source
from ztserve.transport.admission import Admission
from ztserve.transport.arrival import Reception, Refusal
from ztserve.transport.limits import Limits
from ztserve.transport.loop.allocator import keep_freed_memory
from ztserve.transport.loop.answers import Answers
from ztserve.transport.loop.carrier import guarded
from ztserve.transport.loop.credentials import Credentials
from ztserve.transport.loop.house import House
from ztserve.transport.loop.reactor import Reactor
from ztserve.transport.loop.wire import Wire
from ztserve.transport.methods import Method
from ztserve.transport.refusals import RefusedHandshakes
from ztserve.transport.rpc import Reaper
from ztserve.transport.tls import Ends
from ztserve.transport.visit import Desk
from ztserve.transport.workers import RESERVE, Workers

_LOG = logging.getLogger(__name__)

LOOK_S = 1.0
WARN_S = 0.05
"""From the word that we go away to the last call that is taken."""
STOP_S = 5.0
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
        self._workers = Workers(limits.max_in_flight + RESERVE)
        self._house: House | None = None
        self._desk: Desk
        self._reactor: Reactor
        self._started = False

    @property
    def in_flight(self) -> int:
        """Calls that are being answered now."""
        return self._admission.in_flight

    def start(self, host: str, ports: int | range = 0) -> tuple[str, int]:
        """Listen on `host` and the first free port of `ports`; return both.

        0, alone or in a range, means any free port. Raises IdentityError where the
        source has no valid identity, ConfigError where no port can be had.
        """
        if self._started:
            raise ConfigError("this server has been started already")
        keep_freed_memory()
        ends = Ends(self._source)
        listener, port = _listening(host, ports)
        self._started = True
        credentials = Credentials(ends, self._quarantine)
        reception = Reception(
            credentials,
            delegates=self._delegates,
            proof=self._proof,
            host=host,
            port=port,
        )
        self._desk = Desk(
            self._limits,
            credentials,
            self._admission,
            reception,
            self._reaper,
            self._on_refused,
        )
        answers = Answers(self._desk, self._workers)
        self._house = house = House(
            limits=self._limits,
            ends=ends,
            credentials=credentials,
            admission=self._admission,
            methods={one.path.encode(): one for one in self._methods},
            answer=answers,
            refused=self._refusals.add,
        )
        self._reactor = reactor = Reactor(listener, lambda: Wire(house), house.dispatch)
        answers.reactor = reactor
        house.soon, house.post = reactor.soon, reactor.post
        house.later = reactor.later
        self._unsubscribe = [
            one.subscribe(self._judge_soon)
            for one in (self._source, self._quarantine)
            if one is not None
        ]
        self._reaper.start()
        self._reactor.later(LOOK_S, self._look, house)
        self._reactor.start()
        return host, port

    def stop(self, grace_s: float) -> None:
        """Take no more calls, let the running ones end within `grace_s`, and close.

        May be called again.
        """
        if self._house is None:
            return
        house, self._house = self._house, None
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._reactor.post(self._leave, house)
        until = time.monotonic() + grace_s
        while house.wires and time.monotonic() < until:
            time.sleep(0.005)
        self._reactor.stop(STOP_S)
        self._refusals.tell()  # here: whoever is told may be closed next
        self._reaper.close()
        self._workers.close()

    # --- on the loop ------------------------------------------------------------

    def _look(self, house: House) -> None:
        self._reactor.later(LOOK_S, self._look, house)
        now = time.monotonic()
        for wire in list(house.wires):
            guarded(wire.look, now)
        if self._refusals:
            # On another thread: whoever is told may write to a disk.
            self._workers.submit(self._refusals.tell)

    def _leave(self, house: House) -> None:
        self._reactor.deafen()
        for final, after_s in ((False, 0.0), (True, WARN_S)):
            self._reactor.later(after_s, _drain, house, final)

    # --- what nobody sees otherwise ---------------------------------------------

    def _judge_soon(self) -> None:
        self._reactor.post(self._judge)

    def _judge(self) -> None:
        house = self._house
        for wire in list(house.wires) if house is not None else ():
            guarded(wire.judge)

    def _report(self, cause: str, count: int, address: str) -> None:
        if self._on_handshake_refused is not None:
            self._on_handshake_refused(cause, count, address)


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
