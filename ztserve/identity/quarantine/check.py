"""Who is shut out, although their SVID still verifies.

SPIFFE has no revocation: a stolen SVID is good until it expires. Whoever is on this
list, by SPIFFE ID or by the serial number of one certificate, is refused at the next
call, and running streams end within a second. It is a file of this node
(`file`), followed by each process that serves or calls.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from ztserve.errors import IdentityError, Unauthenticated, Unavailable
from ztserve.identity.peer import PUBLIC
from ztserve.identity.quarantine import file
from ztserve.identity.quarantine.entry import Entry
from ztserve.identity.subscribers import Subscribers
from ztserve.types import Peer

_LOG = logging.getLogger(__name__)

LOOK_S = 0.1
"""How often the file is looked at."""
STALE_S = 2.0
"""A list that was not looked at for so long is no list: its disk stalls, perhaps."""


class Quarantine:
    """The list in the file at `path`, always current; close it, or use it in a `with`.

    A file that is not there is an empty list if there has never been one. A file that
    cannot be read, is not as `file` says, or has vanished is no list:
    everybody is refused until it is mended. The constructor raises IdentityError for
    such a file. A change is noticed within 0.25 s, by a thread that looks every 0.1 s;
    the checks themselves read no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = False
        self._subscribers = Subscribers()
        self._closed = threading.Event()
        self._held: dict[str | int, Entry] | None = {}
        self._problem = ""
        self._looked = 0.0
        self._look()
        if self._held is None:
            raise IdentityError(self._problem)
        self._thread = threading.Thread(
            target=self._follow, name="ztserve-quarantine", daemon=True
        )
        self._thread.start()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the file and follow it; IdentityError for one that cannot be used."""
        return cls(path)

    def check(self, peer: Peer) -> None:
        """Raise Unauthenticated if `peer`, or its certificate, is in quarantine.

        Raises Unavailable where there is no usable list to judge by.
        """
        held = self._held
        if held is None or time.monotonic() - self._looked > STALE_S:
            raise self._unusable()
        if held and (peer.id in held or peer.serial in held):
            entry = held.get(peer.id) or held[peer.serial]
            raise Unauthenticated(PUBLIC, _told(peer.id, entry))

    def check_server(self, spiffe_id: str, serial: int | None = None) -> None:
        """Raise Unavailable if the server `spiffe_id` may not be called.

        `serial` is that of its certificate, where it has shown one.
        """
        held = self._held
        if held is None or time.monotonic() - self._looked > STALE_S:
            raise self._unusable()
        entry = held.get(spiffe_id) or (None if serial is None else held.get(serial))
        if entry is not None:
            reason = _told(spiffe_id, entry)
            raise Unavailable(f"{spiffe_id} may not be called now", reason)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each change; return how to end that.

        It is called on this list's own thread and should return at once.
        """
        return self._subscribers.subscribe(callback)

    def close(self) -> None:
        """Follow the file no more. May be called again."""
        self._closed.set()
        self._thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the following thread ---------------------------------------------------

    def _follow(self) -> None:
        while not self._closed.wait(LOOK_S):
            before = self._held, self._problem
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - told at each call
                # Whatever it is: a list that nobody follows must admit nobody.
                self._held, self._problem = None, f"{self.path}: {error!r:.200}"
            if (self._held, self._problem) != before:
                self._tell()

    def _look(self) -> None:
        # The whole file each time: it is small, and what lies above it, or the link
        # that leads to it, can change while the file does not.
        try:
            entries = file.read(self.path)
            if entries is None and self._seen:
                raise IdentityError(
                    f"{self.path}: vanished; restore it, or begin a new one with "
                    "`ztserve quarantine add`"
                )
        except IdentityError as error:
            self._problem = f"the quarantine list cannot be used: {error}"
            self._held = None
        else:
            self._seen = self._seen or entries is not None
            self._held = {entry.key: entry for entry in entries or ()}
            self._problem = ""
        self._looked = time.monotonic()

    def _tell(self) -> None:
        if self._held is None:
            _LOG.error("everybody is refused: %s", self._problem)
        else:
            _LOG.warning("subjects in quarantine now: %d", len(self._held))
        self._subscribers.notify()

    def _unusable(self) -> Unavailable:
        problem = self._problem or f"{self.path} was not read for over {STALE_S:g} s"
        return Unavailable("this service cannot judge who may call now", problem)


def _told(spiffe_id: str, entry: Entry) -> str:
    by_id = entry.subject == spiffe_id
    who = spiffe_id if by_id else f"serial {entry.subject} of {spiffe_id}"
    return f"{who} is in quarantine since {entry.added_at}: {entry.reason}"
