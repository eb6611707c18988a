"""The embedded agent: SPIFFE's Workload API on a unix socket.

It speaks the X.509 and JWT profiles of the standard (`service`), so that what
runs on it runs on SPIRE unchanged. Which process gets which ID is decided by
registration entries (`entries`) or, without a file of them, by `attestation.Rules`.
With a `Delegation` in place of an authority it hands on what SPIRE issues, and SPIRE's
entries decide.
**A boundary** it is to processes of other uids, which reach neither socket. Between
processes of its own uid all of this is **hygiene**, and makes lies visible: whoever
runs as that uid could also read an unhardened process's memory. It runs in threads of
its own, in a Ray actor as well as in a plain process.
"""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from types import MappingProxyType
from typing import ParamSpec, Self, TypeAlias, TypeVar

import grpc

from ztserve.errors import IdentityError, ZTServeError
from ztserve.identity import workload_api as wire
from ztserve.identity.agent.admin import admin_path, workload_endpoint
from ztserve.identity.agent.attestation import Process, Rules
from ztserve.identity.agent.callers import Callers
from ztserve.identity.agent.delegation import Delegation
from ztserve.identity.agent.entry_file import EntryFile
from ztserve.identity.agent.events import Events
from ztserve.identity.agent.front import Front
from ztserve.identity.agent.registration import Check, Registry
from ztserve.identity.agent.selectors import Further, Selectors
from ztserve.identity.agent.service import FederatedBundles, WorkloadService
from ztserve.identity.authority.development import DEFAULT_TTL_S, Authority
from ztserve.identity.process import check_private
from ztserve.identity.subscribers import OnEvent

_P = ParamSpec("_P")
_R = TypeVar("_R")

Operation: TypeAlias = Callable[[Process, Mapping[str, object]], dict[str, object]]
"""Answers one admin request; raises a ZTServeError to refuse it."""

MAX_MESSAGE_BYTES = 16 * 1024
"""Of a request: it holds a JWT-SVID and an audience at most."""
_MAX_STREAMS = 512
_STOP_GRACE_S = 0.5


class Agent:
    """Hands out SVIDs of `authority` on sockets in the private `directory`.

    Args:
        authority: who signs; a `Delegation` also brings entries and federation, and
            there are no others then.
        directory: where the sockets are; ours, and closed to others.
        rules: who may have which ID; with `entries`, what holds in spite of these.
        ttl_s: life of the SVIDs, which are renewed at half of it.
        admin_ids: whose processes may ask for `stop` and `extra_ops`; no Ray worker.
        entries: the file of registration entries (`entries`), followed while it runs.
        check_entries: asked before what that file holds is parsed, now and later.
        selectors: tells what ``ray:`` selectors hold for a process.
        check: asked before a worker's claim is believed.
        federation: the bundles of other trust domains.
        extra_ops: further admin requests, by name, each given the whole request.
        extra_status: what `status` is to tell besides; nothing secret.
        on_event: writes each registration, issue, refusal, alert and admin request;
            floods are counted. What it raises on purpose refuses what was to be done.
        on_stop: called, in a thread of its own, when an admin asks the agent to stop;
            without it such requests are refused.

    Raises ConfigError for entries that are not understood, IdentityError for arguments
    that contradict each other.

    """

    def __init__(  # noqa: PLR0913 - each has a default, but for the first three
        self,
        authority: Authority | Delegation,
        directory: Path,
        rules: Rules,
        *,
        ttl_s: float = DEFAULT_TTL_S,
        admin_ids: tuple[str, ...] = (),
        entries: Path | None = None,
        check_entries: Callable[[bytes], object] = lambda _raw: None,
        selectors: Further = lambda _process: (),
        check: Check = lambda _process, _spiffe_id: None,
        federation: FederatedBundles | None = None,
        extra_ops: Mapping[str, Operation] = MappingProxyType({}),
        extra_status: Callable[[], Mapping[str, object]] = dict,
        on_event: OnEvent = lambda _kind, _fields: None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        if rules.trust_domain != authority.trust_domain:
            raise IdentityError(
                f"rules for {rules.trust_domain}, authority of {authority.trust_domain}"
            )
        delegation = authority if isinstance(authority, Delegation) else None
        if delegation and (entries or federation):
            raise IdentityError("SPIRE's entries and bundles hold: name no others")
        self._authority = authority
        self._directory = directory
        self._rules = rules
        self._extra_ops = extra_ops
        self._extra_status = extra_status
        self._on_stop = on_stop
        self._federation = federation = delegation or federation
        self._events = Events(on_event)
        self._entries = (
            None
            if entries is None
            else EntryFile(
                entries,
                rules.trust_domain,
                selectors=Selectors(selectors),
                told=lambda kind, what: self._events.note(kind, None, what=what),
                check=check_entries,
            )
        )
        self._registry = Registry(
            rules,
            entries=delegation or self._entries,
            check=check,
            admin_ids=admin_ids,
        )
        self._callers = Callers(self._attested, self._registry, self._events)
        self._service = WorkloadService(
            authority, self._callers, federation=federation, ttl_s=ttl_s
        )
        self._started = 0.0
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
            self._front = Front(
                public,
                self.admin_socket,
                inner,
                answer=self._answer,
                refused=self._events.refused,
            )
            undo.callback(self._events.close)
            self._follow_changes(undo)
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
        living = self._registry.living()
        entries = self._entries
        return {
            "trust_domain": self._authority.trust_domain,
            "pid": os.getpid(),
            "socket": self.socket,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "issued": self._callers.issued,
            "entries": None if entries is None else len(entries.entries),
            "entries_problem": "" if entries is None else entries.problem,
            "spire": getattr(self._authority, "socket", None),
            "registrations": [
                {"pid": process.pid, "id": str(spiffe_id)}
                for process, spiffe_id in living.items()
            ],
            **self._extra_status(),
        }

    def _follow_changes(self, undo: contextlib.ExitStack) -> None:
        changed = self._callers.changed
        undo.callback(self._authority.subscribe(changed))
        if self._federation not in (None, self._authority):
            undo.callback(self._federation.subscribe(changed))
        if self._entries is not None:
            undo.callback(self._entries.subscribe(changed))
            undo.callback(self._entries.close)
            self._entries.follow()

    def _hold_directory(self, undo: contextlib.ExitStack) -> None:
        path = self._directory / "lock"
        try:
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise IdentityError(
                f"an identity agent already runs in {self._directory}: the project "
                "is being served already; end that first"
            ) from error
        except OSError as error:
            raise IdentityError(f"{path}: {error.strerror}") from error

    def _serve_grpc(self, inner: Path, undo: contextlib.ExitStack) -> None:
        server = grpc.server(
            _DaemonThreads(),  # type: ignore[arg-type]
            maximum_concurrent_rpcs=_MAX_STREAMS,
            options=(
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_metadata_size", 4096),
                ("grpc.so_reuseport", 0),
            ),
        )
        server.add_generic_rpc_handlers((self._service.handler(),))
        server.add_insecure_port(f"unix://{inner}")
        server.start()
        inner.chmod(0o600)
        undo.callback(lambda: server.stop(_STOP_GRACE_S).wait())

    def _attested(self, address: str) -> Process | None:
        return self._front.caller(address) if self._front else None

    # --- the admin socket -------------------------------------------------------

    def _answer(
        self, process: Process, request: dict[str, object]
    ) -> dict[str, object]:
        self._rules.check_uid(process)
        match request:
            case {"op": "register", "id": str(text), **rest} if not rest:
                return self._register(process, text)
            case {"op": "whoami", **rest} if not rest:
                self._events.tell("admin-request", process, op="whoami")
                return {"id": self._registry.held(process)}
            case {"op": "status", **rest} if not rest:
                self._events.tell("admin-request", process, op="status")
                return self.status()
            case {"op": "stop", **rest} if not rest:
                self._check_admin(process, "stop")
                return self._asked_to_stop()
            case {"op": str(op)} if op in self._extra_ops:
                self._check_admin(process, op)
                return self._extra_ops[op](process, request)
        known = ["register (with id)", "whoami", "status", "stop", *self._extra_ops]
        raise IdentityError(f"expected op {', '.join(known)}")

    def _register(self, process: Process, text: str) -> dict[str, object]:
        spiffe_id = self._registry.register(process, text)
        try:
            self._events.tell("identity-registered", process, id=spiffe_id)
        except ZTServeError:
            self._registry.forget(process)
            raise
        return {"id": spiffe_id}

    def _check_admin(self, process: Process, op: str) -> None:
        admin = self._registry.check_admin(process)
        # Written before it is done: what cannot be written is not done.
        self._events.tell("admin-request", process, op=op, id=admin)

    def _asked_to_stop(self) -> dict[str, object]:
        if self._on_stop is None:
            raise IdentityError("this agent ends with the process that started it")
        threading.Thread(target=self._on_stop, daemon=True).start()
        return {}


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
