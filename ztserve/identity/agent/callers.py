"""Who calls the Workload API, entitled to what, and when to be told again."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeAlias

import grpc

from ztserve.errors import IdentityError, ZTServeError
from ztserve.identity import workload_api as wire
from ztserve.identity.agent.attestation import CannotTell, FalseClaim, Process
from ztserve.identity.agent.events import Events
from ztserve.identity.agent.registration import Grant, Registry

_LOG = logging.getLogger(__name__)

MAX_STREAMS_OF_ONE = 32
MAX_WHAT_CHARACTERS = 200
"""Of what was issued, in the audit."""

Entitled: TypeAlias = tuple[Process, tuple[Grant, ...]]


class Callers:
    """The processes behind the calls; `attested` knows them by their address.

    Each SVID that is issued and each refusal is told to `events`; what cannot be told
    there is not issued.
    """

    def __init__(
        self,
        attested: Callable[[str], Process | None],
        registry: Registry,
        events: Events,
    ) -> None:
        self._attested = attested
        self._registry = registry
        self._events = events
        self._streams: dict[threading.Event, Process] = {}
        self._lock = threading.Lock()
        self.issued = 0
        """SVIDs so far, of both kinds."""

    def changed(self) -> None:
        """Have every stream send its full set anew, or end: at once."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.set()

    def turns(
        self, context: grpc.ServicerContext, ttl_s: float, *, svids: bool = False
    ) -> Iterator[Entitled]:
        """Yield the caller and its entitlements each time that it is to be sent them.

        That is at once, at each change, and at half of the shortest life of an SVID,
        `ttl_s` where a grant names none. Ends the call if there are none (any more).
        With `svids`, what it is no longer entitled to is told as withdrawn.
        """
        turn = threading.Event()
        if not context.add_callback(turn.set):
            return
        process, _ = self.entitled(context)
        with self._lock:
            count = sum(one == process for one in self._streams.values())
            if count < MAX_STREAMS_OF_ONE:
                self._streams[turn] = process
        if count >= MAX_STREAMS_OF_ONE:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"process {process.pid} follows {count} streams and may follow no more",
            )
        held: tuple[Grant, ...] = ()
        try:
            while True:
                turn.clear()  # before we look: what changes from now on comes again
                if not context.is_active():
                    return
                process, grants = self.entitled(context, held)
                self._note_withdrawn(process, held, grants)
                held = grants if svids else ()
                yield process, grants
                turn.wait(min(grant.ttl_s or ttl_s for grant in grants) / 2)
        finally:
            with self._lock:
                del self._streams[turn]

    def entitled(
        self, context: grpc.ServicerContext, held: tuple[Grant, ...] = ()
    ) -> Entitled:
        """Return the attested caller and its entitlements, or end the call.

        `held` is what it was entitled to before.

        The caller takes no part in that (Workload Endpoint, section 5), but for the
        header that no browser or proxy can be made to send (section 3, W2).
        """
        key, value = wire.HEADER
        given = [v for k, v in context.invocation_metadata() if k == key]
        if given != [value]:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the header {key}: {value} is missing",
            )
        process = self._attested(context.peer())
        if process is None:
            stranger = FalseClaim("the connection is not attested")
            self.refuse(None, stranger, context)
        try:
            return process, self._registry.grants(process)
        except CannotTell as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except IdentityError as error:
            self._note_withdrawn(process, held, ())
            self.refuse(process, error, context)

    def _note_withdrawn(
        self, process: Process, held: tuple[Grant, ...], grants: tuple[Grant, ...]
    ) -> None:
        left = {grant.spiffe_id for grant in grants}
        for grant in held:
            if grant.spiffe_id not in left:
                self._events.note("svid-withdrawn", process, id=grant.spiffe_id)

    def refuse(
        self,
        process: Process | None,
        error: IdentityError,
        context: grpc.ServicerContext,
    ) -> NoReturn:
        """End the call: the caller has no such identity."""
        _LOG.warning("no identity issued: %s", error)
        self._events.refused(process, "workload API", error)
        context.abort(grpc.StatusCode.PERMISSION_DENIED, f"no identity issued: {error}")

    def note_issue(
        self, process: Process, grant: Grant, what: str, context: grpc.ServicerContext
    ) -> None:
        """Write that an SVID is about to be sent; end the call if that fails."""
        what = f"{what:.{MAX_WHAT_CHARACTERS}}"  # an audience may be long
        try:
            self._events.tell("svid-issued", process, id=grant.spiffe_id, what=what)
        except ZTServeError as error:
            _LOG.error("no identity issued: %s", error)
            context.abort(grpc.StatusCode.UNAVAILABLE, f"cannot be audited: {error}")
        with self._lock:
            self.issued += 1
        _LOG.info("issued %s to process %d: %s", grant.spiffe_id, process.pid, what)
