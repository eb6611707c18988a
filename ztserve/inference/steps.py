"""The pieces that a generator of the model's gives, one or several at a turn."""

import time
from collections.abc import Callable, Iterable, Iterator

from ztserve.types import Outputs

TOGETHER_S = 0.0002
"""For how long a piece is kept back, for the next ones to leave with it."""
QUICK_S = 0.00005
"""A next piece that takes longer is not waited for."""
UNKNOWN_S = 0.001
_END = object()


class Steps:
    """Takes a generator on, step by step; for one thread that has the model's turn.

    To take the turn for each piece of a quick model costs more than the piece. How long
    the next one takes is guessed from the longest of the last few.
    """

    def __init__(
        self, stream: Iterator[object], made: Callable[[object], Outputs]
    ) -> None:
        self._stream, self._made = stream, made
        self._expected_s = UNKNOWN_S
        self.over = False
        """Whether there are no more pieces."""

    def take(self) -> Iterable[Outputs]:
        """Return the next pieces; an error leaves after those that came before it."""
        pieces: list[Outputs] = []
        began = now = time.monotonic()
        try:
            while True:
                piece = next(self._stream, _END)
                if piece is _END:
                    self.over = True
                    return pieces
                pieces.append(self._made(piece))
                since, now = now, time.monotonic()
                self._expected_s = max(now - since, self._expected_s / 2)
                if self._expected_s > QUICK_S or now - began > TOGETHER_S:
                    return pieces
        except BaseException as error:  # SystemExit and others: the caller names them
            self.over = True
            if not pieces:
                raise
            return _then(pieces, error)


def _then(pieces: list[Outputs], error: BaseException) -> Iterator[Outputs]:
    yield from pieces
    raise error
