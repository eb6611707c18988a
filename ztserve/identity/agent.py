"""The embedded agent: SPIFFE's Workload API on a unix socket, for development.

It speaks the X.509 profile of the standard, so that what runs on it runs on SPIRE
unchanged; calls of the JWT profile are answered UNIMPLEMENTED. Which process gets which
ID is decided by `attestation.Rules`: hygiene, and no boundary, between processes of one
uid. It runs in threads of its own, in a Ray actor as well as in a plain process.
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

import grpc

from ztserve.errors import IdentityError
from ztserve.identity import workload_api as wire
from ztserve.identity.admin import admin_path, workload_endpoint
from ztserve.identity.attestation import Claims, Process, Rules
from ztserve.identity.authority import DEFAULT_TTL_S, Authority
from ztserve.identity.front import Front
from ztserve.identity.process import check_private
from ztserve.identity.svid import Svid

_LOG = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")

_MAX_STREAMS = 512
_STOP_GRACE_S = 0.5


class Agent:
    """Hands out SVIDs of `authority` on sockets in the private `directory`.

    `rules` say who may have which ID; SVIDs live `ttl_s` seconds and are renewed at
    half of that. `on_stop` is called, in a thread of its own, when an admin request
    asks the agent to stop; without it such requests are refused. Raises IdentityError
    where the directory is not private or another agent has it.
    """

    def __init__(
        self,
        authority: Authority,
        directory: Path,
        rules: Rules,
        *,
        ttl_s: float = DEFAULT_TTL_S,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        if rules.trust_domain != authority.trust_domain:
            raise IdentityError(
                f"rules for {rules.trust_domain}, authority of {authority.trust_domain}"
            )
        self._authority = authority
        self._directory = directory
        self._claims = Claims(rules)
        self._rules = rules
        self._ttl_s = ttl_s
        self._on_stop = on_stop
        self._issued = 0
        self._started = 0.0
        self._lock = threading.Lock()
        self._cleanup = contextlib.ExitStack()
        self._front: Front | None = None

    @property
    def socket(self) -> str:
        """The Workload API's endpoint, as SPIFFE_ENDPOINT_SOCKET would give it."""
        return workload_endpoint(self._directory)

    @property
    def admin_socket(self) -> Path:
        """Where `identity.admin` and `identity.register` find this agent."""
        return admin_path(self._directory)

    def start(self) -> Self:
        """Listen; return self. Raises IdentityError."""
        check_private(self._directory)
        with contextlib.ExitStack() as undo:
            self._hold_directory(undo)
            inner = self._directory / "inner.sock"
            public = Path(wire.socket_path(self.socket))
            for path in (inner, public, self.admin_socket):
                path.unlink(missing_ok=True)  # we hold the lock: it is a dead agent's
                undo.callback(path.unlink, missing_ok=True)
            self._front = Front(public, self.admin_socket, inner, self._answer)
            try:
                self._serve_grpc(inner, undo)
                undo.callback(self._front.stop)
                self._front.start()
            except (OSError, RuntimeError) as error:  # RuntimeError: gRPC cannot bind
                raise IdentityError(f"{self._directory}: {error}") from error
            self._cleanup = undo.pop_all()
        self._started = time.monotonic()
        return self

    def stop(self) -> None:
        """End all streams, close and remove the sockets. May be called again."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def status(self) -> dict[str, object]:
        """Return what an operator wants to know; nothing in it is secret."""
        living = self._claims.living()
        return {
            "trust_domain": self._authority.trust_domain,
            "pid": os.getpid(),
            "socket": self.socket,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "issued": self._issued,
            "registrations": [
                {"pid": process.pid, "id": str(spiffe_id)}
                for process, spiffe_id in living.items()
            ],
        }

    def _hold_directory(self, undo: contextlib.ExitStack) -> None:
        path = self._directory / "lock"
        try:
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise IdentityError(
                f"an identity agent already runs in {self._directory}"
            ) from error
        except OSError as error:
            raise IdentityError(f"{path}: {error.strerror}") from error

    # --- the Workload API -------------------------------------------------------

    def _serve_grpc(self, inner: Path, undo: contextlib.ExitStack) -> None:
        server = grpc.server(
            _DaemonThreads(),  # type: ignore[arg-type]
            maximum_concurrent_rpcs=_MAX_STREAMS,
            options=(
                ("grpc.max_receive_message_length", 4096),
                ("grpc.max_metadata_size", 4096),
                ("grpc.so_reuseport", 0),
            ),
        )
        handlers = {
            wire.FETCH_SVID: grpc.unary_stream_rpc_method_handler(
                self._fetch_svid,
                wire.X509SVIDRequest.FromString,
                wire.X509SVIDResponse.SerializeToString,
            ),
            wire.FETCH_BUNDLES: grpc.unary_stream_rpc_method_handler(
                self._fetch_bundles,
                wire.X509BundlesRequest.FromString,
                wire.X509BundlesResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(wire.SERVICE, handlers),)
        )
        server.add_insecure_port(f"unix://{inner}")
        server.start()
        inner.chmod(0o600)
        undo.callback(lambda: server.stop(_STOP_GRACE_S).wait())

    def _fetch_svid(
        self, _: wire.X509SVIDRequest, context: grpc.ServicerContext
    ) -> Iterator[wire.X509SVIDResponse]:
        process = self._caller(context)
        for _turn in _turns(context, self._ttl_s / 2):
            svid = self._issue(process, context)
            yield wire.X509SVIDResponse(
                svids=[
                    wire.X509SVID(
                        spiffe_id=svid.id,
                        x509_svid=b"".join(svid.chain_der),
                        x509_svid_key=svid.key_der(),
                        bundle=b"".join(self._authority.bundle),
                    )
                ]
            )

    def _fetch_bundles(
        self, _: wire.X509BundlesRequest, context: grpc.ServicerContext
    ) -> Iterator[wire.X509BundlesResponse]:
        process = self._caller(context)
        for _turn in _turns(context, self._ttl_s / 2):
            self._identify(process, context)
            name = f"spiffe://{self._authority.trust_domain}"
            yield wire.X509BundlesResponse(
                bundles={name: b"".join(self._authority.bundle)}
            )

    def _caller(self, context: grpc.ServicerContext) -> Process:
        """Return the attested process behind a call, or end the call."""
        key, value = wire.HEADER
        given = [v for k, v in context.invocation_metadata() if k == key]
        if given != [value]:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the header {key}: {value} is missing",
            )
        front = self._front
        process = None if front is None else front.caller(context.peer())
        if process is None:
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "the connection is not attested"
            )
        return process

    def _identify(self, process: Process, context: grpc.ServicerContext) -> str:
        try:
            return self._claims.identity_of(process)
        except IdentityError as error:
            _LOG.warning("no identity issued: %s", error)
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED, f"no identity issued: {error}"
            )

    def _issue(self, process: Process, context: grpc.ServicerContext) -> Svid:
        svid = self._authority.issue(
            self._identify(process, context), ttl_s=self._ttl_s
        )
        with self._lock:
            self._issued += 1
        _LOG.info(
            "issued %s serial %x to process %d", svid.id, svid.serial, process.pid
        )
        return svid

    # --- the admin socket -------------------------------------------------------

    def _answer(
        self, process: Process, request: dict[str, object]
    ) -> dict[str, object]:
        self._rules.check_uid(process)
        match request:
            case {"op": "register", "id": str(text), **rest} if not rest:
                return {"id": str(self._claims.register(process, text))}
            case {"op": "status", **rest} if not rest:
                return self.status()
            case {"op": "stop", **rest} if not rest:
                return self._asked_to_stop(process)
        raise IdentityError("expected op register (with id), status or stop")

    def _asked_to_stop(self, process: Process) -> dict[str, object]:
        if self._rules.is_worker(process):
            raise IdentityError(f"process {process.pid} is a Ray worker: it may not")
        if self._on_stop is None:
            raise IdentityError("this agent ends with the process that started it")
        threading.Thread(target=self._on_stop, daemon=True).start()
        return {}


def _turns(context: grpc.ServicerContext, interval_s: float) -> Iterator[None]:
    """Yield at once and then every `interval_s`, for as long as the caller listens."""
    ended = threading.Event()
    if not context.add_callback(ended.set):
        return
    while not ended.is_set():
        yield
        ended.wait(interval_s)


class _DaemonThreads(futures.Executor):
    """A daemon thread for each call.

    A stream lasts as long as its workload does; a ThreadPoolExecutor would make the
    interpreter wait for that at its end.
    """

    def submit(
        self, fn: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> futures.Future[_R]:
        future: futures.Future[_R] = futures.Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - it is the future's to raise
                future.set_exception(error)

        threading.Thread(target=run, name="ztserve-agent-call", daemon=True).start()
        return future
