"""Files behind HTTP, read by ranges (RFC 9110, section 14) into the caller's memory."""

import re
import threading
import time
from types import TracebackType
from typing import Self

from ztserve.artifacts.registry.http import ANSWER_S, Body, HttpReader
from ztserve.errors import RegistryError

LEAST_BYTES_S = 256 << 10
"""Below this rate, in bytes a second, a range counts as stalled."""
MAX_WINDOW = 64 << 20
"""Most bytes asked for at once where a file is read in order."""
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")


class RangeReader:
    """One file behind HTTP, read into the caller's memory; a `registry.Reader`.

    It asks for what is wanted and, read in order, for as much as it has read already:
    so windows double, up to `MAX_WINDOW`, and fit the loader's pieces of 2^n bytes.
    """

    def __init__(self, http: HttpReader, target: str, size: int) -> None:
        self.size = size
        self._http = http
        self._target = target
        self._body: Body | None = None
        self._at = 0
        self._until = 0
        self._since = 0
        self._lock = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset`; return the bytes read, 0 at the end.

        Raises RegistryError where the server is away, stalls or breaks off.
        """
        wanted = min(len(view), self.size - offset)
        if wanted <= 0:
            return 0
        with self._lock:
            body = self._body
            if body is None or self._at != offset:
                body = self._open(offset, wanted)
            wanted = min(wanted, self._until - offset)
            budget = ANSWER_S + wanted / LEAST_BYTES_S
            body.connection.until = time.monotonic() + budget
            try:
                with self._http.faults(body.url):
                    _fill(body, view[:wanted])
            except BaseException:
                self._finish()
                raise
            self._at = offset + wanted
            if self._at == self._until:
                self._finish()
        return wanted

    def _open(self, offset: int, wanted: int) -> Body:
        if offset != self._at:
            self._since = offset
        self._finish()
        window = max(wanted, min(offset - self._since, MAX_WINDOW))
        self._until = min(offset + window, self.size)
        wanted_range = {"Range": f"bytes={offset}-{self._until - 1}"}
        self._body = body = self._http.ask(self._target, wanted_range)
        try:
            self._until = _check_range(body, offset, self._until, self.size)
        except BaseException:
            self._finish()
            raise
        return body

    def _finish(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            self._http.release(body)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._finish()


def _fill(body: Body, view: memoryview) -> None:
    filled = 0
    while filled < len(view):
        read = body.response.readinto(view[filled:])
        if not read:
            raise ValueError(f"breaks off {len(view) - filled} bytes too early")
        filled += read


def _check_range(body: Body, start: int, end: int, size: int) -> int:
    """Return where the answer ends; RegistryError unless it is what was asked for."""
    response = body.response
    if response.status == 200:
        if start != 0:
            raise RegistryError(f"{body.url}: does not answer ranges (RFC 9110, 14)")
        end = size
    else:
        text = response.getheader("Content-Range", "")
        match = _RANGE.match(text)
        wanted = (str(start), str(end - 1))
        if match is None or match.groups()[:2] != wanted:
            raise RegistryError(
                f"{body.url}: answers range {text[:100]!r}, asked for {start} to "
                f"{end - 1}"
            )
        if match[3] not in {"*", str(size)}:
            raise RegistryError(
                f"{body.url}: has {match[3]} bytes, and was listed with {size}"
            )
    if response.length not in {None, end - start}:
        raise RegistryError(
            f"{body.url}: sends {response.length} bytes where {end - start} are due"
        )
    return end
