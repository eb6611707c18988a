"""A live identity over the SPIFFE Workload API."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeAlias

import grpc

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import workload_api as wire
from ztserve.identity.source import LiveSource
from ztserve.identity.spiffe_id import SpiffeId
from ztserve.identity.svid import Material, read_identity

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_LEAST_S = 0.05
"""Between two answers of one stream: what floods us is read no faster than that."""
_SILENT = "it has not answered in time"
_DEAD = "Connection refused"
_MOVED = "another agent listens at its socket now"
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
_jitter = random.SystemRandom().uniform

_Place: TypeAlias = tuple[int, int, int] | None
_Responses: TypeAlias = Generator[wire.X509SVIDResponse, None, None]


class _Stream(Protocol):
    """What we use of a gRPC stream of responses."""

    def __iter__(self) -> Iterator[wire.X509SVIDResponse]: ...

    def cancel(self) -> object: ...


class WorkloadSource(LiveSource):
    """The identity of this process as the agent behind `socket` gives and renews it.

    `socket` has the form ``unix:///path`` or ``tcp://127.0.0.1:port``. Of several SVIDs
    the first one is ours (Workload API, section 5.3), or the first that bears `hint`,
    or that of `spiffe_id`, or that of `preferred` where it is among them. The
    constructor waits up to `timeout_s` for it, through an agent that is away or not
    ready, and raises IdentityError after that. Daemon threads then follow rotation.

    What arrives is believed whole, and only after `read_identity`; a renewal that does
    not hold leaves the old identity until it expires. The identity is dropped, and
    `current` raises, when it expires, when the agent says that this process has none
    (PERMISSION_DENIED), and when an answer no longer holds it: what is absent is
    withdrawn (sections 4.4 and 5.2.1).

    An agent that is away is tried again after 0.1 s, then ever less often, after 2 s at
    most; at once when its socket was made anew.

    `reconnecting` is called before each further connection: an agent that was started
    anew may have to be told again who this process is. Where it raises IdentityError,
    the connection is tried later.
    """

    def __init__(
        self,
        socket: str,
        *,
        hint: str | None = None,
        spiffe_id: SpiffeId | None = None,
        preferred: SpiffeId | None = None,
        timeout_s: float = 30.0,
        reconnecting: Callable[[], None] = lambda: None,
        clock: Callable[[], datetime] = types.now,
    ) -> None:
        super().__init__(f"the SPIFFE agent at {socket}", _SILENT, clock=clock)
        self.socket = socket
        self._target = wire.grpc_target(socket)
        unix = socket.startswith("unix:")
        self._path = Path(wire.socket_path(socket)) if unix else None
        self._hint = hint
        self._id, self._preferred = spiffe_id, preferred
        self._timeout_s = timeout_s
        self._reconnecting = reconnecting
        self._settled = threading.Event()
        self._stream: _Stream | None = None
        self._place: _Place = None
        self._patient_until = time.monotonic() + timeout_s
        self._cancelled = ""
        self._follower = threading.Thread(
            target=self._follow, name="ztserve-identity", daemon=True
        )
        self._follower.start()
        self._keeper.start()
        self._settled.wait(timeout_s)
        if self._identity is None:
            problem = self._problem
            self.close()
            raise IdentityError(
                f"no identity from the SPIFFE agent at {socket} within {timeout_s:g} s:"
                f" {problem}"
            )

    def close(self) -> None:
        """Stop following and forget the key. May be called again."""
        super().close()
        if (stream := self._stream) is not None:
            stream.cancel()
        if self._follower is not threading.current_thread():
            self._follower.join(timeout=5)

    # --- the keeper's thread ----------------------------------------------------

    def _look(self) -> None:
        """End a stream that is silent for too long or whose agent was replaced."""
        stream = self._stream
        if stream is None:
            return
        # A gRPC deadline would end the whole stream; each message has its own here.
        if time.monotonic() > self._patient_until:
            self._cancelled = _SILENT
            stream.cancel()
        elif self._found() not in (None, self._place):
            self._cancelled = _MOVED
            stream.cancel()

    def _found(self) -> _Place:
        """Return what tells one making of the agent's socket from the next."""
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns

    # --- the following thread ---------------------------------------------------

    def _follow(self) -> None:
        try:
            self._follow_streams()
        finally:
            # Whoever would not hear of a withdrawal must not go on.
            self._drop(self._problem or "it is no longer followed")
            self._settled.set()

    def _follow_streams(self) -> None:
        pause = _FIRST_PAUSE_S
        connect = self._responses
        while not self._closed.is_set():
            self._place = self._found()
            try:
                with contextlib.closing(connect()) as responses:
                    for response in responses:
                        self._take(response)
                        pause = _FIRST_PAUSE_S
                        self._closed.wait(_LEAST_S)
                self._note("it ended the stream")
            except IdentityError as error:
                self._note(str(error))
            except grpc.RpcError as error:
                if not self._retry_after(error):
                    return
            connect = self._further_responses
            again = self._rest(_jitter(pause / 2, pause))
            pause = _FIRST_PAUSE_S if again else min(2 * pause, _LONGEST_PAUSE_S)

    def _rest(self, pause_s: float) -> bool:
        """Wait; return at once, and whether so, when the socket was made anew."""
        until = time.monotonic() + pause_s
        while (left := until - time.monotonic()) > 0:
            if self._closed.wait(min(left, _FIRST_PAUSE_S)):
                break
            if self._found() not in (None, self._place):
                return True
        return False

    def _further_responses(self) -> _Responses:
        self._reconnecting()
        yield from self._responses()

    def _responses(self) -> _Responses:
        if self._path is not None:
            try:
                self._path.stat()
            except OSError as error:
                # gRPC would say so as well, but in words about its own inside.
                raise IdentityError(
                    f"{error.strerror}; is the agent running?"
                ) from error
        with grpc.insecure_channel(self._target, options=_OPTIONS) as channel:
            stream: _Stream = channel.unary_stream(
                f"/{wire.SERVICE}/{wire.FETCH_SVID}",
                request_serializer=wire.X509SVIDRequest.SerializeToString,
                response_deserializer=wire.X509SVIDResponse.FromString,
            )(wire.X509SVIDRequest(), metadata=(wire.HEADER,))
            self._be_patient()
            self._cancelled, self._stream = "", stream
            try:
                if self._closed.is_set():
                    return
                for response in stream:
                    yield response
                    self._be_patient()
            finally:
                self._stream = None

    def _be_patient(self) -> None:
        """Let the agent be silent for 3/4 of what is left to our SVID, 1 s at least."""
        identity = self._identity
        patience_s = self._timeout_s
        if identity is not None:
            patience_s = max(1.0, 0.75 * self._left_s(identity))
        self._patient_until = time.monotonic() + patience_s

    def _take(self, response: wire.X509SVIDResponse) -> None:
        try:
            ours = self._chosen(response)
        except IdentityError as error:
            # What is absent is withdrawn; the stream goes on and may grant it again.
            self._note(str(error))
            self._drop(str(error))
            return
        material = Material(
            spiffe_id=ours.spiffe_id,
            chain=ours.x509_svid,
            key=ours.x509_svid_key,
            bundle=ours.bundle,
            federated=dict(response.federated_bundles),
        )
        self._adopt(read_identity(material, now=self._clock()))
        self._settled.set()

    def _chosen(self, response: wire.X509SVIDResponse) -> wire.X509SVID:
        """Return the SVID that is ours. Raises IdentityError where there is none."""
        if not response.svids:
            raise IdentityError("the agent's answer holds no SVID")
        seen: set[str] = set()
        ours: wire.X509SVID | None = None
        for one in response.svids:
            if one.hint in seen:
                continue  # of those with one hint the first counts (section 5.2.1)
            if one.hint:
                seen.add(one.hint)
            if self._hint in (None, one.hint) and self._id in (None, one.spiffe_id):
                if self._id or one.spiffe_id == self._preferred:
                    return one
                ours = ours or one
        if ours is not None:
            return ours
        wanted = self._id or "any SPIFFE ID"
        hint = "" if self._hint is None else f" with the hint {self._hint!r}"
        given = ", ".join(one.spiffe_id for one in response.svids)
        raise IdentityError(
            f"the agent's answer holds no SVID of {wanted}{hint}, but of "
            f"{given!r:.300}; mend its registration entry"
        )

    def _retry_after(self, error: grpc.RpcError) -> bool:
        """Note what went wrong; return whether it makes sense to ask again."""
        code, problem = error.code(), self._cancelled
        if code is not grpc.StatusCode.CANCELLED or not problem:  # not by our keeper
            details = str(error.details())
            problem = f"{code.name}: {details!r:.500}"
            if code is grpc.StatusCode.UNAVAILABLE and _DEAD in details:
                problem = "nobody listens at its socket; is the agent running?"
        self._note(problem)
        if code is grpc.StatusCode.PERMISSION_DENIED:
            self._drop(problem)
        # An agent that does not understand us is not asked again (Workload Endpoint,
        # section 6).
        return code is not grpc.StatusCode.INVALID_ARGUMENT
