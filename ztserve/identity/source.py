"""Where a process's own identity comes from."""

import abc
import logging
import threading
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, Self

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.subscribers import Subscribers
from ztserve.identity.svid import Identity, Svid

if TYPE_CHECKING:
    from ztserve.identity.spiffe_id import SpiffeId

_LOG = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often a live source looks at the clock: what it is set forward by is noticed."""


class Source(Protocol):
    """Gives the identity of this process as it is now."""

    def current(self) -> Identity:
        """Return one coherent, valid state; IdentityError if there is none now."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each change; return how to end that.

        It is called on a thread of the source's own and should return at once.
        """


class FixedSource:
    """An identity that never changes, and ends when it expires."""

    def __init__(
        self, identity: Identity, *, clock: Callable[[], datetime] = types.now
    ) -> None:
        self._identity = identity
        self._clock = clock

    def current(self) -> Identity:
        """Return the identity; IdentityError outside its validity."""
        check_valid(self._identity.svid, now=self._clock())
        return self._identity

    def subscribe(
        self,
        callback: Callable[[], None],
    ) -> Callable[[], None]:
        """Accept a callback that there will be no occasion for."""
        return lambda: None


class LiveSource(abc.ABC):
    """What sources that change have in common: the identity, its end, the listeners.

    The identity is one value, replaced whole. It has one SPIFFE ID for as long as the
    source lives, since policy, audit and peers know the process by it. It is dropped,
    and the listeners are told, at the moment of its expiry, whether or not anybody
    asks; a thread of the source's own sees to that. From then on, and after a
    withdrawal, `current` raises IdentityError with the reason.
    """

    def __init__(
        self, whence: str, problem: str, *, clock: Callable[[], datetime]
    ) -> None:
        self.whence = whence
        self._problem, self._logged = problem, ""
        self._clock = clock
        self._identity: Identity | None = None
        self._id: SpiffeId | None = None
        self._subscribers = Subscribers()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._keeper = threading.Thread(
            target=self._keep, name="ztserve-identity-keeper", daemon=True
        )

    @abc.abstractmethod
    def _look(self) -> None:
        """See to the source; called every `LOOK_S` on the keeper's thread."""

    def current(self) -> Identity:
        """Return the identity as it is now; IdentityError if there is none."""
        identity = self._identity
        if identity is None:
            raise IdentityError(f"no identity from {self.whence}: {self._problem}")
        check_valid(identity.svid, now=self._clock())
        return identity

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each change; return how to end that."""
        return self._subscribers.subscribe(callback)

    def close(self) -> None:
        """Stop following and forget the key. May be called again."""
        with self._lock:
            self._closed.set()
            self._problem = "this source is closed"
            self._identity = None
        self._subscribers.notify()
        if self._keeper.is_alive() and self._keeper is not threading.current_thread():
            self._keeper.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for the sources themselves ---------------------------------------------

    def _adopt(self, identity: Identity) -> None:
        """Make `identity` the current one and tell, unless it is already."""
        with self._lock:
            if self._closed.is_set():
                return
            known = self._id
            if known is not None and identity.svid.id != known:
                raise IdentityError(
                    f"this process is {known} and is now called {identity.svid.id}: "
                    "it must be started anew to change its name"
                )
            self._id, self._problem, self._logged = identity.svid.id, "", ""
            if _same(identity, self._identity):
                return
            self._identity = identity
        self._subscribers.notify()

    def _drop(self, why: str, *, only: Identity | None = None) -> None:
        """Forget the identity (if it still is `only`) with its key, and tell."""
        with self._lock:
            if self._closed.is_set() or (only and self._identity is not only):
                return
            dropped, self._identity = self._identity, None
            self._problem = why
        if dropped is not None:
            _LOG.error("identity of %s dropped: %s", dropped.svid.id, why)
            self._subscribers.notify()

    def _note(self, problem: str) -> None:
        """Remember, and log once, what is wrong while the identity may still hold."""
        with self._lock:
            self._problem = problem
            if problem == self._logged or self._closed.is_set():
                return
            self._logged = problem
        _LOG.warning("%s: %s", self.whence, problem)

    def _left_s(self, identity: Identity) -> float:
        """Return the seconds until `identity` expires."""
        return (identity.svid.not_after - self._clock()).total_seconds()

    def _keep(self) -> None:
        try:
            while not self._closed.is_set():
                self._look()
                self._wait()
        finally:
            # Whoever would not hear of a withdrawal must not go on.
            self._drop("it is no longer followed")

    def _wait(self) -> None:
        """Wait until it is time to look again; see to an expiry at its moment."""
        identity = self._identity
        if identity is None:
            self._closed.wait(LOOK_S)
            return
        self._closed.wait(min(LOOK_S, max(0.001, self._left_s(identity))))
        if self._left_s(identity) < 0:
            self._drop("the SVID expired and was not renewed", only=identity)


def check_valid(svid: Svid, *, now: datetime) -> None:
    """Raise IdentityError if `svid` is not valid at `now`."""
    if now > svid.not_after:
        raise IdentityError(f"the SVID of {svid.id} expired at {svid.not_after}")
    if now < svid.not_before:
        raise IdentityError(f"the SVID of {svid.id} begins at {svid.not_before}")


def _same(one: Identity, other: Identity | None) -> bool:
    # The key is the leaf's, so it need not be compared.
    return (
        other is not None
        and one.svid.chain_der == other.svid.chain_der
        and one.bundles == other.bundles
    )
