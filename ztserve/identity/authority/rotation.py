"""Signing keys that follow each other without a gap (SPIFFE Federation, 4.1).

A new key is published before it signs, so that whoever verifies has it in time; an old
one stays published until all that it signed has expired. Pure: time comes in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, TypeVar

from ztserve.errors import IdentityError

K = TypeVar("K")


@dataclass(slots=True)
class _Aged(Generic[K]):
    key: K
    made_at: datetime
    signed_until: datetime
    """When the last thing that it signed expires."""


class Rotation(Generic[K]):
    """The keys of one kind: one signs, others are published beside it.

    `make` makes a key that lives `life_s` seconds from the moment it is given. At half
    of that the next one is published; `overlap_s` seconds later it signs. Raises
    IdentityError where the overlap is more than a quarter of the life: what the old
    key signs needs the rest.
    """

    def __init__(
        self,
        make: Callable[[datetime], K],
        *,
        life_s: float,
        overlap_s: float,
        now: datetime,
    ) -> None:
        if not 0 <= overlap_s <= life_s / 4:
            raise IdentityError(
                f"overlap_s is {overlap_s:g}, expected 0 to {life_s / 4:g}: a quarter "
                f"of a signing key's {life_s:g} s"
            )
        self._make = make
        self._life = timedelta(seconds=life_s)
        self._overlap = timedelta(seconds=overlap_s)
        self._current = self._made(now)
        self._next: _Aged[K] | None = None
        self._old: list[_Aged[K]] = []

    @property
    def current(self) -> K:
        """The key that signs."""
        return self._current.key

    @property
    def published(self) -> tuple[K, ...]:
        """All keys to verify by: the one that signs, the next, then the old ones."""
        following = () if self._next is None else (self._next,)
        return tuple(aged.key for aged in (self._current, *following, *self._old))

    @property
    def due_at(self) -> datetime:
        """When `advance` has something to do next."""
        change = (
            self._current.made_at + self._life / 2
            if self._next is None
            else self._next.made_at + self._overlap
        )
        return min([change, *(aged.signed_until for aged in self._old)])

    def signed(self, until: datetime) -> None:
        """Note that the current key signed something that expires at `until`."""
        self._current.signed_until = max(self._current.signed_until, until)

    def roll(self, now: datetime) -> None:
        """Publish the next key. Raises IdentityError where one is published already."""
        if self._next is not None:
            raise IdentityError(
                "a rollover is under way: the next key signs from "
                f"{self._next.made_at + self._overlap}"
            )
        self._next = self._made(now)

    def advance(self, now: datetime) -> bool:
        """Take the steps that are due; return whether `published` changed."""
        before = self.published
        if self._next is None and now >= self._current.made_at + self._life / 2:
            self.roll(now)
        if self._next is not None and (
            now >= self._next.made_at + self._overlap
            # Nobody tended to it in time: an expired key signs nothing of use.
            or now >= self._current.made_at + self._life
        ):
            self._old.append(self._current)
            self._current, self._next = self._next, None
        self._old = [aged for aged in self._old if aged.signed_until >= now]
        return set(map(id, self.published)) != set(map(id, before))

    def _made(self, now: datetime) -> _Aged[K]:
        return _Aged(self._make(now), now, now)
