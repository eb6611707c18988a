"""A live identity over the SPIFFE Workload API."""

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Protocol, Self

import grpc

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import workload_api as wire
from ztserve.identity.source import check_valid
from ztserve.identity.svid import Identity, Material, read_identity

_LOG = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_FIRST_PAUSE_S = 0.1
_SILENT = "it has not answered in time"
_LONGEST_PAUSE_S = 2.0
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class _Stream(Protocol):
    """What we use of a gRPC stream of responses."""

    def __iter__(self) -> Iterator[wire.X509SVIDResponse]: ...

    def cancel(self) -> object: ...


class WorkloadSource:
    """The identity of this process as the agent behind `socket` gives and renews it.

    `socket` has the form ``unix:///path``. The constructor waits up to `timeout_s` for
    the first SVID, through an agent that is away or not ready, and raises IdentityError
    after that. A daemon thread then follows rotation. What arrives is believed only
    after `read_identity`; a renewal that fails leaves the old identity until it
    expires. The identity is dropped, and `current` raises, when it expires or when the
    agent says that this process has none (Workload API, section 5.2.1).

    `reconnecting` is called before each further connection: an agent that was started
    anew may have to be told again who this process is. Where it raises IdentityError,
    the connection is tried later.
    """

    def __init__(
        self,
        socket: str,
        *,
        timeout_s: float = 30.0,
        reconnecting: Callable[[], None] = lambda: None,
        clock: Callable[[], datetime] = types.now,
    ) -> None:
        self.socket = socket
        self._path = wire.socket_path(socket)
        self._timeout_s = timeout_s
        self._reconnecting = reconnecting
        self._clock = clock
        self._identity: Identity | None = None
        self._problem = _SILENT
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._closed = threading.Event()
        self._stream: _Stream | None = None
        self._thread = threading.Thread(
            target=self._follow, name="ztserve-identity", daemon=True
        )
        self._thread.start()
        self._settled.wait(timeout_s)
        if self._identity is None:
            problem = self._problem
            self.close()
            raise IdentityError(
                f"no identity from the SPIFFE agent at {socket} within {timeout_s:g} s:"
                f" {problem}"
            )

    def current(self) -> Identity:
        """Return the identity as it is now; IdentityError if there is none."""
        identity = self._identity
        if identity is None:
            raise IdentityError(
                f"no identity from the SPIFFE agent at {self.socket}: {self._problem}"
            )
        check_valid(identity.svid, now=self._clock())
        return identity

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each change; return how to end that."""
        key = object()
        with self._lock:
            self._callbacks[key] = callback

        def unsubscribe() -> None:
            with self._lock:
                self._callbacks.pop(key, None)

        return unsubscribe

    def close(self) -> None:
        """Stop following and forget the key. May be called again."""
        self._closed.set()
        if self._stream is not None:
            self._stream.cancel()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        self._problem = "this source is closed"
        self._identity = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the following thread ---------------------------------------------------

    def _follow(self) -> None:
        pause = _FIRST_PAUSE_S
        connect = self._responses
        while not self._closed.is_set():
            try:
                for response in connect():
                    self._take(response)
                    pause = _FIRST_PAUSE_S
                self._note("it ended the stream")
            except IdentityError as error:
                self._note(str(error))
            except grpc.RpcError as error:
                if not self._retry_after(error):
                    return
            self._drop_expired()
            self._closed.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            connect = self._further_responses

    def _further_responses(self) -> Iterator[wire.X509SVIDResponse]:
        self._reconnecting()
        yield from self._responses()

    def _responses(self) -> Iterator[wire.X509SVIDResponse]:
        try:
            Path(self._path).stat()
        except OSError as error:
            # gRPC would say so as well, but in words about its own inside.
            raise IdentityError(f"{error.strerror}; is the agent running?") from error
        with grpc.insecure_channel(f"unix://{self._path}", options=_OPTIONS) as channel:
            stream: _Stream = channel.unary_stream(
                f"/{wire.SERVICE}/{wire.FETCH_SVID}",
                request_serializer=wire.X509SVIDRequest.SerializeToString,
                response_deserializer=wire.X509SVIDResponse.FromString,
            )(wire.X509SVIDRequest(), metadata=(wire.HEADER,))
            self._stream = stream
            if self._closed.is_set():
                return
            while (response := self._next(stream)) is not None:
                yield response

    def _next(self, stream: _Stream) -> wire.X509SVIDResponse | None:
        # A gRPC deadline would end the whole stream; each message has its own here.
        watchdog = threading.Timer(self._patience_s(), stream.cancel)
        watchdog.daemon = True
        watchdog.start()
        try:
            return next(iter(stream), None)  # the stream is its own iterator
        finally:
            watchdog.cancel()

    def _patience_s(self) -> float:
        """Return how long the agent may be silent: 3/4 of what is left to our SVID."""
        identity = self._identity
        if identity is None:
            return self._timeout_s
        left = (identity.svid.not_after - self._clock()).total_seconds()
        return max(1.0, 0.75 * left)

    def _take(self, response: wire.X509SVIDResponse) -> None:
        if not response.svids:
            raise IdentityError("the agent's answer holds no SVID")
        first = response.svids[0]  # the default one (Workload API, section 5.2.1)
        material = Material(
            spiffe_id=first.spiffe_id,
            chain=first.x509_svid,
            key=first.x509_svid_key,
            bundle=first.bundle,
            federated=dict(response.federated_bundles),
        )
        self._identity = read_identity(material, now=self._clock())
        self._problem = ""
        self._settled.set()
        self._notify()

    def _retry_after(self, error: grpc.RpcError) -> bool:
        """Note what went wrong; return whether it makes sense to ask again."""
        if self._closed.is_set():
            return False
        code = error.code()
        if code is grpc.StatusCode.CANCELLED:  # by our own watchdog
            self._note(_SILENT)
        else:
            self._note(f"{code.name}: {str(error.details())[:500]}")
        if code is grpc.StatusCode.PERMISSION_DENIED:
            self._drop("the agent no longer grants it")
        if code is grpc.StatusCode.INVALID_ARGUMENT:  # not to be repeated (section 5)
            self._drop("the agent does not understand us")
            self._settled.set()
            return False
        return True

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            _LOG.warning("SPIFFE agent at %s: %s", self.socket, problem)
        self._problem = problem

    def _drop_expired(self) -> None:
        identity = self._identity
        if identity is not None and self._clock() > identity.svid.not_after:
            self._drop(f"it expired at {identity.svid.not_after}")

    def _drop(self, why: str) -> None:
        if self._identity is not None:
            _LOG.error("identity of %s dropped: %s", self._identity.svid.id, why)
            self._identity = None
            self._notify()

    def _notify(self) -> None:
        with self._lock:
            callbacks = list(self._callbacks.values())
        for callback in callbacks:
            try:
                callback()
            except Exception:  # noqa: BLE001
                # One listener's fault must not end rotation for the others.
                _LOG.exception("a listener to identity changes failed")
