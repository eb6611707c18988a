"""Where a process's own identity comes from."""

from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.svid import Identity, Svid


class Source(Protocol):
    """Gives the identity of this process as it is now."""

    def current(self) -> Identity:
        """Return one coherent, valid state; IdentityError if there is none now."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each change; return how to end that.

        It is called on the source's own thread and should return at once.
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


def check_valid(svid: Svid, *, now: datetime) -> None:
    """Raise IdentityError if `svid` is not valid at `now`."""
    if now > svid.not_after:
        raise IdentityError(f"the SVID of {svid.id} expired at {svid.not_after}")
    if now < svid.not_before:
        raise IdentityError(f"the SVID of {svid.id} begins at {svid.not_before}")
