"""The mTLS gRPC server on grpcio: the oracle by which tests judge the one that ships.

Every method is a stream handler, also where the call is unary on the wire: a unary
handler would be given the whole message before it could say no.
"""

import logging
import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, cast

import grpc

from ztserve.errors import ConfigError
from ztserve.identity import JwtProof, Quarantine, Source
from ztserve.transport.admission import Admission
from ztserve.transport.arrival import Reception, Refusal
from ztserve.transport.credentials import ServerCredentials
from ztserve.transport.handshakes import watch_handshakes
from ztserve.transport.limits import Limits
from ztserve.transport.methods import Method
from ztserve.transport.rpc import Reaper
from ztserve.transport.visit import Desk, answer, stream
from ztserve.transport.workers import RESERVE, Workers

_LOG = logging.getLogger(__name__)

SLACK_BYTES = 64 * 1024
"""Between our own limit on a message, which can be explained, and gRPC's."""


class GrpcServer:
    """As `Server`, but for what gRPC's engine cannot do.

    Args:
        methods: what `inference_methods` or `directory_methods` gives.
        source: our own identity and the bundles to judge callers by, followed live.
        limits: bounds on what the outside may send, hold and keep waiting.
        delegates: SPIFFE IDs whose word about the end user is taken.
        on_refused: told of each call refused before there was a `types.Call`.
        on_handshake_refused: told (cause, count), at most once a second for a cause,
            of handshakes that this whole process refused; see `watch_handshakes`.
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
        on_handshake_refused: Callable[[str, int], object] | None = None,
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
        self._unwatch: Callable[[], None] = lambda: None
        self._admission = Admission(limits)
        self._reaper = Reaper()
        self._workers = Workers(limits.max_in_flight + RESERVE)
        self._credentials: ServerCredentials | None = None
        self._server: grpc.Server | None = None

    @property
    def in_flight(self) -> int:
        """Calls that are being answered now."""
        return self._admission.in_flight

    def start(self, host: str, ports: int | range = 0) -> tuple[str, int]:
        """Listen on `host` and the first free port of `ports`; return both.

        0, alone or in a range, means any free port. Raises IdentityError where the
        source has no valid identity, ConfigError where no port can be had.
        """
        if self._server is not None:
            raise ConfigError("this server has been started already")
        credentials = ServerCredentials(self._source, self._quarantine)
        for port in (ports,) if isinstance(ports, int) else ports:
            server, bound = self._bound(credentials, host, port)
            if server is not None:
                break
        else:
            credentials.close()
            raise ConfigError(
                f"no free port on {host} in {ports}: widen [transport] first_port and "
                "last_port, or stop what listens there"
            )
        self._credentials, self._server = credentials, server
        self._register(server, credentials, host, bound)
        if self._on_handshake_refused is not None:
            self._unwatch = watch_handshakes(self._on_handshake_refused)
        self._reaper.start()
        server.start()
        return host, bound

    def stop(self, grace_s: float) -> None:
        """Take no more calls, let the running ones end within `grace_s`, and close.

        May be called again.
        """
        server, self._server = self._server, None
        if server is not None:
            server.stop(grace_s).wait(grace_s + 5)
        self._reaper.close()
        self._workers.close()
        if self._credentials is not None:
            self._credentials.close()
        self._unwatch()

    def _bound(
        self, credentials: ServerCredentials, host: str, port: int
    ) -> tuple[grpc.Server | None, int]:
        """Return a server that has `port`, or None where another one has it."""
        if port and not _is_free(host, port):
            return None, port
        server = grpc.server(
            cast("Any", self._workers),
            options=_options(self._limits),
            maximum_concurrent_rpcs=self._limits.max_in_flight + RESERVE,
        )
        try:
            bound = server.add_secure_port(_authority(host, port), credentials.grpc())
        except RuntimeError as error:
            _LOG.info("port %d of %s cannot be had: %s", port, host, error)
            return None, port
        return server, bound

    def _register(
        self, server: grpc.Server, credentials: ServerCredentials, host: str, port: int
    ) -> None:
        reception = Reception(
            credentials,
            delegates=self._delegates,
            max_metadata_bytes=self._limits.max_metadata_bytes,
            proof=self._proof,
            host=host,
            port=port,
        )
        desk = Desk(
            self._limits,
            credentials,
            self._admission,
            reception,
            self._reaper,
            self._on_refused,
        )
        services: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for method in self._methods:
            service, _, name = method.path.strip("/").rpartition("/")
            services[service][name] = (
                grpc.stream_stream_rpc_method_handler(partial(stream, desk, method))
                if method.stream
                else grpc.stream_unary_rpc_method_handler(partial(answer, desk, method))
            )
        for service, handlers in services.items():
            cast("Any", server).add_registered_method_handlers(service, handlers)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_free(host: str, port: int) -> bool:
    # gRPC logs a port that is taken as an error; asking first keeps the log quiet.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _options(limits: Limits) -> tuple[tuple[str, int], ...]:
    """Return gRPC's own bounds, most of which hold before authentication."""
    longest_s = max(limits.max_call_s, limits.max_stream_s)
    return (
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", _ms(limits.handshake_s)),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_receive_message_length", limits.max_message_bytes + SLACK_BYTES),
        ("grpc.max_connection_age_ms", _ms(limits.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", _ms(longest_s + 1)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
        ("grpc.http2.max_ping_strikes", 2),
        # Each stream that a caller resets may cost it a round trip: rapid reset.
        ("grpc.http2.ping_on_rst_stream_percent", 10),
        ("grpc.http2.max_requests_per_read", 32),
    )


def _ms(seconds: float) -> int:
    return max(int(seconds * 1000), 1)
