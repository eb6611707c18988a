"""What an attack came to: refused, as it must be, or let in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ztserve.errors import ZTServeError


class Refusal(NamedTuple):
    """One attack that was refused."""

    title: str
    saw: str
    """All that the attacker learnt."""
    audited: str
    """The error, or for a refused handshake the cause, that the audit has for it."""


class LetInError(AssertionError):
    """An attack that was not refused: a control does not hold."""


class Told:
    """What the attacker was told, once it was."""

    saw = ""
    error = ""


@contextmanager
def refused(title: str, *expected: type[ZTServeError]) -> Iterator[Told]:
    """Note the error with which the block must end; LetInError if it goes through.

    Any other error is passed on: a server that is away has refused nothing.
    """
    told = Told()
    try:
        yield told
    except expected as error:
        told.error = type(error).__name__
        told.saw = f"{told.error}: {getattr(error, 'public', error)}"
        return
    raise LetInError(f"{title}: was not refused")
